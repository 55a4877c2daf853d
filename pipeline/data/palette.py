"""The VOC colour map."""

import numpy as np
from numpy.typing import NDArray


def voc_palette() -> NDArray[np.uint8]:
    """256 x 3 RGB: the bits of a class id, spread over the high bits of the three channels."""
    ids = np.arange(256, dtype=np.uint8)
    out = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            out[:, channel] |= ((ids >> (3 * level + channel)) & 1 if 3 * level + channel < 8 else 0) << (7 - level)
    return out
