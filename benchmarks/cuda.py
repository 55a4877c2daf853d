"""All measurements on a CUDA card, in one run of at most 15 minutes.

    python -m benchmarks.cuda [--workers 14] [--images 800] [--parts PART ...]
    python -m benchmarks.cuda --device cpu --small        # tries the program itself, not a measurement

``--parts`` chooses: training (1 to 4), inference (5), shared (6), tests (7).

1. Steps on a batch that lies on the card: fp32 contiguous (NCHW), bf16 channels-last, the same ``--deterministic``.
2. End to end: ResNet-50 at 321 px, batch 16, from JPEG files, with attention accumulation and colour jitter. The goals
   are 90 % of the step alone, and twice the fp32 contiguous step.
3. OAA's five batches of one image: merged where shapes agree, and one by one.
4. The parts of a step that are not the network: jitter and normalisation, occlusion masks, refinement targets, maps to
   the accumulator.
5. Localization and prediction, with convolutions padded to few shapes and without (``benchmarks.inference``).
6. Trainings of MobileNetV2 that share the card, each with two cores.
7. The CUDA tests, as far as time is left. ``tests/test_devices.py`` comes last, since it runs every kind of job several
   times, each in a process of its own.

Each part prints its figures and goals once it is done. The run ends with all of them in one table. Without a card it
says so and ends.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.loop import block_of, end_to_end, report, step_alone
from benchmarks.photos import CLASSES, JITTER, Photos, photos
from pipeline import cards
from pipeline.config.schema import Accumulate, AttentionDrop, Augmentation, Training
from pipeline.data.collation import LoadedBatch
from pipeline.data.loader import LoadingPlan, load
from pipeline.errors import PipelineError
from pipeline.methods.attention_drop import AttentionDropLayer
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.training.loop import Loop
from pipeline.training.settings import describe, prepare, uses_bf16
from stages.refinement import attention

LIMIT = 900  # seconds of all measurements
DEVICES = "tests/test_devices.py"
PARTS = ("training", "inference", "shared", "tests")
# Images/s of inference at commit 812d9bf (docs/RESULTS.md, 'Does it run on CUDA?'). The goal is ten times as many.
BEFORE = {"prediction, one view": 3.0, "maps, four views of 257 x 257": 50.0}
# Images/s of twelve trainings side by side there, for each of the 16 cores
BEFORE_SHARED = 75.0

Rows = list[tuple[str, str, str]]  # what, the figure, its goal


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median milliseconds of a call, with the device's work."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def alone(device: torch.device, threads: int, side: int, batch: int, steps: int) -> dict[str, float]:
    """Seconds of the step alone, by arithmetic."""
    augmentation = Augmentation(side="square", length=(side, side), jitter=JITTER)
    found = {}
    for name, precision, layout, deterministic in (
        ("fp32 contiguous", "fp32", torch.contiguous_format, False),
        ("bf16 channels-last", "bf16", torch.channels_last, False),
        ("bf16 channels-last, --deterministic", "bf16", torch.channels_last, True),
    ):
        prepare(str(device), threads, deterministic)
        block = block_of("resnet50", Training(batch, 1e-3, epochs=1, precision=precision), augmentation)  # type: ignore[arg-type]
        found[name] = step_alone(block, side, device, steps, layout)
        print(f"  {name:<40} {1e3 * found[name]:8.2f} ms a step  {batch / found[name]:8.1f} images/s", flush=True)
    prepare(str(device), threads)
    return found


def whole(source: Photos, device: torch.device, workers: int, side: int, batch: int, steps: dict[str, float]) -> Rows:
    """End to end, and the two goals."""
    training = Training(batch, 1e-3, epochs=4, precision="bf16")
    block = block_of("resnet50", training, Augmentation(side="square", length=(side, side), jitter=JITTER))
    epochs = end_to_end(source, block, device, workers, None)
    report(epochs, steps["bf16 channels-last"], len(source.images))
    best = min(epochs[1:], key=lambda epoch: epoch.seconds / epoch.steps)
    step = best.seconds / best.steps
    return [
        ("step end to end, images/s", f"{batch / step:.1f}", "-"),
        ("... speed of the step alone reached", f"{steps['bf16 channels-last'] / step:.1%}", "at least 90 %"),
        ("... against the fp32 contiguous step", f"{steps['fp32 contiguous'] / step:.2f} x", "at least 2 x"),
        ("... share that waits for data", f"{best.loading / best.seconds:.1%}", "-"),
    ]


def merged(source: Photos, device: torch.device, workers: int, side: int) -> Rows:
    """OAA's step of five batches of one image."""
    training = Training(1, 1e-3, epochs=3, accumulation=5, precision="bf16")
    block = block_of("vgg16", training, Augmentation(side="short", length=(side, side), jitter=JITTER))
    steps = []
    for name, merges in (("merged", True), ("one by one", False)):
        with mock.patch.object(Loop, "_merges", merges):
            last = end_to_end(source, block, device, workers, None)[-1]
        print(
            f"  {name:<12} {1e3 * last.seconds / last.steps:8.2f} ms a step, {last.loading / last.seconds:6.1%} loading"
        )
        steps.append(last.seconds / last.steps)
    return [("OAA's 1 x 5 merged, against one by one", f"{steps[1] / steps[0]:.2f} x", "-")]


