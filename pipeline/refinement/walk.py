"""Maps spread by a random walk along the affinities of cells (PSA, IRN)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Walk
from pipeline.refinement.pairs import Pairs, pairs, strongest


def random_walk(maps: Tensor, edges: Tensor, settings: Walk) -> Tensor:
    """Where walkers come from that start at each cell: every cell receives the average of what they find.

    The maps, to the power ``settings.power`` and, with ``edge_weighting``, times (1 - edge), are multiplied
    2^``times`` times with the sparse transition matrix. That is what the public codes of PSA and IRN get from squaring
    a dense matrix ``times`` times, at a thousandth of its arithmetic and without its N x N numbers. In float64: as
    fast, and in float32 the rounding of hundreds of steps adds up to 4e-4.

    Args:
        maps: B x C x h x w in [0, 1]; further channels of 0 for images of fewer classes change nothing.
        edges: B x h x w in [0, 1].

    Returns:
        B x C x h x w; nothing is divided by its maximum.
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
    """A step takes half a millisecond: a second thread gains little, and on busy cores makes it many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def transition_matrix(edges: Tensor, radius: int, beta: float) -> Tensor:
    """The walk's steps: from each cell to itself and to the cells less than ``radius`` from it (IRN).

    A neighbour's weight is its affinity, 1 - the strongest edge on the path to it, to the power ``beta``; the cell's
    own is 1. Weights are divided by their sum over the neighbours.

    Args:
        edges: B x h x w in [0, 1].

    Returns:
        (B * h * w) x (B * h * w) float64, CSR, of what is above 0; no step leads from one image to another.
    """
    offsets, weights = _neighbours(edges.double(), pairs(radius), beta)
    weights = weights.permute(0, 2, 3, 1).flatten(0, 2)  # a row a cell
    weights = weights / weights.sum(1, keepdim=True)
    shifts = offsets[:, 0] * edges.shape[2] + offsets[:, 1]
    columns = torch.arange(len(weights), device=edges.device)[:, None] + shifts
    there = weights > 0
    rows = functional.pad(there.sum(1).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(  # 32-bit indices, as MKL wants them: others are converted in each product
            rows.int(), columns[there].int(), weights[there], (len(weights),) * 2, check_invariants=False
        )


def _neighbours(edges: Tensor, near: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """n x 2 offsets in the order of the grid, the cell itself among them, and B x n x h x w weights, 0 beyond the grid.

    A pair's weight is found once, at its first cell, and is that of its second cell for the way back.
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
