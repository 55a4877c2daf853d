"""Download PASCAL VOC 2012 with SBD's masks: the usual train_aug (10,582 images) and val (1,449), in VOC layout.

Images, box annotations (the source of tags) and masks come from VOC's archive; SBD's archive adds masks of further VOC
images. If both have a mask, VOC's is used, as in the commonly shared SegmentationClassAug.
"""

import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
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
# Only members with these names are extracted, so that an archive cannot write outside the folder.
_VOC = re.compile(rf"(?:\./)?VOCdevkit/VOC2012/((?:JPEGImages|Annotations|SegmentationClass|{LISTS})/[\w-]+\.\w+)")
_SBD = re.compile(r"(?:\./)?benchmark_RELEASE/dataset/(?:(train|val)\.txt|cls/([\w-]+)\.mat)")


@dataclass(frozen=True)
class Archive:
    """A file to download and its expected MD5."""

    name: str
    url: str
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
    """The release at the addresses and with the checksums that torchvision lists."""
    from pipeline.networks.vision import import_torchvision

    datasets = import_torchvision().datasets
    voc, sbd = datasets.voc.DATASET_YEAR_DICT["2012"], datasets.SBDataset
    return Release(
        Archive(voc["filename"], voc["url"], voc["md5"]),
        Archive(sbd.filename, sbd.url, sbd.md5),
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
    except OSError:
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
        PipelineError: the disk is too small, the source is unreachable or breaks off, an archive has another checksum,
            or scipy (needed for SBD's masks) is missing.
    """
    archives = root / _ARCHIVES
    archives.mkdir(parents=True, exist_ok=True)
    load_mask = _mask_reader()
    _check_disk(release, root)
    voc, sbd = (_fetch(archive, archives, progress) for archive in (release.voc, release.sbd))
    _unpack_voc(voc, root, progress)
    _unpack_sbd(sbd, root, load_mask, progress)
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
    """Return the archive's path in ``folder``, downloading it if needed; a file with the final name is verified."""
    path = folder / archive.name
    if path.exists():
        return path
    part = folder / f"{archive.name}.part"
    try:
        _transfer(archive, part, progress)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise PipelineError(f"{archive.url}: {reason}; run the stage again to resume the download") from None
    with part.open("rb") as file:
        actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual != archive.md5:
        part.unlink()
        raise PipelineError(
            f"{archive.url}: damaged or changed: its MD5 is {actual}, not {archive.md5}; the download was deleted; "
            "run the stage again"
        )
    return part.rename(path)


def _transfer(archive: Archive, part: Path, progress: Progress) -> None:
    """Append the missing bytes to ``part``, or rewrite it if the server does not support ranges."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file is complete: the last run was killed before the checksum
        raise
    with response, part.open("ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as file:
        length = int(response.headers.get("Content-Length", 0))
        received = 0
        for chunk in progress(_chunks(response), f"download {archive.name} (MB)", -(-length // _CHUNK)):
            received += file.write(chunk)
        if received < length:
            raise ConnectionError(f"broke off {length - received} bytes before the end")


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _members(path: Path, names: re.Pattern[str], progress: Progress) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the match and content of each file in the archive whose full name matches ``names``."""
    with tarfile.open(path) as archive:
        members = [(match, member) for member in archive if (match := names.fullmatch(member.name)) and member.isfile()]
        for match, member in progress(members, f"unpack {path.name}", len(members)):
            file = archive.extractfile(member)
            if file is not None:
                yield match, file.read()


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
            write_mask(root / MASKS / f"{name}.png", np.asarray(load_mask(data), np.uint8))
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
