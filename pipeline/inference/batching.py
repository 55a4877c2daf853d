"""Batches of images of equal shape for inference."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise, resize


def batches(
    images: Sequence[Image], size: Callable[[Image], tuple[int, int]], pixels: int
) -> Iterator[tuple[list[Image], Tensor]]:
    """Read, resize and batch images, grouped by input size.

    Args:
        size: returns the input's (height, width) for an image.
        pixels: maximum number of pixels per batch; a batch always has at least one image.

    Yields:
        The images and their B x 3 x H x W normalised inputs.
    """
    groups: dict[tuple[int, int], list[Image]] = {}
    for image in images:
        groups.setdefault(size(image), []).append(image)
    for shape, group in groups.items():
        step = max(1, pixels // (shape[0] * shape[1]))
        for start in range(0, len(group), step):
            part = group[start : start + step]
            yield part, torch.stack([normalise(resize(read_rgb(image), shape)) for image in part])


def pixels_per_batch(device: torch.device) -> int:
    """Batch size in pixels: large on a GPU to keep it busy, and small on a CPU to fit its caches."""
    return 16 * 512 * 512 if device.type == "cuda" else 4 * 256 * 256
