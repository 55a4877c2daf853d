"""Resampling of maps between a window and its image, tested on a linear ramp with known values everywhere."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.geometry import Window, to_image, to_windows


def to_window(maps: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    return to_windows(maps, [window] * len(maps), size)


SLOPES = (0.3, 0.6)  # slopes of the ramp over the image: downwards, to the right
WINDOWS = [
    Window(0.25, 0.1, 0.75, 0.8),  # a crop
    Window(0.25, 0.1, 0.75, 0.8, flip=True),
    Window(flip=True),
    Window(-0.2, -0.5, 1.3, 1.1),  # padded on all sides
    Window(-0.25, 0.4, 0.75, 1.4, flip=True),  # padded above and on the right of the flipped image
]


def ramp(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of the ramp at rows ``y`` and columns ``x``, in units of the image."""
    values: NDArray[np.float64] = 0.1 + SLOPES[0] * y[:, None] + SLOPES[1] * x[None, :]
    return values


def centres(cells: int) -> NDArray[np.float64]:
    return (np.arange(cells) + 0.5) / cells


def places(window: Window, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions of a window's cell centres in the image: undo the crop, then the flip."""
    y = window.top + centres(rows) * (window.bottom - window.top)
    x = window.left + centres(columns) * (window.right - window.left)
    return y, 1 - x if window.flip else x


def within(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    return inside


def as_map(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[None]


def seen_by(window: Window, rows: int, columns: int) -> NDArray[np.bool_]:
    """Mask of the cells of the image's grid whose centre is in the window."""
    x = 1 - centres(columns) if window.flip else centres(columns)
    y = centres(rows)
    across = (x >= window.left) & (x <= window.right)
    inside: NDArray[np.bool_] = ((y >= window.top) & (y <= window.bottom))[:, None] & across[None, :]
    return inside


@pytest.mark.parametrize("window", WINDOWS)
def test_to_image_undoes_flip_and_crop(window: Window) -> None:
    """A window's map of the ramp equals the ramp in the image, except at the edges, where it cannot interpolate."""
    rows, columns = 40, 50
    maps = as_map(ramp(*places(window, rows, columns)))
    found, inside = to_image(maps, window, (24, 32))
    expected = ramp(centres(24), centres(32))
    mask = seen_by(window, 24, 32)
    assert inside.numpy().tolist() == mask.tolist()
    assert found.shape == (1, 24, 32)
    assert not found[0][~inside].any()
    half_cell = 0.5 * (
        SLOPES[0] * (window.bottom - window.top) / rows + SLOPES[1] * (window.right - window.left) / columns
    )
    difference = np.abs(found[0].numpy() - expected)[mask]
    assert difference.max() <= half_cell + 1e-5
    assert np.median(difference) < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
def test_to_window_sees_the_image_through_the_window(window: Window) -> None:
    maps = as_map(ramp(centres(40), centres(50)))
    found = to_window(maps, window, (24, 32))
    y, x = places(window, 24, 32)
    inside = within(y, x)
    assert not found[0].numpy()[~inside].any()
    difference = np.abs(found[0].numpy() - ramp(y, x))[inside]
    assert difference.max() <= 0.5 * (SLOPES[0] / 40 + SLOPES[1] / 50) + 1e-5
    assert np.median(difference) < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
def test_to_window_inverts_to_image(window: Window) -> None:
    """From the window to the image and back: cells surrounded by cells of both grids are recovered."""
    y, x = places(window, 30, 30)
    maps = as_map(ramp(y, x))
    image, _ = to_image(maps, window, (90, 90))
    back = to_window(image, window, (30, 30))
    margin = 2 / 90 + 1 / 30
    safe = within((y - margin) / (1 - 2 * margin), (x - margin) / (1 - 2 * margin))
    safe[[0, -1]] = safe[:, [0, -1]] = False  # edge cells have no neighbour to interpolate with
    assert safe.sum() > 100
    torch.testing.assert_close(back[0][torch.from_numpy(safe)], maps[0][torch.from_numpy(safe)], rtol=0, atol=1e-4)


def test_the_full_window_changes_nothing() -> None:
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found, inside = to_image(maps, Window(), (5, 7))
    assert torch.equal(found, maps)
    assert inside.all()
    torch.testing.assert_close(to_window(maps, Window(), (5, 7)), maps)


def test_a_flip_mirrors_cell_by_cell() -> None:
    maps = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found, inside = to_image(maps, Window(flip=True), (4, 6))
    assert inside.all()
    torch.testing.assert_close(found, maps.flip(2))
    torch.testing.assert_close(to_window(maps, Window(flip=True), (4, 6)), maps.flip(2))


def test_a_crop_at_whole_cells_is_a_slice() -> None:
    """Crops rows 1..2 and columns 2..4 of a 4 x 6 grid, flipped or not."""
    image = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0))
    window = Window(1 / 4, 2 / 6, 3 / 4, 5 / 6)
    mirrored = window._replace(flip=True)
    torch.testing.assert_close(to_window(image, window, (2, 3)), image[:, 1:3, 2:5])
    flipped = to_window(image, mirrored, (2, 3))
    torch.testing.assert_close(flipped, image.flip(2)[:, 1:3, 2:5])
    whole, inside = to_image(flipped, mirrored, (4, 6))
    expected = torch.zeros(1, 4, 6)
    expected[:, 1:3, 1:4] = image[:, 1:3, 1:4]  # columns 2..4 of the flipped image are columns 1..3 of the image
    torch.testing.assert_close(whole, expected)
    assert inside.sum() == 6


def test_cells_on_the_edge_of_a_window_lie_inside() -> None:
    """A grid of 4 has the centres 0.125, 0.375, 0.625 and 0.875; the window's edges pass through the inner two."""
    window = Window(0.375, 0.375, 0.625, 0.625)
    found, inside = to_image(torch.ones(1, 2, 2), window, (4, 4))
    expected = torch.zeros(4, 4)
    expected[1:3, 1:3] = 1
    assert torch.equal(inside, expected > 0)
    assert torch.equal(found[0], expected)
    # a window of 2 x 2 cells whose centres are the image's edges
    assert to_window(torch.ones(1, 3, 3), Window(-0.5, -0.5, 1.5, 1.5), (2, 2)).eq(1).all()


def test_padding_is_empty() -> None:
    ones = torch.ones(1, 3, 4)
    window = Window(top=-1.0, left=0.0, bottom=1.0, right=2.0)  # the image is its lower left quarter
    found = to_window(ones, window, (6, 8))
    assert found[0, 3:, :4].eq(1).all()
    assert found.sum() == 12
