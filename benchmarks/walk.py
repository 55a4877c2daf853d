"""Time and peak memory of the random walk along affinities, sparse against dense.

    python -m benchmarks.walk [--size H W] [--classes C] [--radius R] [--times T] [--dense H W]

Edges and maps are smooth and random. The default grid is a quarter of a VOC image, 94 x 125 cells; the walk has 2^8
steps among the neighbours within radius 5. Each walk runs in its own process; its memory is the rise of the peak
resident set. The dense walk squares its N x N matrix, as the public codes of PSA and IRN do. On the grid of ``--dense``
both walks use the same edges, and their results are compared.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Walk
from pipeline.refinement.walk import random_walk, transition_matrix
from pipeline.training.settings import prepare


def smooth(channels: int, size: tuple[int, int], seed: int) -> Tensor:
    """Smooth random maps, 1 x ``channels`` x h x w; each channel spans [0, 1]."""
    coarse = torch.rand(1, channels, 12, 16, generator=torch.Generator().manual_seed(seed))
    maps = functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low)


def dense_walk(maps: Tensor, edges: Tensor, settings: Walk) -> Tensor:
    """The walk by a dense float32 matrix, squared ``settings.times`` times and multiplied with the maps once."""
    transition = transition_matrix(edges, settings.radius, settings.beta).float().to_dense()
    for _ in range(settings.times):
        transition = transition @ transition
    seeds = (maps * (1 - edges)[:, None]).flatten(2)[0].t()
    return (transition @ seeds).t().reshape(maps.shape)


def megabytes() -> float:
    """This process's peak resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run the walk ``options.measured`` on the grid ``options.size`` in this process; its seconds and MB."""
    prepare("cpu", options.threads)
    settings = Walk("", "", radius=options.radius, times=options.times)
    size = (options.size[0], options.size[1])
    maps, edges = smooth(options.classes, size, 1), smooth(1, size, 0)[:, 0] ** 2
    walk = random_walk if options.measured == "sparse" else dense_walk
    random_walk(maps[..., :8, :8], edges[:, :8, :8], settings)  # excludes one-time initialisation from the measurement
    before, seconds = megabytes(), []
    for _ in range(5 if options.measured == "sparse" else 1):
        start = time.perf_counter()
        walked = walk(maps, edges, settings)
        seconds.append(time.perf_counter() - start)
    result = {"seconds": statistics.median(seconds), "megabytes": megabytes() - before}
    if options.measured == "dense":
        result["difference"] = float((walked - random_walk(maps, edges, settings)).abs().max())
    return result


def run(measured: str, size: list[int], options: argparse.Namespace) -> dict[str, float]:
    """Call ``measure`` in a new process."""
    settings = {"measured": measured, "size": size, "classes": [options.classes], "radius": [options.radius]}
    settings |= {"times": [options.times], "threads": [options.threads]}
    command = [sys.executable, "-m", "benchmarks.walk"]
    for name, values in settings.items():
        command += [f"--{name}", *([values] if isinstance(values, str) else map(str, values))]
    figures: dict[str, float] = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[94, 125], metavar=("H", "W"), help="cells of the grid")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--radius", type=int, default=5)
    parser.add_argument("--times", type=int, default=8, help="the walk has 2^TIMES steps")
    parser.add_argument(
        "--dense", type=int, nargs=2, default=[47, 62], metavar=("H", "W"), help="grid of the dense walk"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measured", choices=["sparse", "dense"], help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    if options.measured:
        print(json.dumps(measure(options)))
        return
    print(f"{options.classes} classes, radius {options.radius}, {2**options.times} steps, {options.threads} threads")
    print("walk     grid        seconds   MB   maximum difference")
    for measured, size in (("sparse", options.size), ("sparse", options.dense), ("dense", options.dense)):
        figures = run(measured, size, options)
        differs = f"   {figures['difference']:.1e}" if "difference" in figures else ""
        grid = f"{size[0]} x {size[1]}"
        print(f"{measured:<8} {grid:<10} {figures['seconds']:8.2f} {figures['megabytes']:5.0f}{differs}", flush=True)


if __name__ == "__main__":
    main()
