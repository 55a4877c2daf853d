"""Pairs of near cells of a grid, and the straight paths between them."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import PipelineError

Cell = tuple[int, int]  # row and column, from the pair's first cell


@dataclass(frozen=True)
class Pairs:
    """The P pairs that a cell begins, none of them twice: ``ends`` and, in the same order, ``paths``.

    A second cell lies below the first, or beside it on its right. The longest path comes first.
    """

    radius: int
    paths: tuple[tuple[Cell, ...], ...]  # each from (0, 0) to the pair's second cell

    @property
    def reach(self) -> int:
        """The farthest row or column of a second cell."""
        return self.radius - 1

    @cached_property
    def ends(self) -> Tensor:
        """P x 2."""
        return torch.tensor([path[-1] for path in self.paths])

    @cached_property
    def steps(self) -> list[Tensor]:
        """By number k, from 1 on: the p x 2 cells that come k-th on the p paths which have that many."""
        longest = len(self.paths[0])
        return [torch.tensor([path[k] for path in self.paths if len(path) > k]) for k in range(1, longest)]


@cache
def pairs(radius: int) -> Pairs:
    """Pairs of cells less than ``radius`` apart (IRN: 34 of them at radius 5).

    The path of a pair is all cells of its bounding box whose centres are less than one cell from the straight line
    through both (IRN's public code): thick enough that no diagonal chain of cells is slipped through.

    Raises:
        PipelineError: no two cells are that near.
    """
    if radius < 2:
        raise PipelineError(f"radius {radius}: no two cells are nearer than that; use 2 or more")
    reach = range(1 - radius, radius)
    ends = [(y, x) for y in range(radius) for x in reach if (y, x) > (0, 0) and y * y + x * x < radius * radius]
    return Pairs(radius, tuple(sorted((_path(*end) for end in ends), key=len, reverse=True)))


def _path(y: int, x: int) -> tuple[Cell, ...]:
    rows, columns = range(y + 1), range(min(0, x), max(0, x) + 1)
    near = [(i, j) for i in rows for j in columns if (y * j - x * i) ** 2 < y * y + x * x]
    return tuple(sorted(near, key=lambda cell: (cell[0] ** 2 + cell[1] ** 2, cell)))


class Cells:
    """The maps of a batch as rows of B values, so that a cell of all images is fetched at once.

    Args:
        maps: B x h x w.
        fill: value of cells beyond the grid, which the pairs of border cells reach.
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
        """The (p * h * w) rows of ``values`` that lie p x 2 ``offsets`` from each cell."""
        shifts = (offsets[:, 0] * self._stride + offsets[:, 1]).to(self.starts.device)
        return (shifts[:, None] + self.starts).flatten()

    def as_maps(self, rows: Tensor) -> Tensor:
        """(p * h * w) x B -> B x p x h x w, a view."""
        return rows.view(-1, self.height, self.width, self.batch).permute(3, 0, 1, 2)


def at_ends(maps: Tensor, near: Pairs, fill: float) -> Tensor:
    """B x h x w -> B x P x h x w: the value at the second cell of each pair that a cell begins."""
    cells = Cells(maps, near, fill)
    return cells.as_maps(cells.values[cells.at(near.ends)])


def strongest(maps: Tensor, near: Pairs) -> Tensor:
    """The greatest value on the path of each pair.

    Its gradient flows to one cell of the path, the first that is greatest. Which one is found without gradients, path
    cell by path cell: memory stays at a few numbers a pair, however long its path.

    Args:
        maps: B x h x w.

    Returns:
        B x P x h x w; of a path that leaves the grid, what lies within counts.
    """
    cells = Cells(maps, near, -torch.inf)
    with torch.no_grad():
        where = cells.starts.repeat(len(near.paths))[:, None].repeat(1, cells.batch)
        best = cells.values[cells.starts].repeat(len(near.paths), 1)
        for offsets in near.steps:
            rows = cells.at(offsets)
            found = cells.values[rows]
            better = found > best[: len(rows)]
            best[: len(rows)] = torch.where(better, found, best[: len(rows)])
            where[: len(rows)] = torch.where(better, rows[:, None], where[: len(rows)])
    return cells.as_maps(cells.values.gather(0, where) if maps.requires_grad else best)
