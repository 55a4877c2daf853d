"""Position of a training input in its image, and resampling of maps between the two.

A network sees a resized, flipped and cropped window of an image, whereas stored maps cover the whole image on a fixed
grid. ``to_image`` undoes the augmentation and ``to_windows`` applies it. Any network input can therefore feed the
attention accumulator or be supervised by stored maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Window(NamedTuple):
    """A window in units of the (flipped) image's height and width; the part outside 0..1 is padding."""

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0
    flip: bool = False


def _centres(cells: int) -> Tensor:
    return (torch.arange(cells, dtype=torch.float32) + 0.5) / cells


def _sample(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample C x h x w ``maps`` bilinearly at rows ``y`` and columns ``x`` in [0, 1]: C x |y| x |x|."""
    grid = torch.stack(torch.meshgrid(2 * y - 1, 2 * x - 1, indexing="ij")[::-1], dim=-1)
    return functional.grid_sample(maps[None], grid[None], align_corners=False, padding_mode="border")[0]


def _inside(values: Tensor) -> Tensor:
    return (values >= 0) & (values <= 1)


def to_image(maps: Tensor, window: Window, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resample maps over a window to the grid of its image.

    Args:
        maps: C x h x w float32 on the CPU, covering the window.
        window: position of the window in the image.
        size: (rows, columns) of the image's grid.

    Returns:
        C x rows x columns maps, 0 outside the window, and the rows x columns mask of cells inside it.
    """
    y, x = _centres(size[0]), _centres(size[1])
    x = 1 - x if window.flip else x
    y = (y - window.top) / (window.bottom - window.top)
    x = (x - window.left) / (window.right - window.left)
    inside = _inside(y)[:, None] & _inside(x)[None, :]
    if maps.shape[1:] == size and window == Window():
        return maps, inside
    return _sample(maps, y, x) * inside, inside


def to_windows(maps: Tensor, windows: Sequence[Window], size: tuple[int, int]) -> Tensor:
    """Resample N x h x w maps over images to the grids of N windows, on the maps' device; the inverse of ``to_image``.

    Args:
        size: (rows, columns) of each window's grid.

    Returns:
        N x rows x columns maps, 0 in the padding.
    """
    sides = [(one.top, one.bottom - one.top, one.left, one.right - one.left, one.flip) for one in windows]
    top, height, left, width, flip = torch.tensor(sides, dtype=torch.float64).float().T[..., None]
    y, x = top + _centres(size[0]) * height, left + _centres(size[1]) * width
    y, x, flip = (values.to(maps.device, non_blocking=True) for values in (y, x, flip))
    inside = _inside(y)[:, :, None] & _inside(x)[:, None, :]
    x = torch.where(flip > 0, 1 - x, x)
    shape = (len(maps), *size)
    grid = torch.stack([(2 * x - 1)[:, None, :].expand(shape), (2 * y - 1)[:, :, None].expand(shape)], -1)
    sampled = functional.grid_sample(maps[:, None], grid, align_corners=False, padding_mode="border")[:, 0]
    return sampled * inside
