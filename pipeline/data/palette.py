"""The VOC colour map, and writing of masks with it."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def voc_palette() -> NDArray[np.uint8]:
    """256 x 3 RGB colour map: the bits of a class id, distributed over the high bits of the three channels."""
    ids = np.arange(256, dtype=np.uint8)
    out = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            out[:, channel] |= ((ids >> (3 * level + channel)) & 1 if 3 * level + channel < 8 else 0) << (7 - level)
    return out


def encoded_mask(mask: NDArray[np.uint8]) -> bytes:
    """Encode H x W class ids in VOC's mask format: a PNG of indices with the VOC palette."""
    picture = Image.fromarray(np.ascontiguousarray(mask), mode="P")
    picture.putpalette(voc_palette().reshape(-1).tolist())
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write H x W class ids to a file in VOC's mask format."""
    path.write_bytes(encoded_mask(mask))
