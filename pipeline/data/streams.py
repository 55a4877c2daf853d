"""Random streams: draws for one purpose are independent of the draws for every other."""

from enum import Enum, unique

import numpy as np


@unique
class Purpose(Enum):
    """What a stream decides. The numbers are part of the results: add new ones, never renumber."""

    ORDER = 0  # of the training images, by epoch
    AUGMENTATION = 1  # by epoch and image
    OCCLUSION = 2  # attention drop layer, by epoch and image
    MIXTURE = 3  # which images carry their masks


def rng(seed: int, purpose: Purpose, epoch: int = 0, number: int = 0) -> np.random.Generator:
    """The generator of this purpose, epoch and number; independent of every other's.

    The key is NumPy's spawn key. A plain list of integers would not do: ``default_rng([seed, epoch])`` and
    ``default_rng([seed, epoch, 0])`` are one stream, as NumPy pads the list with zeros.

    Args:
        epoch: 0-based.
        number: of the image in the training set, 0-based.

    Raises:
        ValueError: seed, epoch or number is negative.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose.value, epoch, number)))
