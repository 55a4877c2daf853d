"""Property tests of windows for any image, crop and flip: maps survive the round trip to the image and back."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Augmentation
from pipeline.data.geometry import Window, to_image
from pipeline.data.loading import normalise
from tests.test_augment import augment
from tests.test_geometry import to_window

any_case = settings(max_examples=150, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 24)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Any window of 0.1 to 3 times the image's size that overlaps it."""
    spans = []
    for _ in range(2):
        extent = draw(st.floats(0.1, 3))
        start = draw(st.floats(0.05 - extent, 0.95, allow_subnormal=False))
        spans.append((start, start + extent))
    (top, bottom), (left, right) = spans
    return Window(top, left, bottom, right, draw(st.booleans()))


def noise(channels: int, rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(channels, rows, columns, generator=torch.Generator().manual_seed(seed))


def ramp(y: Tensor, x: Tensor) -> Tensor:
    """A linear function of rows ``y`` and columns ``x``, 1 x |y| x |x|, which bilinear sampling reproduces."""
    return (0.2 + 0.5 * y[:, None] - 0.3 * x[None, :])[None]


def centres(cells: int) -> Tensor:
    return (torch.arange(cells) + 0.5) / cells


def clear_of_edges(window: Window, rows: int, columns: int) -> Tensor:
    """Mask of cells whose centre is not on an edge of the window, where float32 may decide either way."""
    y, x = centres(rows), centres(columns)
    x = 1 - x if window.flip else x
    down = (y - window.top).abs().minimum((y - window.bottom).abs())[:, None]
    across = (x - window.left).abs().minimum((x - window.right).abs())[None]
    return (down > 1e-5) & (across > 1e-5)


def between(values: Tensor, low: float, high: float) -> Tensor:
    return (values > low) & (values < high)


@any_case
@given(sides, sides, sides, sides, st.data(), st.booleans(), seeds)
def test_a_window_of_whole_cells_is_a_padded_slice(
    height: int, width: int, rows: int, columns: int, data: st.DataObject, flip: bool, seed: int
) -> None:
    """The inverse recovers all cells of the image in the window; the others are 0."""
    top = data.draw(st.integers(1 - rows, height - 1), "top")
    left = data.draw(st.integers(1 - columns, width - 1), "left")
    image = noise(2, height, width, seed)
    window = Window(top / height, left / width, (top + rows) / height, (left + columns) / width, flip)

    seen = to_window(image, window, (rows, columns))
    mirrored = image.flip(2) if flip else image
    padded = functional.pad(mirrored, (24, 24, 24, 24))
    torch.testing.assert_close(seen, padded[:, 24 + top :, 24 + left :][:, :rows, :columns], rtol=0, atol=1e-4)

    back, inside = to_image(seen, window, (height, width))
    held = torch.zeros(height, width, dtype=torch.bool)
    held[max(0, top) : top + rows, max(0, left) : left + columns] = True
    held = held.flip(1) if flip else held
    assert torch.equal(inside, held)
    torch.testing.assert_close(back, image * held, rtol=0, atol=1e-4)


@any_case
@given(windows(), sides, sides, sides, sides)
def test_a_plane_survives_the_round_trip_through_any_window(
    window: Window, height: int, width: int, rows: int, columns: int
) -> None:
    """The round trip recovers the image's grid, except for cells less than a cell from an edge of either grid."""
    image = ramp(centres(height), centres(width))
    back, inside = to_image(to_window(image, window, (rows, columns)), window, (height, width))
    y, x = centres(height), centres(width)
    x = 1 - x if window.flip else x
    within = between(y, window.top, window.bottom)[:, None] & between(x, window.left, window.right)[None]
    clear = clear_of_edges(window, height, width)
    assert torch.equal(inside[clear], within[clear])
    assert not back[:, ~inside].any()
    cell_y, cell_x = (window.bottom - window.top) / rows, (window.right - window.left) / columns
    safe = (
        between(y, max(0, window.top) + cell_y + 1 / height, min(1, window.bottom) - cell_y - 1 / height)[:, None]
        & between(x, max(0, window.left) + cell_x + 1 / width, min(1, window.right) - cell_x - 1 / width)[None]
    )
    assert inside[safe].all()
    torch.testing.assert_close(back[:, safe], image[:, safe], rtol=0, atol=1e-4)


@any_case
@given(windows(), sides, sides, sides, sides, seeds)
def test_a_flipped_window_is_that_of_the_mirrored_image(
    window: Window, height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    straight, flipped = window._replace(flip=False), window._replace(flip=True)
    image, maps = noise(1, height, width, seed), noise(1, rows, columns, seed)
    seen = to_window(image.flip(2), straight, (rows, columns))
    torch.testing.assert_close(to_window(image, flipped, (rows, columns)), seen, rtol=0, atol=1e-4)
    one, inside = to_image(maps, straight, (height, width))
    other, mirrored = to_image(maps, flipped, (height, width))
    clear = clear_of_edges(straight, height, width)
    assert torch.equal(inside[clear], mirrored.flip(1)[clear])
    torch.testing.assert_close(other.flip(2)[:, clear], one[:, clear], rtol=0, atol=1e-4)


@any_case
@given(windows(), sides, sides, sides, sides, seeds)
def test_resampling_exceeds_no_value(
    window: Window, height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    """Resampled maps stay between 0 and their maximum, and the padding is 0."""
    maps = noise(3, rows, columns, seed)
    image, inside = to_image(maps, window, (height, width))
    assert image.shape == (3, height, width)
    assert not image[:, ~inside].any()
    assert image.min() >= 0
    assert (image.amax((1, 2)) <= maps.amax((1, 2)) + 1e-6).all()
    full, _ = to_image(torch.ones_like(maps), window, (height, width))
    torch.testing.assert_close(full, inside.expand_as(full).float())  # values do not fade towards an edge
    seen = to_window(image, window, (rows, columns))
    assert seen.shape == maps.shape
    assert seen.min() >= 0
    assert (seen.amax((1, 2)) <= image.amax((1, 2)) + 1e-6).all()


@any_case
@given(sides, sides, st.one_of(st.none(), st.integers(1, 40)), seeds)
def test_the_window_of_an_augmentation_locates_each_pixel(height: int, width: int, crop: int | None, seed: int) -> None:
    """The training input equals the image resampled to its window, and maps back to the image."""
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found, _, window = augment(rgb, None, Augmentation(crop=crop), np.random.default_rng(seed))
    whole = normalise(rgb)
    size = (found.shape[1], found.shape[2])
    torch.testing.assert_close(to_window(whole, window, size), found, rtol=0, atol=1e-3)
    back, inside = to_image(found, window, (height, width))
    assert inside.sum() == min(height, size[0]) * min(width, size[1])
    torch.testing.assert_close(back, whole * inside, rtol=0, atol=1e-3)
