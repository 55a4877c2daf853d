"""Order of the training images in an epoch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.streams import Purpose, rng


def epoch_order(tags: Sequence[tuple[int, ...]], group: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """Return a permutation of the image numbers that depends only on seed and epoch.

    ``group`` 1 is a plain shuffle. With a larger ``group``, every ``group`` consecutive images share a class, redrawn
    each epoch (EDAM Sec. 4.5.2), as long as a class has enough images left. The remaining images are grouped at random;
    those that do not fill a group come last.

    Args:
        tags: class ids of each image.
    """
    random = rng(seed, Purpose.ORDER, epoch)
    order = random.permutation(len(tags))
    if group == 1:
        return order
    groups, rest = _share_a_class(order, tags, group, random)
    whole = len(rest) // group * group
    groups += np.reshape(rest[:whole], (-1, group)).tolist()
    shuffled = [groups[number] for number in random.permutation(len(groups))]
    return np.array([number for members in shuffled for number in members] + rest[whole:], np.intp)


def _share_a_class(
    order: NDArray[np.intp], tags: Sequence[tuple[int, ...]], group: int, random: np.random.Generator
) -> tuple[list[list[int]], list[int]]:
    """Partition into groups whose images share a class, and leftover images, too few of any class for another group.

    Each image, in ``order``, picks one of its tags at random and forms a group with the next images that have that tag.
    A tag with too few images left is skipped, and its images are dropped from its list: they can never form a group.
    """
    left: dict[int, list[int]] = {}  # class -> ungrouped images; the first in order is the last element
    for number in order[::-1].tolist():
        for tag in tags[number]:
            left.setdefault(tag, []).append(number)
    groups: list[list[int]] = []
    taken: set[int] = set()
    for number in order.tolist():
        for tag in () if number in taken else random.permutation(tags[number]).tolist():
            members: list[int] = []
            while left[tag] and len(members) < group:
                if (candidate := left[tag].pop()) not in taken:
                    members.append(candidate)
            if len(members) == group:
                groups.append(members)
                taken.update(members)
                break
    return groups, [number for number in order.tolist() if number not in taken]
