"""A training step of a classifier: fp32 in contiguous memory against bf16 in channels-last, as in the training loop.

    python -m benchmarks.training [NAME:SIDE:BATCH ...] [--steps N] [--threads N]

NAME is a backbone at output stride 8 with the class-aware head; SIDE is the side of the square images in pixels. Prints
milliseconds an image of one step (forward, loss, backward, optimizer): the median of N steps after one that is not
counted. The default is vgg16:224:2 and mobilenet_v2:257:2.
"""

import argparse
import os
import statistics
import time

import torch

from pipeline.config.schema import Backbone, Classifier, Head, Training
from pipeline.training import models
from pipeline.training.settings import autocast, build_optimizer, has_bf16, parameter_groups, prepare

CLASSES = 20
CASES = ["vgg16:224:2", "mobilenet_v2:257:2"]


def milliseconds(name: str, side: int, batch: int, steps: int, fast: bool) -> float:
    """Median milliseconds an image of one training step."""
    torch.manual_seed(0)
    training = Training(batch, 1e-3, precision="bf16" if fast else "fp32")
    network = models.build(Classifier(Backbone(name), training, head=Head()), CLASSES)  # type: ignore[arg-type]
    layout = torch.channels_last if fast else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer(parameter_groups(network, network.new_layers(), training), training)
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=layout)
    tags = torch.zeros(batch, CLASSES).scatter_(1, torch.arange(batch)[:, None] % CLASSES, 1.0)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with autocast(images.device, training.precision):
            loss = network.loss(network(images), tags)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    device = prepare("cpu", options.threads)
    hardware = "in hardware" if has_bf16(device) else "emulated: this processor does not support it"
    print(f"{options.threads} threads, bf16 {hardware}; milliseconds an image, median of {options.steps} steps")
    for case in options.cases:
        name, side, batch = case.split(":")
        plain, fast = (milliseconds(name, int(side), int(batch), options.steps, bf16) for bf16 in (False, True))
        print(f"{case:<22} fp32 contiguous {plain:8.1f}   bf16 channels_last {fast:8.1f}   ratio {plain / fast:5.2f}")


if __name__ == "__main__":
    main()
