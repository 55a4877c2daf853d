"""The cost of discriminative region suppression: time of a training step, and disk space of the maps.

    python -m benchmarks.suppression [--backbone vgg16] [--length 320] [--batch-size 5] [--steps N] [--precision auto]

Steps of the plain network, of the network with learnable controllers in every layer and of the network with delta 0.55
alternate, so that other load on the machine affects all three alike; the program prints the median of each. It then
writes maps of 1,000 images with VOC's 1.47 tags at 320 x 320 as a localization store and compares their size with
20 x 320 x 320 bytes an image.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.steps import stepper
from pipeline.config.schema import Backbone, Classifier, Suppression, Training
from pipeline.stores.raster import RasterWriter
from pipeline.training import models
from pipeline.training.settings import prepare

CLASSES, SIDE, IMAGES = 20, 320, 1000


def classifier(
    options: argparse.Namespace, suppression: Suppression | None, device: torch.device
) -> Callable[[], None]:
    """One optimizer step of a classifier on fixed images and tags."""
    torch.manual_seed(0)
    training = Training(options.batch_size, 1e-3, epochs=1, nesterov=True, precision=options.precision)
    network = models.build(Classifier(Backbone(options.backbone), training, suppression=suppression), CLASSES)

    def loss(images: Tensor, tags: Tensor) -> Tensor:
        return network.loss(network(images), tags)

    return stepper(network, training, options.length, CLASSES, loss, device)


def stored_bytes() -> int:
    """Bytes of a store of smooth random maps for one or two tags an image."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.h5"
        with RasterWriter(path, "localization") as writer:
            for number in range(IMAGES):
                for tag in range(1, 2 + int(random.random() < 0.47)):
                    coarse = torch.from_numpy(random.standard_normal((1, 1, 40, 40)))
                    maps = functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear").relu()[0, 0]
                    writer.append(f"{number:06d}", (maps / maps.max() * 255).round().numpy().astype(np.uint8), tag)
        return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vgg16")
    parser.add_argument("--length", type=int, default=320, help="side of the square input in pixels")
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = prepare(options.device, len(os.sched_getaffinity(0)))
    kinds = {"plain": None, "learnable": Suppression(), "delta 0.55": Suppression(0.55)}
    steps = {name: classifier(options, suppression, device) for name, suppression in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn allocates memory
                seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"])
    print(f"{options.backbone} at {options.length}, batch {options.batch_size}, {options.precision}, {device}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<12} {median * 1e3:9.1f} ms a step  {100 * (median / plain - 1):+6.1f} %")
    stored, dense = stored_bytes(), IMAGES * CLASSES * SIDE**2
    print(f"maps of {IMAGES} images: {stored / 1e6:.1f} MB, dense {dense / 1e6:.1f} MB: {dense / stored:.1f} times")


if __name__ == "__main__":
    main()
