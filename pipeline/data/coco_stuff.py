"""COCO-Stuff 10k v1.1 with the classes of PASCAL VOC, in VOC layout (EDAM Sec. 4.6).

9,000 of COCO's images to train and 1,000 to test. Their annotations have a class at every pixel: 0 unlabeled, 1..91 a
thing under COCO's id, 92..182 stuff. VOC's 20 classes get VOC's ids, what is unlabeled is ignored, all else background.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.data import matlab
from pipeline.data.checks import IGNORE, InvalidFile, image_size
from pipeline.data.faults import Faults
from pipeline.data.palette import write_mask
from pipeline.data.tags import read_list
from pipeline.data.voc import CLASSES
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import Raster

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # items, label, number of items
MARK = "COCO_STUFF.txt"  # tells a folder that is made here from anybody's dataset
MADE = ("JPEGImages", "SegmentationClass", "ImageSets", "tags.json")
COCO = {  # ids of VOC's classes
    "aeroplane": 5,
    "bicycle": 2,
    "bird": 16,
    "boat": 9,
    "bottle": 44,
    "bus": 6,
    "car": 3,
    "cat": 17,
    "chair": 62,
    "cow": 21,
    "diningtable": 67,
    "dog": 18,
    "horse": 19,
    "motorbike": 4,
    "person": 1,
    "pottedplant": 64,
    "sheep": 20,
    "sofa": 63,
    "train": 7,
    "tvmonitor": 72,
}
UNLABELED, HIGHEST = 0, 182
TO_VOC = np.zeros(HIGHEST + 1, np.uint8)
TO_VOC[UNLABELED] = IGNORE
TO_VOC[[COCO[name] for name in CLASSES]] = range(1, len(CLASSES) + 1)


def convert(source: Path, root: Path, progress: Progress = lambda items, label, total: items) -> int:
    """Make the dataset in ``root``, beside what else is there, of the folders that COCO-Stuff 10k unpacks to.

    Tags are the classes in an image's mask. Training images in which there is none are left out of train.txt, since
    they have nothing to be tagged with; the test images all stay, in val.txt. Images are linked where they can be.

    Returns:
        How many training images were left out.

    Raises:
        PipelineError: with every fault found; ``root`` holds another dataset; scipy is missing.
    """
    if not (root / MARK).exists() and any((root / name).exists() for name in MADE):
        raise PipelineError(f"{root}: holds another dataset; set dataset.root anew, or dataset.coco_stuff to null")
    load = matlab.loader("COCO-Stuff's annotations")
    splits = _listed(source)
    names = list(dict.fromkeys(splits["train"] + splits["val"]))
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("Made by stages/coco_stuff.py of COCO-Stuff 10k.\n")
    tags: dict[str, list[int]] = {}
    faults = Faults()
    for name in progress(names, "coco_stuff", len(names)):
        image, annotation = _files(source, name)
        try:
            mask = _voc_mask(annotation, load, _size(image))
        except PipelineError as error:
            faults.add("unfit file", str(error))
            continue
        _link(image, root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"SegmentationClass/{name}.png", mask)
        tags[name] = sorted({*np.unique(mask).tolist()} - {0, IGNORE})
    faults.check()
    kept = {**splits, "train": [name for name in splits["train"] if tags[name]]}
    for split, ids in kept.items():
        with atomic(root / f"ImageSets/Segmentation/{split}.txt") as file:
            file.write_text("".join(f"{name}\n" for name in ids))
    with atomic(root / "tags.json") as file:
        file.write_text(json.dumps(tags) + "\n")
    return len(splits["train"]) - len(kept["train"])


def _listed(source: Path) -> dict[str, list[str]]:
    """Ids of the splits; every image and annotation is there, and is not of the first release."""
    faults = Faults()
    lists = {"train": source / "imageLists/train.txt", "val": source / "imageLists/test.txt"}
    splits = {split: read_list(path, faults) for split, path in lists.items()}
    for split, names in splits.items():
        for path in (path for name in names for path in _files(source, name)):
            if not path.is_file():
                line = f"{path}: missing, though listed in {lists[split]}; unpack COCO-Stuff 10k v1.1 again"
                faults.add("missing file", line)
    faults.check()
    first = _files(source, splits["train"][0])[1]
    if h5py.is_hdf5(first):
        raise PipelineError(f"{first}: is of COCO-Stuff 10k v1.0, which numbers classes otherwise; get v1.1 instead")
    return splits


def _files(source: Path, name: str) -> tuple[Path, Path]:
    """Image and annotation."""
    return source / f"images/{name}.jpg", source / f"annotations/{name}.mat"


def _size(image: Path) -> tuple[int, int]:
    try:
        return image_size(image.read_bytes())
    except InvalidFile as error:
        raise PipelineError(f"{image}: {error}") from None
    except OSError as error:
        raise PipelineError(f"{image}: cannot be read ({error.strerror}); mend its permissions or the disk") from None


def _voc_mask(annotation: Path, load: Callable[..., dict[str, Any]], size: tuple[int, int]) -> Raster:
    """H x W class ids of VOC."""
    again = "unpack COCO-Stuff 10k v1.1 again"
    try:
        stuff = load(annotation, variable_names=["S"])["S"]
    except Exception as error:  # of a damaged file scipy raises all kinds
        raise PipelineError(f"{annotation}: cannot be read ({' '.join(str(error).split())}); {again}") from None
    if stuff.shape != size:
        sizes = f"S is {'x'.join(map(str, stuff.shape[::-1]))}, its image {size[1]}x{size[0]}"
        raise PipelineError(f"{annotation}: {sizes}; {again}")
    wrong = np.setdiff1d(stuff, np.arange(HIGHEST + 1))
    if wrong.size:
        values = ", ".join(f"{value:g}" for value in wrong[:5].tolist()) + (", ..." if wrong.size > 5 else "")
        raise PipelineError(f"{annotation}: S has the values {values}, but classes are 0..{HIGHEST}; {again}")
    return TO_VOC[stuff.astype(np.intp)]


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the disk allows none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
