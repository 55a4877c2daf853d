"""One epoch of online attention accumulation: this project's against a PNG read, maximum and write per map.

    python -m benchmarks.accumulator [--images N] [--batch-size B]

N images of 500x375 with VOC's 1.47 tags each, 20 classes, raw maps of 28x37 (the paper's size). Milliseconds an image
from the network's output to the epoch's maps on disk; the other side keeps one grey PNG a map in a temporary folder,
as the public code does: it reads it, takes the maximum with the new attention, and writes it back.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.geometry import Window
from pipeline.data.index import Image
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.schema import Accumulate
from pipeline.stores.raster import RasterStore

CLASSES, ROWS, COLUMNS = 20, 28, 37
SETTINGS = Accumulate(gate="none", skip_epochs=0, cells=ROWS)


def images_of(count: int) -> list[Image]:
    """One or two tags each, 1.47 in the mean."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        tags = random.choice(CLASSES, 1 + int(random.random() < 0.47), replace=False) + 1
        found.append(Image(f"{number:06d}", Path(), 375, 500, tuple(sorted(tags.tolist())), None, None))
    return found


def batches(images: list[Image], size: int, flips: bool) -> Iterator[tuple[list[Image], Tensor, Tensor, list[Window]]]:
    """Images, raw maps B x K x h x w, tags B x K, and windows; the maps are smooth, and repeat from batch to batch."""
    coarse = torch.randn(size, CLASSES, 7, 9, generator=torch.Generator().manual_seed(0))
    maps = functional.interpolate(coarse, size=(ROWS, COLUMNS), mode="bicubic", align_corners=False)
    for start in range(0, len(images), size):
        part = images[start : start + size]
        tags = torch.zeros(len(part), CLASSES)
        for row, image in enumerate(part):
            tags[row, [tag - 1 for tag in image.tags]] = 1
        windows = [Window(flip=flips and number % 2 == 1) for number in range(len(part))]
        yield part, maps[: len(part)], tags, windows


def ours(images: list[Image], size: int, flips: bool, path: Path) -> tuple[float, float]:
    """Seconds of the updates, and of the dump."""
    accumulator = AttentionAccumulator(images, SETTINGS, 2)
    prepared = [
        (maps, maps.mean((2, 3)), tags, [image.id for image in part], windows)
        for part, maps, tags, windows in batches(images, size, flips)
    ]
    start = time.perf_counter()
    for batch in prepared:
        accumulator.update(*batch, 0)
    updated = time.perf_counter()
    accumulator.dump(path)
    return updated - start, time.perf_counter() - updated


def png_files(images: list[Image], size: int, folder: Path) -> float:
    """Seconds of reading, maximum and writing; every file is there already, as from the second epoch on."""
    for image in images:
        for tag in image.tags:
            cv2.imwrite(str(folder / f"{image.id}_{tag}.png"), np.zeros((ROWS, COLUMNS), np.uint8))
    prepared = list(batches(images, size, flips=False))
    start = time.perf_counter()
    for part, maps, _, _ in prepared:
        for image, values in zip(part, maps.numpy(), strict=True):
            for tag in image.tags:
                positive = np.maximum(values[tag - 1], 0)
                levels = np.rint(positive / positive.max() * 255).astype(np.uint8)
                name = str(folder / f"{image.id}_{tag}.png")
                old = cv2.imread(name, cv2.IMREAD_GRAYSCALE)
                assert old is not None
                cv2.imwrite(name, np.maximum(old, levels))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--flips", action="store_true", help="flip every second image of a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the other side
    images = images_of(options.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        update, dump = ours(images, options.batch_size, options.flips, folder / "maps.h5")
        files = png_files(images, options.batch_size, folder)
        if not options.flips:
            store = RasterStore(folder / "maps.h5")
            for image in images[:50]:
                for tag, values in store.maps(image.id).items():
                    theirs = cv2.imread(str(folder / f"{image.id}_{tag}.png"), cv2.IMREAD_GRAYSCALE)
                    assert theirs is not None
                    assert np.array_equal(values, theirs), "the two maps differ"
    each = 1e3 / len(images)
    maps = sum(len(image.tags) for image in images)
    print(
        f"{len(images)} images, {maps} maps of {ROWS}x{COLUMNS}, batches of {options.batch_size}, one thread, one run"
    )
    print(f"accumulator      {update * each:7.3f} ms an image to update, {dump * each:7.3f} to dump")
    print(f"PNG a map        {files * each:7.3f} ms an image")
    print(f"ratio            {files / (update + dump):7.1f} (updates alone: {files / update:.1f})")


if __name__ == "__main__":
    main()
