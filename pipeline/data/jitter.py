"""Colour jitter of uint8 images: brightness, contrast, saturation and hue, with the same bytes on a CPU and on a GPU.

The factors are drawn where an image is loaded, since the contrast needs the mean of the whole image. They may be
applied later, to the cropped input, on the training device. Each pixel's result depends on this pixel and the factors
alone. It is that of OpenCV's conversions on processors with fused multiply-add, whose last pixels of a row may differ
by 1: the hue is rotated in 8-bit HSV with OpenCV's rounding, from tables.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma weights of R, G, B
HUES = 180  # the colour circle has 180 units of 2 degrees, as in OpenCV
TURN = HUES // 2  # the largest rotation
_LEAST = -30 - TURN  # hues before the modulo: -30 to 150, plus the rotation
_MOST = 150 + TURN
_UNIT = float(np.float32(1 / 255))
_SHIFT = 12  # OpenCV computes saturation and hue in integers with 12 binary places


def draw(
    strength: tuple[float, float, float, float], rgb: NDArray[np.uint8], random: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the factors of an image.

    Args:
        strength: strengths of brightness, contrast, saturation and hue. A factor is drawn from 1 +- strength, the
            rotation of the hue from +- ``strength[3]`` of the colour circle.
        rgb: the whole H x W x 3 image.

    Returns:
        The factors of brightness, contrast and saturation; the mean grey level of the whole image after the change of
        brightness, which is the fixed point of the contrast; and, unless ``strength[3]`` is 0, the rotation of the hue.
    """
    factors = [random.uniform(max(0, 1 - s), 1 + s) for s in strength[:3]]
    red, green, blue = (rgb[..., channel].astype(np.float32) * factors[0] * GREY[channel] for channel in range(3))
    factors.append((red + green + blue).mean())
    if strength[3] > 0:
        factors.append(round(HUES * random.uniform(-strength[3], strength[3])))
    return np.array(factors, np.float32)


def apply(pixels: Tensor, factors: Tensor) -> Tensor:
    """Change the colours of B x H x W x 3 uint8 pixels by B x 4 or B x 5 factors (see ``draw``)."""
    brightness, contrast, saturation, mean = (factors[:, column, None, None] for column in range(4))
    channels = [
        pixels[..., channel].float().mul_(brightness).sub_(mean).mul_(contrast).add_(mean) for channel in range(3)
    ]
    red, green, blue = (values * float(weight) for values, weight in zip(channels, GREY, strict=True))
    grey = red.add_(green).add_(blue)
    for values in channels:
        values.sub_(grey).mul_(saturation).add_(grey).clamp_(0, 255).round_()
    if factors.shape[1] == 5:
        return _turned(channels, factors[:, 4, None, None])
    return torch.stack(channels, -1).to(torch.uint8)


def _turned(channels: Sequence[Tensor], turn: Tensor) -> Tensor:
    """Rotate the hues of R, G and B, each B x H x W whole numbers, by B x 1 x 1 rotations: B x H x W x 3 uint8."""
    red, green, blue = channels
    tables = _tables(red.device)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sixth = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    size = value.shape
    saturation = tables.saturation.index_select(0, (value * 256 + chroma).int().flatten()).view(size)
    scale = tables.hue.index_select(0, chroma.int().flatten()).view(size)
    hue = (sixth.int() * scale + (1 << (_SHIFT - 1))) >> _SHIFT
    at = (hue + turn.int() - _LEAST) * 256 + saturation
    colours = tables.colours.index_select(0, at.flatten()).view(*size, 3)
    return colours.mul_(value.mul_(_UNIT)[..., None]).mul_(255).to(torch.uint8)


class _Tables(NamedTuple):
    saturation: Tensor  # 65536: 8-bit saturation by value * 256 + chroma
    hue: Tensor  # 256: units of hue per sixth of the circle and level of ``chroma``, with ``_SHIFT`` binary places
    colours: Tensor  # rows of R, G, B at value 1, by (hue - _LEAST) * 256 + saturation


@functools.cache
def _tables(device: torch.device) -> _Tables:
    levels = np.arange(256)
    divisor = np.maximum(levels, 1)
    scale = np.rint((255 << _SHIFT) / divisor).astype(np.int64) * (levels > 0)
    saturation = (levels[None] * scale[:, None] + (1 << (_SHIFT - 1))) >> _SHIFT
    hue = np.rint((HUES << _SHIFT) / (6.0 * divisor)).astype(np.int64) * (levels > 0)
    return _Tables(
        torch.from_numpy(saturation.clip(0, 255).astype(np.int32).ravel()).to(device),
        torch.from_numpy(hue.astype(np.int32)).to(device),
        torch.from_numpy(_colours()).to(device),
    )


def _colours() -> NDArray[np.float32]:
    """The table ``colours`` in the float32 arithmetic of OpenCV's HSV to RGB conversion."""
    hues = (np.arange(_LEAST, _MOST + 1) % HUES).astype(np.float32) * np.float32(6 / HUES)
    sector = np.floor(hues)
    part = (hues - sector)[:, None]
    saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    full = np.ones((len(hues), 256), np.float32)
    low = full - saturation
    # A product in float64 that is subtracted and then rounded once is a fused multiply-add.
    falling, rising = ((1 - saturation * x.astype(np.float64)).astype(np.float32) for x in (part, 1 - part))
    sectors = [(full, rising, low), (falling, full, low), (low, full, rising)]
    sectors += [(low, falling, full), (rising, low, full), (full, low, falling)]
    table = np.empty((len(hues), 256, 3), np.float32)
    for number, colour in enumerate(sectors):
        mine = sector == number
        table[mine] = np.stack([channel[mine] for channel in colour], -1)
    return table.reshape(-1, 3)
