"""Selection of example images for figures."""

from collections.abc import Sequence

from pipeline.data.index import Image


def choose(images: Sequence[Image], count: int) -> list[Image]:
    """Choose up to ``count`` images spread evenly over the list, preferring those with several classes.

    The result keeps the order of the list.
    """
    tags = [len(image.tags) for image in images]
    several = [number for number, have in enumerate(tags) if have > 1]
    single = [number for number, have in enumerate(tags) if have <= 1]
    chosen = _spread(several, count)
    chosen += _spread(single, count - len(chosen))
    return [images[number] for number in sorted(chosen)]


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    count = min(count, len(numbers))
    return [numbers[number * len(numbers) // count] for number in range(count)]
