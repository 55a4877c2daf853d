"""The part of the schema that describes images: the dataset, its generation, and the source of the saliency maps."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.config.reader import Count, FilePath, NonNegativeInt, Range


@dataclass(frozen=True)
class Demo:
    """The synthetic dataset: generated images with exact masks, in VOC layout."""

    train: Count = 600
    evaluation: Count = 150
    size: Annotated[int, Range(least=24)] = 96  # side in pixels; the shapes scale with it
    seed: NonNegativeInt = 0  # of the generated images; training has its own


PREPARATION_STAGES = ("demo", "download", "coco_stuff", "cub")


@dataclass(frozen=True)
class Dataset:
    """A dataset in VOC layout.

    ``root``, ``extra``, ``coco_stuff`` and ``cub`` are relative to the working folder, all other paths to ``root``.
    """

    root: FilePath
    classes: FilePath = "voc"  # 'voc', or a text file with one class name per line
    tags: FilePath = "tags.json"  # a file or folder of any kind in data/README.md, which is recognized by its content
    # Tags that name a class that ``classes`` does not list; without it, their images are negatives of the others
    other_classes: Literal["refuse", "leave_out"] = "refuse"
    # Listed images without an entry in the tags. An entry without a class always makes a negative
    untagged: Literal["refuse", "negative"] = "refuse"
    # The photos, in any tree of folders. An image's id is its path below this folder without the suffix
    images: FilePath = "JPEGImages"
    # The masks, with the ids of the images; used only for evaluation and supervised rows
    masks: FilePath | None = None
    train: FilePath = "ImageSets/Segmentation/train.txt"
    evaluation: FilePath = "ImageSets/Segmentation/val.txt"
    # More training images: one folder per class, named after their single tag (EDAM Sec. 4.4)
    extra: FilePath | None = None
    # Megapixels above which an image, mask or saliency map is refused before it is decoded
    max_megapixels: Annotated[float, Range(above=0, most=1000)] = 100.0
    # Megapixels to which larger images are reduced when they are read, with their masks and saliency maps
    working_megapixels: Annotated[float, Range(least=0.001, most=1000)] = 2.5
    # Masks that contradict the tags of a class throughout, or a picture that is in both lists
    contradictions: Literal["refuse", "warn"] = "refuse"
    # JSON of the evaluation images' object boxes: {"ID": [[class id, left, top, width, height], ...]}, in pixels
    boxes: FilePath | None = None
    demo: Demo | None = None  # generate the dataset at root
    download: Literal["voc2012_aug"] | None = None  # or download it there
    # Or convert it from COCO-Stuff 10k v1.1, unpacked in this folder (EDAM Sec. 4.6)
    coco_stuff: FilePath | None = None
    # Or convert it from CUB-200-2011, unpacked in this folder (OAA Sec. 4.5)
    cub: FilePath | None = None

    @property
    def preparation_stages(self) -> list[str]:
        """The stages that would create the dataset at ``root``. A valid block has one at most."""
        return [key for key in PREPARATION_STAGES if getattr(self, key)]

    @property
    def max_pixels(self) -> int:
        return round(self.max_megapixels * 1e6)

    def faults(self) -> Iterator[str]:
        if len(self.preparation_stages) > 1:
            one, other = self.preparation_stages[:2]
            yield f"{one}: creates the dataset, but {other} does too; set one of them to null"
        for key, source in (("coco_stuff", self.coco_stuff), ("cub", self.cub)):
            if source and Path(self.root).is_relative_to(source):
                yield f"root: lies inside dataset.{key}, {source}; choose a folder outside of it"
        root, here = Path(os.path.realpath(self.root)), Path.cwd()
        if here.is_relative_to(root):
            yield f"root: {self.root} contains the working folder; choose a folder of the dataset's own"
        if here.is_relative_to(os.path.realpath(root / self.images)):
            yield f"images: {self.images} contains the working folder; choose a folder of photos alone"
        if root.is_relative_to(here / "results"):
            yield f"root: {self.root} lies in results, which holds the outputs; choose a folder outside of it"


@dataclass(frozen=True)
class Saliency:
    """The source of the saliency maps.

    ``folder`` holds grey PNG files with the stem and size of the images. ``store`` is an HDF5 raster store.
    ``rembg`` computes them by U2-Net (the package rembg, which downloads the network). ``spectral_residual`` and
    ``fine_grained`` are OpenCV's detectors, which need no weights and are far weaker.
    """

    kind: Literal["folder", "store", "rembg", "spectral_residual", "fine_grained", "none"]
    path: FilePath | None = None

    def faults(self) -> Iterator[str]:
        if self.kind in ("folder", "store") and self.path is None:
            yield f"path: is missing; saliency.kind {self.kind} needs it"
