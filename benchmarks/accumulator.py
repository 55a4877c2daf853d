"""Time of online attention accumulation, against a PNG read, maximum and write per map.

    python -m benchmarks.accumulator [--images N] [--batch-size B] [--flips]

N images of 500x375 (by default as many as VOC's train_aug) with VOC's 1.47 tags each, 20 classes, raw maps of 28x37
(the paper's size). Prints milliseconds an image from the network's output to the epoch's maps in files. The baseline
keeps one grey PNG a map in a temporary folder, as the public code does: it reads the file, takes the maximum with the
new attention and writes the file back. Both receive the same maps, and their stored maps must be equal at the end. The
accumulator's file is flushed to the disk, like every published file; the PNG files are not.

In the first epoch the PNG files are new and still in the page cache. From the second epoch on they are rewritten as in
a training, which costs more on file systems that flush a file that is truncated and rewritten (ext4, XFS).
``TMPDIR=/dev/shm`` keeps all files in memory.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Accumulate
from pipeline.data.geometry import Window
from pipeline.data.index import Image
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.stores.raster import RasterStore

CLASSES, ROWS, COLUMNS = 20, 28, 37
SETTINGS = Accumulate(gate="none", skip_epochs=0, cells=ROWS)
EPOCHS = 2


class Step(NamedTuple):
    """The output of a training step that is accumulated."""

    images: list[Image]
    maps: Tensor  # B x K x h x w
    logits: Tensor
    tags: Tensor  # B x K
    windows: list[Window]


def images_of(count: int) -> list[Image]:
    """``count`` images with one or two tags each, 1.47 on average."""
    random = np.random.default_rng(0)
    images = []
    for number in range(count):
        tags = random.choice(CLASSES, 1 + int(random.random() < 0.47), replace=False) + 1
        images.append(Image(f"{number:06d}", Path(), 375, 500, tuple(sorted(tags.tolist())), None, None))
    return images


def steps(images: list[Image], size: int, flips: bool, epoch: int) -> Iterator[Step]:
    """An epoch's batches of ``size`` images. The maps are smooth and the same in every batch."""
    coarse = torch.randn(size, CLASSES, 7, 9, generator=torch.Generator().manual_seed(epoch))
    maps = functional.interpolate(coarse, size=(ROWS, COLUMNS), mode="bicubic", align_corners=False)
    for start in range(0, len(images), size):
        part = images[start : start + size]
        tags = torch.zeros(len(part), CLASSES)
        for row, image in enumerate(part):
            tags[row, [tag - 1 for tag in image.tags]] = 1
        windows = [Window(flip=flips and number % 2 == 1) for number in range(len(part))]
        yield Step(part, maps[: len(part)], maps[: len(part)].mean((2, 3)), tags, windows)


def ours(accumulator: AttentionAccumulator, epoch: list[Step], path: Path) -> tuple[float, float]:
    """Seconds that the accumulator takes for the updates and for the dump."""
    batches = [(step.maps, step.logits, step.tags, [image.id for image in step.images], step.windows) for step in epoch]
    start = time.perf_counter()
    for batch in batches:
        accumulator.update(*batch, 0)
    updated = time.perf_counter()
    accumulator.dump(path)
    return updated - start, time.perf_counter() - updated


def png_files(folder: Path, epoch: list[Step]) -> float:
    """Seconds that the baseline takes to read, update and write its PNG files."""
    start = time.perf_counter()
    for step in epoch:
        for image, values, window in zip(step.images, step.maps.numpy(), step.windows, strict=True):
            for tag in image.tags:
                positive = np.maximum(values[tag - 1], 0)
                levels = np.rint(positive / positive.max() * 255).astype(np.uint8)
                name = str(folder / f"{image.id}_{tag}.png")
                old = cv2.imread(name, cv2.IMREAD_GRAYSCALE)
                assert old is not None
                cv2.imwrite(name, np.maximum(old, levels[:, ::-1] if window.flip else levels))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_582)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--flips", action="store_true", help="flip every second image of a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the baseline uses one thread too
    images = images_of(options.images)
    accumulator = AttentionAccumulator(images, SETTINGS, 2)
    maps = sum(len(image.tags) for image in images)
    print(f"{len(images)} images, {maps} maps of {ROWS}x{COLUMNS}, batches of {options.batch_size}, one thread")
    print("ms an image    update    dump   PNG files   ratio   (updates alone)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in images:
            for tag in image.tags:
                cv2.imwrite(str(folder / f"{image.id}_{tag}.png"), np.zeros((ROWS, COLUMNS), np.uint8))
        for number in range(1, EPOCHS + 1):
            epoch = list(steps(images, options.batch_size, options.flips, number))
            seconds = (*ours(accumulator, epoch, folder / f"{number}.h5"), png_files(folder, epoch))
            update, dump, files = (1e3 / len(images) * part for part in seconds)
            ratios = f"{files / (update + dump):8.1f}{files / update:10.1f}"
            print(f"epoch {number}      {update:9.4f}{dump:8.4f}{files:12.4f}{ratios}", flush=True)
        check(folder, RasterStore(folder / f"{EPOCHS}.h5"), images)


def check(folder: Path, store: RasterStore, images: list[Image]) -> None:
    """Assert for every tenth image that both stored maps are equal."""
    for image in images[::10]:
        maps = store.maps(image.id)
        assert tuple(maps) == image.tags
        for tag, values in maps.items():
            expected = cv2.imread(str(folder / f"{image.id}_{tag}.png"), cv2.IMREAD_GRAYSCALE)
            assert expected is not None
            assert np.array_equal(values, expected), "the two maps differ"


if __name__ == "__main__":
    main()
