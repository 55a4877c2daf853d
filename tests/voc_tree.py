"""Small generated datasets in VOC layout for tests: coloured rectangles with exact masks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pipeline.config.dataset import Dataset
from pipeline.data.build_index import build_index
from pipeline.data.index import Image as IndexedImage
from pipeline.data.index import Index, write
from pipeline.data.palette import voc_palette
from pipeline.data.photos import examine

CLASSES = ("cat", "dog", "bird")
LISTS = Path("ImageSets/Segmentation")


def make_tree(
    root: Path,
    train: int = 4,
    evaluation: int = 2,
    size: tuple[int, int] = (24, 32),
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
) -> Dataset:
    """Write images img_000, img_001, ... of ``size`` (height, width); the first ``train`` are training images.

    Image n has an object of class n mod K + 1; every second one also an object of the next class. All images have masks
    (objects outlined with 255), tags (tags.json) and saliency maps (Saliency/). The same arguments give the same bytes.
    """
    random = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClass", "Saliency", LISTS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tags: dict[str, list[int]] = {}
    names = [f"img_{number:03d}" for number in range(train + evaluation)]
    for number, name in enumerate(names):
        present = sorted({(number + step) % len(classes) + 1 for step in range(1 + number % 2)})
        image, mask = _draw(size, present, random)
        cv2.imwrite(str(root / f"JPEGImages/{name}.jpg"), image[..., ::-1])
        write_mask(root / f"SegmentationClass/{name}.png", mask)
        cv2.imwrite(str(root / f"Saliency/{name}.png"), np.where(mask % 255 > 0, 230, 10).astype(np.uint8))
        tags[name] = present
    (root / "tags.json").write_text(json.dumps(tags))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, ids in (("train", names[:train]), ("val", names[train:])):
        (root / LISTS / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return Dataset(root=str(root), classes="classes.txt", masks="SegmentationClass")


def make_index(root: Path, saliency: bool = True, **tree: Any) -> Path:
    """Write a tree to ``root`` and its index to root/index.json; ``tree`` is passed to ``make_tree``."""
    dataset = make_tree(root, **tree)
    path = root / "index.json"
    write(path, build_index(dataset, root / "Saliency" if saliency else None).index)
    Index(path)
    return path


def minimal_params(dataset: Dataset, saliency: Path | None = None) -> dict[str, Any]:
    """The smallest valid params mapping for this dataset."""
    network = {"backbone": {"name": "small"}, "training": {"batch_size": 2, "lr": 0.1, "epochs": 1}}
    rule = "oaa" if saliency else {"oaa": {"background": 0.3, "saliency": None}}
    return {
        "experiment": "test",
        "seed": 0,
        "method": "cam",
        "dataset": {key: value for key, value in vars(dataset).items() if value is not None},
        "saliency": {"kind": "folder", "path": str(saliency)} if saliency else {"kind": "none"},
        "classifiers": {"base": network},
        "localizations": {"cam": {"model": "classifiers/base"}},
        "pseudo_labels": {"cam": {"source": "localizations/cam", "rule": rule}},
        "segmentations": {"cam": {"labels": "pseudo_labels/cam", "network": "deeplab_largefov", **network}},
    }


def write_mask(path: Path, mask: np.ndarray[Any, Any]) -> None:
    """Save class ids as VOC does: indices with VOC's palette."""
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(voc_palette().reshape(-1).tolist())
    picture.save(path)


def _draw(size: tuple[int, int], present: Sequence[int], random: np.random.Generator) -> tuple[Any, Any]:
    """Draw one rectangle per class, side by side, each in its class's colour over grey noise."""
    height, width = size
    image = random.integers(100, 140, (height, width, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    slot = width // len(present)
    for place, class_id in enumerate(present):
        top, bottom = int(random.integers(1, height // 3)), int(random.integers(2 * height // 3, height - 1))
        left, right = place * slot + slot // 5, (place + 1) * slot - slot // 5
        mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
        mask[top:bottom, left:right] = class_id
        image[top:bottom, left:right] = voc_palette()[class_id] // 2 + 100
    return image, mask


def image_size(data: bytes, limit: int) -> tuple[int, int]:
    """Check and decode an image file as the index does, and return its (height, width)."""
    height, width = examine(data, limit).rgb.shape[:2]
    return height, width


def image_of(index: Index, image_id: str) -> IndexedImage:
    """The image of the index with this id."""
    return next(image for image in index.images() if image.id == image_id)
