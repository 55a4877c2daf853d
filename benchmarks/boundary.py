"""The cost of AGEN's boundary loss: a training step with it and without.

    python -m benchmarks.boundary [--workers N] [--side S] [--batch-size B] [--steps N] [--device D] ...

The dense CRF runs on a grid of 41 x 41 cells over background and 20 classes, in worker processes, while the
classification branch, the attention guided modules and their losses are computed. Steps without the loss, with the CRF
in N workers and with the CRF in the main process alternate; the program prints the median of each. The default
backbones and sizes are light; the paper's are --classification vgg16 --segmentation resnet38 --shared conv2_2 b2
--side 321 --batch-size 15.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.steps import stepper
from pipeline.config.registry import ONE_STEP, Choice
from pipeline.config.schema import Backbone, OneStep, Training
from pipeline.methods.agen import Agen
from pipeline.methods.one_step import Mapper
from pipeline.stores.blocks import parallel
from pipeline.training.settings import prepare

CLASSES = 20


def one_step(options: argparse.Namespace, weight: float, mapper: Mapper, device: torch.device) -> Callable[[], None]:
    """One optimizer step of AGEN on fixed images and tags, with ``weight`` on the boundary loss."""
    torch.manual_seed(0)
    training = Training(options.batch_size, 1e-3, epochs=1, precision=options.precision)
    backbones = (Backbone(options.classification), Backbone(options.segmentation))
    named = dict(zip(("classification", "segmentation"), backbones, strict=True))
    choice = Choice(ONE_STEP, "agen", {"shared": options.shared, "boundary_weight": weight})
    network = Agen(OneStep(choice, named, training), CLASSES)

    def loss(images: Tensor, tags: Tensor) -> Tensor:
        return torch.stack(list(network.losses(images, tags, 0, mapper).values())).sum()

    return stepper(network, training, options.side, CLASSES, loss, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classification", default="mobilenet_v2", metavar="BACKBONE")
    parser.add_argument("--segmentation", default="mobilenet_v2", metavar="BACKBONE")
    parser.add_argument("--shared", nargs=2, default=["stage2", "stage2"], metavar="TAP")
    parser.add_argument("--side", type=int, default=161)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = prepare(options.device, options.threads)
    with parallel("boundary", options.workers, chunk=1) as mapper:
        steps = {
            "without": one_step(options, 0.0, map, device),
            f"{options.workers} workers": one_step(options, 1.0, mapper, device),
            "in process": one_step(options, 1.0, map, device),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.steps + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:  # the first turn allocates memory and starts the workers
                    seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["without"])
    print(
        f"{options.classification} and {options.segmentation} at {options.side}, batch {options.batch_size}, {device},"
        f" {options.threads} threads, {options.precision}, median of {options.steps} steps"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<12} {median * 1e3:9.1f} ms a step  {100 * (median / plain - 1):+6.1f} %")


if __name__ == "__main__":
    main()
