"""Download PASCAL VOC 2012 with SBD's masks: the usual train_aug (10,582 images) and val (1,449), in VOC layout.

Images, box annotations (the source of tags) and masks come from VOC's archive; SBD's archive adds masks of further VOC
images. If both have a mask, VOC's is used, as in the commonly shared SegmentationClassAug.
"""

import gzip
import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.data import matlab
from pipeline.data.palette import write_mask
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items
LISTS = "ImageSets/Segmentation"
MASKS = "SegmentationClassAug"
_ARCHIVES = ".archives"
_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_RESUME = "run the stage again to resume"
# Limits in bytes on a file in an archive and on all of them, far above both archives'. Raise them for larger releases.
MEMBER_BYTES, UNPACKED_BYTES = 10**8, 6 * 10**9
# Only regular files with these names are extracted, so that an archive cannot write outside the folder.
_VOC = re.compile(rf"(?:\./)?VOCdevkit/VOC2012/((?:JPEGImages|Annotations|SegmentationClass|{LISTS})/[\w-]+\.\w+)")
_SBD = re.compile(r"(?:\./)?benchmark_RELEASE/dataset/(?:(train|val)\.txt|cls/([\w-]+)\.mat)")


@dataclass(frozen=True)
class Archive:
    """A file to download, its published length in bytes and its published MD5."""

    name: str
    url: str
    size: int
    md5: str


@dataclass(frozen=True)
class Release:
    """The two archives, the expected number of images in each list, and the disk space needed in bytes."""

    voc: Archive
    sbd: Archive
    train: int
    evaluation: int
    disk_bytes: int


def voc2012_aug() -> Release:
    """The release at the addresses and with the checksums that torchvision lists; the lengths are the servers'."""
    from pipeline.networks.vision import import_torchvision

    datasets = import_torchvision().datasets
    voc, sbd = datasets.voc.DATASET_YEAR_DICT["2012"], datasets.SBDataset
    return Release(
        Archive(voc["filename"], voc["url"], 1_999_639_040, voc["md5"]),
        Archive(sbd.filename, sbd.url, 1_419_539_633, sbd.md5),
        train=10_582,
        evaluation=1_449,
        disk_bytes=6 * 10**9,
    )


def is_complete(root: Path, release: Release) -> bool:
    """Whether ``root`` has both lists and an image, mask and annotation for each entry, with no download unfinished."""
    if (root / _ARCHIVES).exists():
        return False
    try:
        train, evaluation = (_lines((root / LISTS / name).read_text()) for name in ("train_aug.txt", "val.txt"))
    except (OSError, UnicodeDecodeError):
        return False
    if (len(train), len(evaluation)) != (release.train, release.evaluation):
        return False
    listed = {*train, *evaluation}
    return all(
        listed <= {file.stem for file in (root / folder).glob(f"*{suffix}")}
        for folder, suffix in (("JPEGImages", ".jpg"), (MASKS, ".png"), ("Annotations", ".xml"))
    )


def download(release: Release, root: Path, progress: Progress = lambda items, label, total: items) -> None:
    """Download and unpack the dataset to ``root``; other files there remain. A restart resumes the transfer.

    Raises:
        PipelineError: the disk is too small or becomes full, the source is unreachable or breaks off, an archive has
            another length or checksum or cannot be unpacked, or scipy (needed for SBD's masks) is missing.
    """
    archives = root / _ARCHIVES
    try:
        archives.mkdir(parents=True, exist_ok=True)
        load_mask = _mask_reader()
        _check_disk(release, root)
        voc, sbd = (_fetch(archive, archives, progress) for archive in (release.voc, release.sbd))
        _unpack_voc(voc, root, progress)
        _unpack_sbd(sbd, root, load_mask, progress)
    except OSError as error:
        fault = f"{error.filename or root}: cannot be read or written ({error.strerror})"
        raise PipelineError(f"{fault}; free space or repair the disk, and {_RESUME}") from None
    shutil.rmtree(archives)
    if not is_complete(root, release):
        raise PipelineError(
            f"{root}: the archives do not contain the expected {release.train} + {release.evaluation} images with "
            "masks and annotations; move the folder away and run the stage again"
        )


def _check_disk(release: Release, root: Path) -> None:
    present = sum(file.stat().st_size for file in (root / _ARCHIVES).iterdir())
    free, missing = shutil.disk_usage(root).free, release.disk_bytes - present
    if free < missing:
        raise PipelineError(
            f"{root}: {free / 1e9:.1f} GB free on its disk, but the download needs {missing / 1e9:.1f} GB; "
            "free some or set dataset.root to another disk"
        )


def _fetch(archive: Archive, folder: Path, progress: Progress) -> Path:
    """Return the archive's path in ``folder``, downloading what is missing of it, after checking length and MD5."""
    path = folder / archive.name
    part = path if path.exists() else folder / f"{archive.name}.part"
    have = part.stat().st_size if part.exists() else 0
    if have < archive.size or not part.exists():
        _transfer(archive, part, have, progress)
    with part.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual != archive.md5:
        part.unlink()
        raise PipelineError(
            f"{archive.url}: damaged or changed: its MD5 is {actual}, not {archive.md5}; the download was deleted; "
            "run the stage again"
        )
    return part.rename(path)


