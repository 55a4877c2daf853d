"""EDAM's collaborative attention, fused over all classes, against a loop over blocks that store T x T scores.

    python -m benchmarks.collaboration [--size 46] [--classes 20] [--images 2] [--repeats 3] [--threads 1] ...

Each step is a forward and a backward pass of one group of images, in fp32 and in the default precision of trainings
(bf16 if the processor supports it). The loop follows EDAM's public code, which uses fp32 and dropout on the attention.
Both have the same weights, and their outputs are first compared at a small size. They then alternate; each turn is two
steps in its own process. The program prints the minimum seconds of a step (processor time on a CPU, which excludes
other jobs, and wall time on a card) and the rise of the peak memory (resident set, or memory allocated on the card). If
the loop's matrices would not fit into memory, it prints their size and does not run the loop.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.methods.collaboration import CollaborativeAttention, sinusoid
from pipeline.methods.edam import Edam
from pipeline.training.settings import autocast, prepare

KINDS = ("loop", "batched")
ROWS = (("loop", "fp32"), ("loop", "auto"), ("batched", "fp32"), ("batched", "auto"))  # kind, precision
SAVED = 3  # T x T matrices per head that the loop saves for its backward: softmax, dropout's mask, their product


class PlainBlock(nn.Module):
    """A pre-norm self-attention block of one class."""

    def __init__(self, settings: Edam.Settings) -> None:
        super().__init__()
        width = settings.channels
        self.heads = settings.heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys = nn.Linear(width, width), nn.Linear(width, width)
        self.values, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, settings.hidden), nn.Linear(settings.hidden, width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """T x C tokens to T x C."""
        normed = self.attention_norm(x)
        sides = (side(normed).view(len(x), self.heads, -1) for side in (self.queries, self.keys, self.values))
        queries, keys, values = (side.transpose(0, 1) for side in sides)
        scores = queries @ keys.transpose(1, 2) / queries.shape[2] ** 0.5
        mixed = self.dropout(scores.softmax(2)) @ values
        x = x + self.dropout(self.merge(mixed.transpose(0, 1).flatten(1)))
        hidden = functional.gelu(self.expand(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.dropout(self.contract(self.dropout(hidden)))


class Loop(nn.Module):
    """One ``PlainBlock`` per class, applied one after the other."""

    def __init__(self, classes: int, settings: Edam.Settings) -> None:
        super().__init__()
        self.image_position = nn.Parameter(torch.zeros(settings.group, settings.channels))
        self.blocks = nn.ModuleList(PlainBlock(settings) for _ in range(classes))
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """B x C x h x w features and B x K x h x w masks of one group to B x K x C."""
        images, channels, height, width = features.shape
        position = sinusoid(height * width, channels, features.device) + self.image_position[:, None]
        pooled = []
        for number, block in enumerate(self.blocks):
            activation = (features * masks[:, number, None]).flatten(2).transpose(1, 2)
            x = block(self.dropout(activation + position).flatten(0, 1))
            pooled.append(x.view(images, -1, channels).mean(1))
        return torch.stack(pooled, 1)

    def load(self, other: CollaborativeAttention) -> None:
        """Copy the weights of the batched blocks."""
        state: dict[str, Tensor] = {"image_position": other.image_position}
        for name, value in other.named_parameters():
            for number in range(len(self.blocks) if value.dim() == 3 else 0):
                state[f"blocks.{number}.{name}"] = value[number].squeeze(0).t()
        self.load_state_dict(state)


def build(kind: str, classes: int, settings: Edam.Settings) -> nn.Module:
    torch.manual_seed(0)
    batched = CollaborativeAttention(classes, settings)
    if kind == "batched":
        return batched
    loop = Loop(classes, settings)
    loop.load(batched)
    return loop


def inputs(images: int, classes: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(images, channels, size, size, generator=generator)
    return features, torch.rand(images, classes, size, size, generator=generator)


def disagreement(settings: Edam.Settings, classes: int) -> float:
    """Maximum difference of outputs and of gradients, relative to the maximum value, at 6 x 6 without dropout."""
    features, masks = inputs(settings.group, classes, settings.channels, 6)
    results = []
    for kind in KINDS:
        x = features.clone().requires_grad_()
        out = build(kind, classes, settings).eval()(x, masks)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out.detach(), gradient))
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*results, strict=True))


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step, and the rise of the peak memory in MB."""
    device = prepare(options.device, options.threads)
    settings = Edam.Settings(dropout=options.dropout, group=options.images)
    network = build(kind, options.classes, settings).to(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step(size: int) -> float:
        features, masks = inputs(options.images, options.classes, settings.channels, size)
        features, masks = features.to(device).requires_grad_(), masks.to(device)
        start = clock()
        with autocast(device, options.precision):
            loss = network(features, masks).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    step(6)  # excludes one-time initialisation from the measurement
    before = megabytes(device)
    seconds = min(step(options.size) for _ in range(2))
    return {"seconds": seconds, "megabytes": megabytes(device) - before}


def megabytes(device: torch.device) -> float:
    """Peak memory of this process so far, on ``device``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def turn(kind: str, precision: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, *arguments, "--kind", kind, "--precision", precision]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])  # after the line that names a GPU and its slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=46, help="cells on a side of the feature maps")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--images", type=int, default=2, help="images in the group")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="trainings on a plain CPU use one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # the process of one turn
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(measure(options.kind, options)))
        return
    settings = Edam.Settings(group=options.images)
    print(
        f"{options.images} images of {options.size}x{options.size} cells, {options.classes} classes, {settings.heads}"
        f" heads, dropout {options.dropout}, {options.device}, {options.threads} threads;"
        f" maximum difference {disagreement(settings, options.classes):.0e}"
    )
    rows = ROWS
    matrices = SAVED * options.classes * settings.heads * (options.images * options.size**2) ** 2 * 4
    if options.device == "cpu" and matrices > 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        print(f"loop: not run, its matrices alone would take {matrices / 2**20:.0f} MB")
        rows = tuple(row for row in ROWS if row[0] != "loop")
    turns = [[turn(*row, sys.argv[1:]) for row in rows] for _ in range(options.repeats)]
    base: tuple[float, float] | None = None
    for row, figures in zip(rows, zip(*turns, strict=True), strict=True):
        seconds = min(each["seconds"] for each in figures)
        peak = max(each["megabytes"] for each in figures)
        line = f"{' '.join(row):<14}{seconds:8.2f} s{peak:8.0f} MB"
        if base is not None:
            line += f"; {base[0] / seconds:.1f} times as fast, 1 / {base[1] / peak:.1f} of the memory"
        print(line)
        if row == ROWS[0]:
            base = seconds, peak


if __name__ == "__main__":
    main()
