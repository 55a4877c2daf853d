"""Milliseconds that a decoded image takes to become a training input, by step of the augmentation.

    python -m benchmarks.loading [--height 750] [--width 562] [--crop 321] [--repeats 50]

The pipeline crops first and then normalises by a table of levels. The baseline normalises the whole image by the
formula in float32 and then crops; the results are equal byte for byte. The default size is that of a 375 x 281 image at
scale 2, the default crop is DeepLab's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Augmentation
from pipeline.data.loading import MEAN, STD, augment, normalise


def formula(rgb: NDArray[np.uint8]) -> Tensor:
    """Normalise H x W x 3 uint8 to 3 x H x W float32 by the formula."""
    return torch.from_numpy(((rgb.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1).copy())


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=750)
    parser.add_argument("--width", type=int, default=562)
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    rgb = np.random.default_rng(0).integers(0, 256, (options.height, options.width, 3)).astype(np.uint8)
    part = rgb[: options.crop, : options.crop]
    assert torch.equal(normalise(part), formula(rgb)[:, : options.crop, : options.crop])
    settings = Augmentation(crop=options.crop)
    jitter = (0.3, 0.3, 0.3, 0.1)
    cases: dict[str, Callable[[], object]] = {
        "normalise by formula, crop": lambda: formula(rgb)[:, : options.crop, : options.crop].clone(),
        "crop, normalise by formula": lambda: formula(part),
        "crop, normalise by table": lambda: normalise(part),
        "augment": lambda: augment(rgb, None, settings, np.random.default_rng(0)),
        "augment with jitter": lambda: augment(rgb, None, replace(settings, jitter=jitter), np.random.default_rng(0)),
        "augment with jitter, no crop": lambda: augment(
            rgb, None, Augmentation(jitter=jitter), np.random.default_rng(0)
        ),
    }
    print(f"{options.height} x {options.width} to {options.crop} x {options.crop}")
    for name, function in cases.items():
        print(f"{name:<30} {milliseconds(function, options.repeats):8.2f} ms")


if __name__ == "__main__":
    main()
