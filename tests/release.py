"""A small generated release of VOC 2012 and SBD, as the two archives that the download unpacks."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.data.download import Archive, Release, download
from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError

scipy_io = pytest.importorskip("scipy.io", reason="scipy is not installed; it reads and writes SBD's masks")

SIZE = (12, 16)
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ("2007_1", "2007_2"), ("2007_3",), ("2007_1", "2008_4"), ("2007_3", "2008_5")
IMAGES = ("2007_1", "2007_2", "2007_3", "2008_4", "2008_5", "2008_6")


def png(mask: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(mask)
    picture.putpalette(voc_palette().reshape(-1).tolist())
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def mat(mask: np.ndarray[Any, Any]) -> bytes:
    """Encode a mask as SBD does: a struct with boundaries and classes."""
    borders = np.empty((20, 1), object)
    borders[:, 0] = [np.zeros(SIZE, np.uint8) for _ in range(20)]
    buffer = io.BytesIO()
    content = {"Boundaries": borders, "Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}
    scipy_io.savemat(buffer, {"GTcls": content}, do_compression=True)
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes], more: Sequence[tarfile.TarInfo] = ()) -> Archive:
    """Pack the files, then members without content."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return published(path)


def published(path: Path) -> Archive:
    data = path.read_bytes()
    return Archive(path.name, path.as_uri(), len(data), hashlib.md5(data).hexdigest())


def ids(names: tuple[str, ...]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def make_release(source: Path) -> Release:
    """VOC has masks (class 1) of 2007_*; SBD has masks (class 20) of 2007_1, 2007_3, 2008_4 and 2008_5."""
    source.mkdir()
    random = np.random.default_rng(0)
    ones = np.ones(SIZE, np.uint8)
    annotation = b"<annotation><object><name>dog</name></object></annotation>"
    voc = {"ImageSets/Segmentation/train.txt": ids(TRAIN), "ImageSets/Segmentation/val.txt": ids(VAL)}
    for name in IMAGES:
        pixels = random.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        voc[f"JPEGImages/{name}.jpg"] = cv2.imencode(".jpg", pixels)[1].tobytes()
        voc[f"Annotations/{name}.xml"] = annotation
    for name in TRAIN + VAL:
        voc[f"SegmentationClass/{name}.png"] = png(ones)
        voc[f"SegmentationObject/{name}.png"] = png(ones)
    members = {f"VOCdevkit/VOC2012/{name}": data for name, data in voc.items()}
    members["VOCdevkit/VOC2012/JPEGImages/../../../../escaped.jpg"] = b"must not be written"
    masks = {f"cls/{name}.mat": mat(20 * ones) for name in {*SBD_TRAIN, *SBD_VAL}}
    sbd = {**masks, "train.txt": ids(SBD_TRAIN), "val.txt": ids(SBD_VAL), "img/2008_4.jpg": b"not needed"}
    return Release(
        pack(source / "voc.tar", members),
        pack(source / "sbd.tgz", {f"benchmark_RELEASE/dataset/{name}": data for name, data in sbd.items()}),
        train=4,
        evaluation=1,
        disk_bytes=1000,
    )


def refusal(release: Release, root: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        download(release, root)
    (line,) = caught.value.lines
    return line
