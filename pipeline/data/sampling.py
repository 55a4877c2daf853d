"""In what order an epoch goes through the training images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.streams import Purpose, rng


def epoch_order(tags: Sequence[tuple[int, ...]], group: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """Each image's number once, in an order that seed and epoch decide.

    A ``group`` of 1 is a plain shuffle. A larger one makes every ``group`` images in a row share a class, drawn anew in
    each epoch (EDAM Sec. 4.5.2), as far as classes have images left; the rest are grouped at random, and what fills no
    group comes last.

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
    """Disjoint groups whose images share a class, and the images left over, too few of any class for another group.

    In their order, images choose one of their tags by lot and are joined by the next ones that have it, too. A tag
    without enough images is passed over; its images are then forgotten, as it can never get more.
    """
    left: dict[int, list[int]] = {}  # of each class, those without a group: the first in order at the end
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