def parts(source: Photos, device: torch.device, side: int, batch: int) -> None:
    """Milliseconds of the parts of a step besides the network."""
    augmentation = Augmentation(side="square", length=(side, side), jitter=JITTER)
    dataset = source.dataset(augmentation, maps=True)
    loaded: LoadedBatch = next(load(dataset, batch, [0], 0, LoadingPlan(gpu=device.type == "cuda")))
    moved = loaded.to(device)
    images = source.images[:batch]
    accumulator = AttentionAccumulator(source.images, Accumulate(gate="none", skip_epochs=0), 2, keep_last=True)
    cells = max(1, side // 8)
    maps = torch.randn(batch, CLASSES, cells, cells, device=device)
    tags = accumulator.tags(moved.ids, CLASSES)
    arguments = (maps, maps.mean((2, 3)), tags, moved.ids, moved.windows, 0)
    accumulator.update(*arguments)
    layer = AttentionDropLayer(AttentionDrop(beta=1.0), accumulator, 0)
    for name, function in {
        "to the device, jitter, normalise": lambda: loaded.to(device),
        "occlusion masks": lambda: layer.mask(moved.ids, tags, moved.windows, (side, side), 0, device),
        "refinement targets": lambda: attention(moved, (side, side)),
        "maps to the accumulator, fusion": lambda: accumulator.update(*arguments),
    }.items():
        print(f"  {name:<40} {milliseconds(function, device):8.3f} ms a batch of {len(images)}", flush=True)


def hand_over(device: torch.device) -> None:
    """Give the slots and the free memory of the card to the processes that this one starts and waits for."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    cards.release()


def inference(device: torch.device, small: bool, folder: Path) -> Rows:
    """Run ``benchmarks.inference`` in processes of their own, since cuDNN keeps its plans in a process."""
    hand_over(device)
    rates: list[dict[str, Any]] = []
    for padding in ([], ["--unpadded"]):
        print(f"inference, {'each shape its own plan' if padding else 'few shapes'}", flush=True)
        file = folder / f"inference{len(rates)}.json"
        options = ["--device", str(device), "--json", str(file), *(["--images", "2"] if small else []), *padding]
        subprocess.run([sys.executable, "-m", "benchmarks.inference", *options], check=True)
        rates.append(json.loads(file.read_text()))
    padded, unpadded = rates
    return [
        (
            f"{case}, images/s (with each shape's own plan)",
            f"{rate:.1f} ({unpadded[case]:.1f})",
            f"at least {10 * BEFORE[case]:.0f}" if case in BEFORE else "-",
        )
        for case, rate in padded.items()
    ]


def shared(device: torch.device, small: bool, folder: Path) -> Rows:
    """Trainings side by side in processes of their own, by the images per second of their last epochs together."""
    hand_over(device)
    cores = len(os.sched_getaffinity(0))
    rows: Rows = []
    for count in sorted({1, 2} if small else {1, max(1, cores // 4), max(1, cores // 2)}):
        files = [folder / f"shared{count}-{number}.json" for number in range(count)]
        options = ["--device", str(device), "--threads", "1", "--workers", "1"]
        options += ["--side", "64", "--images", "4", "--epochs", "2"] if small else ["--images", "400", "--epochs", "8"]
        command = [sys.executable, "-m", "benchmarks.loop", *options, "--json"]
        started = [subprocess.Popen([*command, str(file)], stdout=subprocess.DEVNULL) for file in files]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"{' '.join(command)}: failed")
        rate = sum(json.loads(file.read_text())[-1] for file in files)
        print(f"  {count} at a time: {rate:.1f} images/s", flush=True)
        goal = f"more than {BEFORE_SHARED * cores:.0f}" if count == max(1, cores // 2) else "-"
        rows.append((f"MobileNetV2, trainings side by side: {count}, images/s", f"{rate:.1f}", goal))
    return rows


def tests(device: torch.device, deadline: float, environment: dict[str, str]) -> Iterator[Rows]:
    """Run the CUDA tests until ``deadline`` at most, in an ``environment`` that shows them all GPUs."""
    hand_over(device)
    for name, selection in (("all but test_devices", ["--ignore", DEVICES]), ("test_devices", [DEVICES])):
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-n0", *selection]
        print(" ".join(command), flush=True)
        seconds = max(1.0, deadline - time.monotonic())
        try:
            status = subprocess.run(command, env=environment, timeout=seconds)
            result = "pass" if status.returncode == 0 else f"exit status {status.returncode}"
        except subprocess.TimeoutExpired:
            result = f"not done in {seconds:.0f} s"
        yield [(f"CUDA tests, {name}", result, "pass")]


def table(rows: Rows) -> str:
    """Lay out all figures beside their goals, as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [("what", "measured", "goal"), ("---", "---", "---"), *rows])


