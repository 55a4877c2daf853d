"""A generated training set with the sizes of VOC's photos, for the benchmarks of loading and training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.config.schema import Augmentation
from pipeline.data.index import Image
from pipeline.data.loading import TrainingSet
from pipeline.stores.raster import RasterStore, RasterWriter

CLASSES = 20
JITTER = (0.3, 0.3, 0.3, 0.1)


class Photos(NamedTuple):
    """Photos of 500 x 375 or 375 x 500 pixels as JPEG files of about 80 kB, with label maps and attention maps."""

    images: list[Image]
    labels: RasterStore
    maps: RasterStore

    def dataset(self, settings: Augmentation, labels: bool = False, maps: bool = False) -> TrainingSet:
        stores = (self.labels if labels else None), (self.maps if maps else None)
        return TrainingSet(self.images, CLASSES, settings, 0, stores[0], maps=stores[1])


def photos(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((375, 500), (375, 500), (500, 375))) -> Photos:
    """Write ``count`` photos; every third one is upright."""
    random = np.random.default_rng(0)
    images = []
    with (
        RasterWriter(folder / "labels.h5", "labels") as labels,
        RasterWriter(folder / "maps.h5", "attention") as maps,
    ):
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            tags = tuple(sorted((random.choice(CLASSES, 1 + int(random.random() < 0.47), replace=False) + 1).tolist()))
            coarse = random.integers(0, 256, (9, 12, 3)).astype(np.uint8)
            smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
            pixels = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
            path = folder / f"{number:06d}.jpg"
            cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
            images.append(Image(path.stem, path, height, width, tags, None, None))
            blocks = random.choice([0, *tags, 255], (9, 12)).astype(np.uint8)
            label = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
            labels.append(path.stem, np.asarray(label, np.uint8))
            for tag in tags:
                maps.append(path.stem, random.integers(0, 256, (height // 13, width // 13)).astype(np.uint8), tag)
    return Photos(images, RasterStore(folder / "labels.h5"), RasterStore(folder / "maps.h5"))
