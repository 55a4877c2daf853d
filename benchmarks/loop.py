"""The training loop from files to weights, against its steps alone: milliseconds a step, share of loading.

    python -m benchmarks.loop [--device cpu] [--backbone mobilenet_v2] [--side 257] [--batch 8] [--workers 1] ...
                              [--json FILE]

A classifier trains on generated photos of VOC's sizes. Its steps alone are the same optimizer steps on a batch that
lies on the device, without attention accumulation. Epoch 1 decodes the photos, later epochs find them in memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.photos import CLASSES, JITTER, Photos, photos
from pipeline.config.schema import Accumulate, Augmentation, Backbone, Classifier, Head, Training
from pipeline.runtime import Runtime
from pipeline.training import models
from pipeline.training.loop import Loop
from pipeline.training.settings import autocast, build_optimizer, parameter_groups, prepare
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.classifier import ClassifierTask


class Epoch(NamedTuple):
    """One epoch of a training."""

    seconds: float
    loading: float  # seconds in which the loop waited for batches
    steps: int


class Timed(Loop):
    """A loop that records its epochs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.timed: list[Epoch] = []

    def _end_epoch(self, seconds: float) -> None:
        waited = self.waited
        super()._end_epoch(seconds)
        self.timed.append(Epoch(seconds, waited, self.steps_per_epoch))


def block_of(backbone: str, training: Training, augmentation: Augmentation) -> Classifier:
    stride: Any = 16 if backbone == "mobilenet_v2" else 8
    return Classifier(
        Backbone(backbone, output_stride=stride, frozen_batch_norm=True),
        training,
        head=Head(convs=0),
        augmentation=augmentation,
        accumulate=Accumulate(skip_epochs=0),
    )


def end_to_end(
    source: Photos, block: Classifier, device: torch.device, workers: int, cache: float | None
) -> list[Epoch]:
    """Train the classifier with attention accumulation; return its epochs."""
    torch.manual_seed(0)
    network: Any = models.build(block, CLASSES)
    job = Job("classifier", "benchmark", {}, {}, {}, block)
    work = Work(job, {}, {}, Runtime(), "", Path("checkpoint"))
    epochs = block.training.epochs or 1
    task = ClassifierTask(network, source.images, epochs, 0, work)
    runtime = Runtime(workers=workers, checkpoint_every=1e9, cache=cache)
    loop = Timed(task, source.dataset(block.augmentation), block.training, device, runtime=runtime, label="benchmark")
    with redirect_stdout(StringIO()):
        loop.run()
    return loop.timed


def step_alone(
    block: Classifier, side: int, device: torch.device, steps: int, layout: torch.memory_format = torch.channels_last
) -> float:
    """Median seconds of an optimizer step on a batch of square images that lies on the device."""
    torch.manual_seed(0)
    training = block.training
    network: Any = models.build(block, CLASSES)
    network.to(device=device, memory_format=layout)
    network.train()
    optimizer = build_optimizer(parameter_groups(network, network.new_layers(), training), training)
    images = torch.randn(training.batch_size, 3, side, side, device=device).contiguous(memory_format=layout)
    tags = torch.zeros(training.batch_size, CLASSES, device=device)
    tags[:, 0] = 1
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        for _ in range(training.accumulation):
            with autocast(device, training.precision):
                loss = network.training_step(images, tags, 0).loss
            (loss / training.accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def report(epochs: list[Epoch], alone: float, images: int) -> None:
    """Print a line for each epoch."""
    for number, epoch in enumerate(epochs, 1):
        step = epoch.seconds / epoch.steps
        print(
            f"epoch {number}: {1e3 * step:8.2f} ms a step, {images / epoch.seconds:7.1f} images/s, "
            f"{epoch.loading / epoch.seconds:6.1%} loading; the step alone is {alone / step:6.1%} of it",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--side", type=int, default=257)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps alone that are timed")
    parser.add_argument("--cache", type=float, metavar="GB")
    parser.add_argument("--json", type=Path, help="file for the images per second of each epoch")
    options = parser.parse_args()
    device = prepare(options.device, options.threads)
    training = Training(
        options.batch, 1e-3, epochs=options.epochs, accumulation=options.accumulation, precision=options.precision
    )
    augmentation = Augmentation(side="square", length=(options.side, options.side), jitter=JITTER)
    block = block_of(options.backbone, training, augmentation)
    alone = step_alone(block, options.side, device, options.steps)
    print(f"{options.backbone}, {options.side} px, {options.batch} x {options.accumulation}, {options.workers} workers")
    print(f"the step alone: {1e3 * alone:8.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        source = photos(Path(folder), options.images)
        epochs = end_to_end(source, block, device, options.workers, options.cache)
    report(epochs, alone, options.images)
    if options.json:
        options.json.write_text(json.dumps([options.images / epoch.seconds for epoch in epochs]))


if __name__ == "__main__":
    main()