def measurements(
    options: argparse.Namespace, device: torch.device, deadline: float, environment: dict[str, str]
) -> Iterator[Rows]:
    """Measure the parts that were chosen."""
    with tempfile.TemporaryDirectory() as folder:
        if "training" in options.parts:
            yield from training(options, device, Path(folder))
        if "inference" in options.parts:
            yield inference(device, options.small, Path(folder))
        if "shared" in options.parts:
            print("trainings side by side", flush=True)
            yield shared(device, options.small, Path(folder))
    if "tests" in options.parts and device.type == "cuda":
        yield from tests(device, deadline, environment)


def training(options: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[Rows]:
    """Measure steps of a training, whole trainings, and the parts of a step besides the network."""
    source = photos(folder, options.images)
    print(f"the step alone: ResNet-50, {options.side} px, batch {options.batch}")
    steps = alone(device, options.threads, options.side, options.batch, options.steps)
    strict = steps["bf16 channels-last, --deterministic"] / steps["bf16 channels-last"]
    yield [("step with --deterministic, against without", f"{strict:.2f} x the time", "-")]
    print(f"end to end, {options.workers} workers, {options.images} photos")
    yield whole(source, device, options.workers, options.side, options.batch, steps)
    print(f"OAA, VGG-16, short side {min(224, options.side)}, 1 x 5")
    few = source._replace(images=source.images[: max(5, len(source.images) // 4)])
    yield merged(few, device, options.workers, min(224, options.side))
    print("parts of a step besides the network")
    parts(source, device, options.side, options.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=min(14, max(0, len(os.sched_getaffinity(0)) - 2)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--side", type=int, default=321)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="a few small steps, to try the program")
    options = parser.parse_args()
    if options.small:
        options = argparse.Namespace(**{**vars(options), "images": 6, "side": 64, "batch": 2, "steps": 1, "workers": 1})
    environment = dict(os.environ)
    try:
        device = prepare(options.device, options.threads)  # before CUDA starts, which it selects a card for
    except PipelineError as error:
        print(f"nothing measured: {error}")
        sys.exit(0)
    start = time.monotonic()
    print(f"{describe(device, uses_bf16(device, 'auto'))}, torch {torch.__version__}, {os.cpu_count()} cores")
    rows: Rows = []
    for found in measurements(options, device, start + LIMIT, environment):
        print(table(found), flush=True)
        rows += found
    if device.type == "cuda" and "training" in options.parts:
        rows.append(("peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB", "-"))
    rows.append(("all measurements", f"{time.monotonic() - start:.0f} s", f"at most {LIMIT}"))
    print(table(rows))


if __name__ == "__main__":
    main()