def _transfer(archive: Archive, part: Path, have: int, progress: Progress) -> None:
    """Append the bytes that ``part`` lacks.

    A response that is longer than published is refused, and what it added is removed. A server that does not support
    ranges sends everything; the bytes that ``part`` has are skipped.
    """
    with _failures(archive):
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    with response, part.open("ab") as file:
        skipped = 0 if response.status == http.HTTPStatus.PARTIAL_CONTENT else have
        expected = archive.size - have + skipped
        announced = response.headers.get("Content-Length") or str(expected)
        if announced != str(expected):
            raise _wrong_length(archive, f"{announced} bytes are offered where {expected} are expected")
        chunks = _chunks(response, archive)
        received = 0
        for chunk in progress(chunks, f"download {archive.name} (MB)", -(-expected // _CHUNK)):
            file.write(chunk[max(0, skipped - received) :])
            received += len(chunk)
            if received > expected:
                file.truncate(have)
                raise _wrong_length(archive, "the server sends more")
    if received < expected:
        lacking = expected - received
        raise PipelineError(f"{archive.url}: broke off {lacking} bytes before the end; {_RESUME} the download")


def _wrong_length(archive: Archive, reason: str) -> PipelineError:
    return PipelineError(
        f"{archive.url}: is not the published file of {archive.size} bytes: {reason}; get {archive.name} from elsewhere"
        f" and put it into {_ARCHIVES} in dataset.root"
    )


@contextmanager
def _failures(archive: Archive) -> Iterator[None]:
    """Report the failures of a connection."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _wrong_length(archive, "the server's is shorter") from None
        reason = getattr(error, "reason", None) or error
        raise PipelineError(f"{archive.url}: {reason}; {_RESUME} the download") from None


def _chunks(response: IO[bytes], archive: Archive) -> Iterator[bytes]:
    while True:
        with _failures(archive):
            chunk = response.read(_CHUNK)
        if not chunk:
            return
        yield chunk


def _members(path: Path, names: re.Pattern[str], progress: Progress) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the match and content of each file in the archive whose full name matches ``names``.

    Links, devices and other names are skipped. A name that appears twice is refused, like an archive beyond the limits.
    """
    seen: set[str] = set()
    total = 0
    members = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                total += member.size
                if total > UNPACKED_BYTES or member.size > MEMBER_BYTES:
                    fault = f"{member.name} has {member.size} bytes, all files up to it {total}"
                    raise PipelineError(f"{path}: unpacks to too much: {fault}; delete it and {_RESUME}")
                if member.isfile() and (match := names.fullmatch(member.name)):
                    if match[0].removeprefix("./") in seen:
                        raise PipelineError(f"{path}: contains {member.name} twice; delete it and {_RESUME}")
                    seen.add(match[0].removeprefix("./"))
                    members.append((match, member))
            for match, member in progress(members, f"unpack {path.name}", len(members)):
                file = archive.extractfile(member)
                if file is not None:
                    yield match, file.read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PipelineError(f"{path}: cannot be unpacked ({error}); delete it and {_RESUME}") from None


def _unpack_voc(path: Path, root: Path, progress: Progress) -> None:
    for match, data in _members(path, _VOC, progress):
        file = root / match[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (root / MASKS).mkdir(exist_ok=True)
    for mask in (root / "SegmentationClass").glob("*.png"):
        shutil.copyfile(mask, root / MASKS / mask.name)


def _unpack_sbd(path: Path, root: Path, load_mask: Callable[[bytes], Any], progress: Progress) -> None:
    """Add SBD's masks of images without a VOC mask, and write train_aug.txt."""
    official = {mask.stem for mask in (root / "SegmentationClass").glob("*.png")}
    names = set(_lines((root / LISTS / "train.txt").read_text()))
    for match, data in _members(path, _SBD, progress):
        split, name = match.groups()
        if split:
            names.update(_lines(data.decode()))
        elif name not in official:
            try:
                mask = np.asarray(load_mask(data), np.uint8)
            except Exception as error:  # scipy raises many types for a damaged file
                fault = f"{match[0]} cannot be read ({' '.join(str(error).split())})"
                raise PipelineError(f"{path}: {fault}; delete the archive and {_RESUME}") from None
            write_mask(root / MASKS / f"{name}.png", mask)
    names -= set(_lines((root / LISTS / "val.txt").read_text()))
    with atomic(root / LISTS / "train_aug.txt") as file:
        file.write_text("".join(f"{name}\n" for name in sorted(names)))


def _mask_reader() -> Callable[[bytes], Any]:
    """Return a function that decodes the bytes of an SBD .mat file to H x W class ids (SBD ignores no pixel)."""
    load = matlab.loader("SBD's masks")

    def read(data: bytes) -> Any:
        content = load(BytesIO(data), variable_names=["GTcls"], squeeze_me=True, struct_as_record=False)
        return content["GTcls"].Segmentation

    return read


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
