"""Selection of example images for figures."""

from collections.abc import Sequence

from pipeline.data.index import Image


def choose(images: Sequence[Image], count: int) -> list[Image]:
    """Choose up to ``count`` images spread evenly over the list, preferring those with several classes.

    The result keeps the order of the list.
    """
    several = [image for image in images if len(image.tags) > 1]
    single = [image for image in images if len(image.tags) <= 1]
    chosen = _spread(several, count)
    chosen += _spread(single, count - len(chosen))
    picked = {image.id for image in chosen}
    return [image for image in images if image.id in picked]


def _spread(images: Sequence[Image], count: int) -> list[Image]:
    count = min(count, len(images))
    return [images[number * len(images) // count] for number in range(count)]
