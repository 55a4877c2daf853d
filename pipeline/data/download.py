"""PASCAL VOC 2012 with the SBD's masks: the field's train_aug (10,582 images) and val (1,449), in VOC layout.

Images, box annotations (the tags) and masks come from VOC's archive; SBD's archive adds masks of further VOC images.
Where both have a mask, VOC's is taken, as in the field's SegmentationClassAug.
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
# Only names of this form are written: no member of an archive can lie outside the folder.
_VOC = re.compile(rf"(?:\./)?VOCdevkit/VOC2012/((?:JPEGImages|Annotations|SegmentationClass|{LISTS})/[\w-]+\.\w+)")
_SBD = re.compile(r"(?:\./)?benchmark_RELEASE/dataset/(?:(train|val)\.txt|cls/([\w-]+)\.mat)")


@dataclass(frozen=True)
class Archive:
    """A file to download, and the MD5 that it must have."""

    name: str
    url: str
    md5: str


@dataclass(frozen=True)
class Release:
    """The two archives, how many images the lists made of them must have, and the bytes that all of it needs."""

    voc: Archive
    sbd: Archive
    train: int
    evaluation: int
    needs: int


def voc2012_aug() -> Release:
    """Addresses and checksums as torchvision knows them."""
    from pipeline.networks.vision import import_torchvision

    datasets = import_torchvision().datasets
    voc, sbd = datasets.voc.DATASET_YEAR_DICT["2012"], datasets.SBDataset
    return Release(
        Archive(voc["filename"], voc["url"], voc["md5"]),
        Archive(sbd.filename, sbd.url, sbd.md5),
        train=10_582,
        evaluation=1_449,
        needs=6 * 10**9,
    )


def is_complete(root: Path, release: Release) -> bool:
    """Whether ``root`` has the lists, and every listed image with mask and annotation, and nothing half unpacked."""
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
    """Make the dataset in ``root``, beside what else is there. Started again, it goes on from the bytes it has.

    Raises:
        PipelineError: too little disk, the source cannot be reached or breaks off, an archive has another checksum, or
            scipy is missing, which reads SBD's masks.
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
            f"{root}: the archives do not give the {release.train} + {release.evaluation} images that they should, "
            "with masks and annotations; move the folder away and run the stage again"
        )


def _check_disk(release: Release, root: Path) -> None:
    there = sum(file.stat().st_size for file in (root / _ARCHIVES).iterdir())
    free, lacks = shutil.disk_usage(root).free, release.needs - there
    if free < lacks:
        raise PipelineError(
            f"{root}: {free / 1e9:.1f} GB free on its disk, but the download needs {lacks / 1e9:.1f} GB; "
            "free some or set dataset.root to another disk"
        )


def _fetch(archive: Archive, folder: Path, progress: Progress) -> Path:
    """The archive's path in ``folder``; under its final name it was checked already."""
    path = folder / archive.name
    if path.exists():
        return path
    part = folder / f"{archive.name}.part"
    try:
        _transfer(archive, part, progress)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise PipelineError(f"{archive.url}: {reason}; run the stage again: it goes on from what has arrived") from None
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        part.unlink()
        raise PipelineError(
            f"{archive.url}: arrived damaged or was changed: its MD5 is {found}, not {archive.md5}; it was deleted: "
            "run the stage again"
        )
    return part.rename(path)


def _transfer(archive: Archive, part: Path, progress: Progress) -> None:
    """Append to ``part`` what it lacks, or write it anew where the server knows no ranges."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking: killed before the checksum
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
    """Content of the archive's files whose whole name matches."""
    with tarfile.open(path) as archive:
        members = [(found, member) for member in archive if (found := names.fullmatch(member.name)) and member.isfile()]
        for found, member in progress(members, f"unpack {path.name}", len(members)):
            file = archive.extractfile(member)
            if file is not None:
                yield found, file.read()


def _unpack_voc(path: Path, root: Path, progress: Progress) -> None:
    for found, data in _members(path, _VOC, progress):
        file = root / found[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (root / MASKS).mkdir(exist_ok=True)
    for mask in (root / "SegmentationClass").glob("*.png"):
        shutil.copyfile(mask, root / MASKS / mask.name)


def _unpack_sbd(path: Path, root: Path, load_mask: Callable[[bytes], Any], progress: Progress) -> None:
    """Add SBD's masks of images that VOC has none of, and write train_aug.txt."""
    official = {mask.stem for mask in (root / "SegmentationClass").glob("*.png")}
    names = set(_lines((root / LISTS / "train.txt").read_text()))
    for found, data in _members(path, _SBD, progress):
        split, name = found.groups()
        if split:
            names.update(_lines(data.decode()))
        elif name not in official:
            write_mask(root / MASKS / f"{name}.png", np.asarray(load_mask(data), np.uint8))
    names -= set(_lines((root / LISTS / "val.txt").read_text()))
    with atomic(root / LISTS / "train_aug.txt") as file:
        file.write_text("".join(f"{name}\n" for name in sorted(names)))


def _mask_reader() -> Callable[[bytes], Any]:
    """A function from the bytes of a .mat file of SBD to its H x W class ids (no pixel is ignored there)."""
    load = matlab.loader("SBD's masks")

    def read(data: bytes) -> Any:
        content = load(BytesIO(data), variable_names=["GTcls"], squeeze_me=True, struct_as_record=False)
        return content["GTcls"].Segmentation

    return read


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
