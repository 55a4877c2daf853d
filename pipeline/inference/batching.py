"""Batches of images of equal shape for inference."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise, resize


def batches(
    images: Sequence[Image], size: Callable[[Image], tuple[int, int]], pixels: int
) -> Iterator[tuple[list[Image], Tensor]]:
    """Read, resize and batch images, grouped by input size. A thread reads the next batch during the caller's work.

    Args:
        size: returns the input's (height, width) for an image.
        pixels: maximum number of pixels per batch; a batch always has at least one image.

    Yields:
        The images and their B x 3 x H x W normalised inputs.
    """
    groups: dict[tuple[int, int], list[Image]] = {}
    for image in images:
        groups.setdefault(size(image), []).append(image)
    parts: list[tuple[list[Image], tuple[int, int]]] = []
    for shape, group in groups.items():
        step = max(1, pixels // (shape[0] * shape[1]))
        parts += [(group[start : start + step], shape) for start in range(0, len(group), step)]
    with ThreadPoolExecutor(1) as reader:
        inputs = [reader.submit(_read, *parts[0])] if parts else []
        for number, (part, _) in enumerate(parts, 1):
            ready = inputs.pop().result()
            if number < len(parts):
                inputs.append(reader.submit(_read, *parts[number]))
            yield part, ready


def _read(images: Sequence[Image], shape: tuple[int, int]) -> Tensor:
    return torch.stack([normalise(resize(read_rgb(image), shape)) for image in images])


def pixels_per_batch(device: torch.device) -> int:
    """Batch size in pixels: large on a GPU to keep it busy, and small on a CPU to fit its caches."""
    return 16 * 512 * 512 if device.type == "cuda" else 4 * 256 * 256
