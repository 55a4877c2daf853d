"""Propagation of maps by a random walk over cell affinities (PSA, IRN)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Walk
from pipeline.refinement.pairs import Pairs, pairs, strongest


def random_walk(maps: Tensor, edges: Tensor, settings: Walk) -> Tensor:
    """Propagate maps by a random walk of 2^``settings.times`` steps.

    The maps are raised to ``settings.power`` and, with ``edge_weighting``, multiplied by (1 - edge). They are then
    multiplied 2^``times`` times by the sparse transition matrix. The public codes of PSA and IRN obtain the same result
    by squaring a dense N x N matrix ``times`` times, which takes about 1000 times the arithmetic. float64 is as fast as
    float32 here; in float32, rounding errors of hundreds of steps reach 4e-4.

    Args:
        maps: B x C x h x w in [0, 1]; images with fewer classes may have channels of zeros.
        edges: B x h x w in [0, 1].

    Returns:
        B x C x h x w, not normalised.
    """
    batch, channels, height, width = maps.shape
    seeds = maps**settings.power
    if settings.edge_weighting:
        seeds = seeds * (1 - edges)[:, None]
    values = seeds.permute(0, 2, 3, 1).reshape(-1, channels).double()
    with _one_thread():
        transition = transition_matrix(edges, settings.radius, settings.beta)
        for _ in range(2**settings.times):
            values = transition @ values
    return values.to(maps.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: a step takes 0.5 ms, so a second thread gains little and is very slow on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def transition_matrix(edges: Tensor, radius: int, beta: float) -> Tensor:
    """Transition probabilities from each cell to itself and to all cells less than ``radius`` away (IRN).

    The weight of a neighbour is (1 - the strongest edge on the path to it)^``beta``; the weight of the cell itself is
    1. The weights of a cell are divided by their sum.

    Args:
        edges: B x h x w in [0, 1].

    Returns:
        (B * h * w) x (B * h * w) float64 in CSR format, block-diagonal by image, with positive entries only.
    """
    offsets, weights = _neighbours(edges.double(), pairs(radius), beta)
    weights = weights.permute(0, 2, 3, 1).flatten(0, 2)  # one row per cell
    weights = weights / weights.sum(1, keepdim=True)
    shifts = offsets[:, 0] * edges.shape[2] + offsets[:, 1]
    columns = torch.arange(len(weights), device=edges.device)[:, None] + shifts
    positive = weights > 0
    rows = functional.pad(positive.sum(1).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(  # MKL uses 32-bit indices and converts others in each product
            rows.int(), columns[positive].int(), weights[positive], (len(weights),) * 2, check_invariants=False
        )


def _neighbours(edges: Tensor, near: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """Neighbours of a cell: n x 2 offsets in raster order, with the cell itself, and B x n x h x w weights.

    Weights of neighbours outside the grid are 0. A pair's weight is computed once and used in both directions.
    """
    _, height, width = edges.shape
    reach = near.reach
    weights = (1 - strongest(edges, near)).clamp_min(0) ** beta
    order = sorted(range(len(near.paths)), key=lambda pair: near.paths[pair][-1])
    inside = functional.pad(torch.ones_like(edges[0]), (reach, reach, 0, reach))
    forward: list[Tensor] = []
    backward: list[Tensor] = []
    for pair in order:
        y, x = near.paths[pair][-1]
        weight = weights[:, pair] * inside[y : y + height, x + reach : x + reach + width]
        back = functional.pad(weight, (reach, reach, reach, 0))
        forward.append(weight)
        backward.append(back[:, reach - y : reach - y + height, reach - x : reach - x + width])
    second = near.ends[order].to(edges.device)
    offsets = torch.cat([-second.flip(0), torch.zeros_like(second[:1]), second])
    return offsets, torch.stack([*backward[::-1], torch.ones_like(edges), *forward], 1)
