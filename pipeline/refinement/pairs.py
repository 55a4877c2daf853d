"""Pairs of nearby cells of a grid, and the straight paths between them."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.collation import on_device
from pipeline.errors import PipelineError

Cell = tuple[int, int]  # row and column, relative to the pair's first cell


@dataclass(frozen=True)
class Pairs:
    """The P pairs that start at a cell, as ``paths`` and, in the same order, ``ends``; no pair of a grid occurs twice.

    The second cell lies below the first, or in the same row to its right. Paths are sorted by length, longest first.
    """

    radius: int
    paths: tuple[tuple[Cell, ...], ...]  # each from (0, 0) to the pair's second cell

    @property
    def reach(self) -> int:
        """The largest row or column offset of a second cell."""
        return self.radius - 1

    @cached_property
    def ends(self) -> Tensor:
        """Offsets of the second cells, P x 2."""
        return torch.tensor([path[-1] for path in self.paths])

    @cached_property
    def steps(self) -> list[Tensor]:
        """For k = 1, 2, ...: the k-th cells of the p paths that are longer than k, p x 2."""
        longest = len(self.paths[0])
        return [torch.tensor([path[k] for path in self.paths if len(path) > k]) for k in range(1, longest)]


@cache
def pairs(radius: int) -> Pairs:
    """All pairs of cells less than ``radius`` apart (IRN: 34 at radius 5).

    The path of a pair consists of the cells in its bounding box whose centres are less than one cell from the straight
    line through both ends (IRN's public code). Such a path cannot pass through a diagonal chain of edge cells.

    Raises:
        PipelineError: ``radius`` is less than 2.
    """
    if radius < 2:
        raise PipelineError(f"radius {radius}: there are no pairs of cells below this distance; use 2 or more")
    reach = range(1 - radius, radius)
    ends = [(y, x) for y in range(radius) for x in reach if (y, x) > (0, 0) and y * y + x * x < radius * radius]
    return Pairs(radius, tuple(sorted((_path(*end) for end in ends), key=len, reverse=True)))


def _path(y: int, x: int) -> tuple[Cell, ...]:
    rows, columns = range(y + 1), range(min(0, x), max(0, x) + 1)
    near = [(i, j) for i in rows for j in columns if (y * j - x * i) ** 2 < y * y + x * x]
    return tuple(sorted(near, key=lambda cell: (cell[0] ** 2 + cell[1] ** 2, cell)))


class Cells:
    """The maps of a batch stored cell by cell, so that a cell of all images is read at once.

    ``values`` has one row of B values per cell of the padded grid; ``starts`` holds the row numbers of the h * w cells.

    Args:
        maps: B x h x w.
        near: the pairs that will be read; they determine the padding.
        fill: value of cells outside the grid, which pairs at the border reach.
    """

    def __init__(self, maps: Tensor, near: Pairs, fill: float) -> None:
        self.batch, self.height, self.width = maps.shape
        reach = near.reach
        padded = functional.pad(maps, (reach, reach, 0, reach), value=fill)
        self._stride = padded.shape[2]
        self.values = padded.flatten(1).t().contiguous()
        rows = torch.arange(self.height, device=maps.device)[:, None] * self._stride
        self.starts = (rows + torch.arange(self.width, device=maps.device) + reach).flatten()

    def at(self, offsets: Tensor) -> Tensor:
        """Row numbers in ``values``, p * h * w, of the cells at p x 2 ``offsets`` from each cell."""
        shifts = on_device(offsets[:, 0] * self._stride + offsets[:, 1], self.starts.device)
        return (shifts[:, None] + self.starts).flatten()

    def as_maps(self, rows: Tensor) -> Tensor:
        """View (p * h * w) x B values as B x p x h x w."""
        return rows.view(-1, self.height, self.width, self.batch).permute(3, 0, 1, 2)


def at_ends(maps: Tensor, near: Pairs, fill: float) -> Tensor:
    """Values of B x h x w maps at the second cell of each pair: B x P x h x w, indexed by the first cell."""
    cells = Cells(maps, near, fill)
    return cells.as_maps(cells.values[cells.at(near.ends)])


def strongest(maps: Tensor, near: Pairs) -> Tensor:
    """The maximum on the path of each pair.

    The gradient flows to one cell of the path, the first maximum. Its position is searched without gradients, one path
    cell at a time, so memory per pair does not grow with the length of the path.

    Args:
        maps: B x h x w.

    Returns:
        B x P x h x w; cells of a path outside the grid are ignored.
    """
    cells = Cells(maps, near, -torch.inf)
    with torch.no_grad():
        where = cells.starts.repeat(len(near.paths))[:, None].repeat(1, cells.batch)
        best = cells.values[cells.starts].repeat(len(near.paths), 1)
        for offsets in near.steps:
            rows = cells.at(offsets)
            values = cells.values[rows]
            better = values > best[: len(rows)]
            best[: len(rows)] = torch.where(better, values, best[: len(rows)])
            where[: len(rows)] = torch.where(better, rows[:, None], where[: len(rows)])
    return cells.as_maps(cells.values.gather(0, where) if maps.requires_grad else best)
