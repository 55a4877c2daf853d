"""Peak memory and time of one optimizer step of DeepLab-v2 with several input scales and accumulated gradients.

    python -m benchmarks.deeplab_memory [--backbone NAME] [--crop SIDE] [--batch-size B] [--accumulation N] ...

The defaults follow the papers' training: ResNet-101 with frozen batch norm at output stride 8, crops of 321, the scales
1, 0.75 and 0.5 and their maximum, two batches of 5 images a step. It runs on the CPU with random inputs. Prints the
process's peak resident set before and after the step, and the step's seconds.
"""

import argparse
import os
import resource
import time

import torch

from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.config.schema import Backbone, Segmentation, Training
from pipeline.data.geometry import Window
from pipeline.data.loading import Batch
from pipeline.networks.segmentation import build_segmentation
from pipeline.training.settings import autocast, build_optimizer, parameter_groups, prepare
from stages.segmentation import SegmentationTask

CLASSES = 20


def settings_of(options: argparse.Namespace) -> Segmentation:
    training = Training(
        options.batch_size,
        2.5e-4,
        iterations=1,
        accumulation=options.accumulation,
        decay_biases=False,
        schedule="poly",
        precision=options.precision,
    )
    return Segmentation(
        "ground_truth",
        Choice(SEGMENTATIONS, "deeplab_v2", {"rates": [6, 12, 18, 24], "extra_scales": options.extra_scales}),
        Backbone(options.backbone, frozen_batch_norm=True),
        training,
        loss_size="output",
    )


def random_batch(images: int, side: int) -> Batch:
    return Batch(
        torch.randn(images, 3, side, side).contiguous(memory_format=torch.channels_last),
        torch.ones(images, CLASSES),
        [str(number) for number in range(images)],
        [Window()] * images,
        torch.randint(0, CLASSES + 1, (images, side, side)),
    )


def megabytes() -> float:
    """This process's peak resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--crop", type=int, default=321, metavar="SIDE")
    parser.add_argument("--batch-size", type=int, default=5, metavar="B")
    parser.add_argument("--accumulation", type=int, default=2, metavar="N", help="batches a step")
    parser.add_argument("--extra-scales", type=float, nargs="*", default=[0.75, 0.5], metavar="SCALE")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    device = prepare("cpu", options.threads)
    torch.manual_seed(0)
    settings = settings_of(options)
    network = build_segmentation(settings, CLASSES)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = SegmentationTask(network.train(), settings)
    training = settings.training
    optimizer = build_optimizer(parameter_groups(network, task.new_layers(), training), training)
    before, start = megabytes(), time.perf_counter()
    for _ in range(training.accumulation):
        batch = random_batch(training.batch_size, options.crop)
        with autocast(device, training.precision):
            loss = task.loss(batch, 0)
        (loss / training.accumulation).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    seconds = time.perf_counter() - start
    scales = ", ".join(f"{scale:g}" for scale in (1.0, *options.extra_scales))
    print(
        f"deeplab_v2 on {options.backbone}, {options.crop} px, scales {scales}, batch {training.batch_size}"
        f" x {training.accumulation}, {options.threads} threads: peak {megabytes():.0f} MB"
        f" ({before:.0f} MB before the step), {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
