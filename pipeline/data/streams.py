"""Random streams: each purpose draws from its own independent generator."""

from collections.abc import Sequence
from enum import Enum, unique

import numpy as np


@unique
class Purpose(Enum):
    """Purpose of a stream. The numbers affect results: add new ones, but never renumber."""

    ORDER = 0  # order of the training images; keyed by epoch
    AUGMENTATION = 1  # keyed by epoch and image
    OCCLUSION = 2  # attention drop layer; keyed by epoch and image
    MIXTURE = 3  # choice of the images that use their masks
    BOOTSTRAP = 4  # images drawn for the interval of a score
    SHARE = 5  # choice of the images that a segmentation network trains on


def chosen(ids: Sequence[str], count: int, seed: int, purpose: Purpose) -> set[str]:
    """Draw ``count`` of the images. With the same seed, a smaller set is a subset of a larger one."""
    order = rng(seed, purpose).permutation(len(ids))
    return {ids[number] for number in order[:count]}


def rng(seed: int, purpose: Purpose, epoch: int = 0, number: int = 0) -> np.random.Generator:
    """Return the generator of this purpose, epoch and number, independent of all others.

    The numbers form NumPy's spawn key. A list of integers as seed would not work: NumPy pads it with zeros, so that
    ``default_rng([seed, epoch])`` and ``default_rng([seed, epoch, 0])`` are the same stream.

    Args:
        epoch: 0-based.
        number: index of the image in the training set, 0-based.

    Raises:
        ValueError: seed, epoch or number is negative.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose.value, epoch, number)))
