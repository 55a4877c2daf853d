"""The random walk along affinities: seconds and peak memory, sparse against dense.

    python -m benchmarks.walk [--size H W] [--classes C] [--radius R] [--times T] [--dense H W]

Edges and maps are smooth random ones; by default a VOC image's quarter, 94 x 125, its walk of 2^8 steps among the 69
neighbours of radius 5. Each walk runs in a process of its own: its memory is the peak resident set less what the
process held before. The dense walk squares its N x N matrix, as the public codes of PSA and IRN do; at ``--dense`` both
walk on the same edges and their results are compared.
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
    """1 x ``channels`` x h x w, each channel over all of [0, 1]."""
    coarse = torch.rand(1, channels, 12, 16, generator=torch.Generator().manual_seed(seed))
    found = functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    low, high = found.amin((2, 3), keepdim=True), found.amax((2, 3), keepdim=True)
    return (found - low) / (high - low)


def dense_walk(maps: Tensor, edges: Tensor, settings: Walk) -> Tensor:
    """The matrix, in float32, is squared ``times`` times and multiplied with the maps once."""
    transition = transition_matrix(edges, settings.radius, settings.beta).float().to_dense()
    for _ in range(settings.times):
        transition = transition @ transition
    seeds = (maps * (1 - edges)[:, None]).flatten(2)[0].t()
    return (transition @ seeds).t().reshape(maps.shape)


def megabytes() -> float:
    """This process's peak resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The walk ``options.measured`` at ``options.size``, in this process."""
    prepare("cpu", options.threads)
    settings = Walk("", "", radius=options.radius, times=options.times)
    size = (options.size[0], options.size[1])
    maps, edges = smooth(options.classes, size, 1), smooth(1, size, 0)[:, 0] ** 2
    walk = random_walk if options.measured == "sparse" else dense_walk
    random_walk(maps[..., :8, :8], edges[:, :8, :8], settings)  # what is loaded once is no part of a walk
    before, seconds = megabytes(), []
    for _ in range(5 if options.measured == "sparse" else 1):
        start = time.perf_counter()
        found = walk(maps, edges, settings)
        seconds.append(time.perf_counter() - start)
    result = {"seconds": statistics.median(seconds), "megabytes": megabytes() - before}
    if options.measured == "dense":
        result["difference"] = float((found - random_walk(maps, edges, settings)).abs().max())
    return result


def run(measured: str, size: list[int], options: argparse.Namespace) -> dict[str, float]:
    """``measure`` in a new process."""
    settings = {"measured": measured, "size": size, "classes": [options.classes], "radius": [options.radius]}
    settings |= {"times": [options.times], "threads": [options.threads]}
    command = [sys.executable, "-m", "benchmarks.walk"]
    for name, values in settings.items():
        command += [f"--{name}", *([values] if isinstance(values, str) else map(str, values))]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[94, 125], metavar=("H", "W"), help="of the grid")
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
    print("walk     grid        seconds   MB   greatest difference")
    for measured, size in (("sparse", options.size), ("sparse", options.dense), ("dense", options.dense)):
        found = run(measured, size, options)
        differs = f"   {found['difference']:.1e}" if "difference" in found else ""
        grid = f"{size[0]} x {size[1]}"
        print(f"{measured:<8} {grid:<10} {found['seconds']:8.2f} {found['megabytes']:5.0f}{differs}", flush=True)


if __name__ == "__main__":
    main()
