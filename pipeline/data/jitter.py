"""Colour jitter of uint8 images: brightness, contrast, saturation and hue, with the same bytes on a CPU and on a GPU.

The factors are drawn where an image is loaded, since the contrast needs the mean of the whole image. They may be
applied later, to the cropped input, on the training device. Each pixel's result depends on this pixel and the factors
alone. It is that of OpenCV's conversions on processors with fused multiply-add, whose last pixels of a row may differ
by 1: the hue is rotated in 8-bit HSV with OpenCV's rounding.
"""

import functools
from collections.abc import Sequence

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
    """Rotate the hues of R, G and B, each B x H x W whole numbers, by B x 1 x 1 rotations: B x H x W x 3 uint8.

    All numbers up to the index of a colour are whole and below 2 ** 24, hence exact in float32. Most steps are in
    place, since a CPU would spend several times as long on new memory.
    """
    red, green, blue = channels
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    chroma = torch.minimum(red, green)
    torch.minimum(chroma, blue, out=chroma)
    torch.sub(value, chroma, out=chroma)
    sixth, if_green, else_blue = (  # of the circle, in units of 1 / chroma, by the largest channel
        green - blue,
        (blue - red).add_(chroma, alpha=2),
        (red - green).add_(chroma, alpha=4),
    )
    else_blue.sub_(if_green).mul_((value - green).clamp_(max=1))  # 0 where green is the largest
    if_green.add_(else_blue).sub_(sixth).mul_((value - red).clamp_(max=1))
    hue = _scaled(sixth.add_(if_green), HUES / 6, chroma)
    saturation = _scaled(chroma.clone(), 255.0, value)
    at = hue.add_(turn - _LEAST).mul_(256).add_(saturation).int().flatten()
    value.mul_(_UNIT)
    out = torch.empty(*value.shape, 3, dtype=torch.uint8, device=value.device)
    for channel, table in enumerate(_tables(value.device)):
        out[..., channel] = table.index_select(0, at).view(value.shape).mul_(value).mul_(255)
    return out


def _scaled(numbers: Tensor, unit: float, divisor: Tensor) -> Tensor:
    """Multiply by ``unit`` / ``divisor``, in place, in OpenCV's integer arithmetic; 0 / 0 is 0."""
    ones = 1 << _SHIFT
    factors = torch.div(unit * ones, divisor.clamp(min=1)).round_()
    return numbers.mul_(factors).add_(ones / 2).mul_(1 / ones).floor_()


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """R, G and B at value 1, by (hue - ``_LEAST``) * 256 + saturation."""
    return tuple(torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in _colours().T)


def _colours() -> NDArray[np.float32]:
    """N x 3: the colours of ``_tables``, in the float32 arithmetic of OpenCV's HSV to RGB conversion."""
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
