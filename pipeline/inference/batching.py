"""Batches of images of equal shape for inference."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise, resize


def batches(
    images: Sequence[Image], size: Callable[[Image], tuple[int, int]], pixels: int
) -> Iterator[tuple[list[Image], Tensor]]:
    """Read, resize and batch images, grouped by input size. The next batch is read during the caller's work.

    As many threads read as compute (``torch.get_num_threads``).

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
    with ThreadPoolExecutor(torch.get_num_threads()) as readers:
        begun = (_begin(readers, *part) for part in parts)
        following = next(begun, None)
        while following is not None:
            part, inputs, reads = following
            for read in reads:
                read.result()
            following = next(begun, None)
            yield part, inputs


def _begin(
    readers: ThreadPoolExecutor, images: list[Image], shape: tuple[int, int]
) -> tuple[list[Image], Tensor, list[Future[None]]]:
    """Begin to read images into a tensor, which is filled once all futures are done."""
    inputs = torch.empty(len(images), 3, *shape)
    return images, inputs, [readers.submit(_read, image, into) for image, into in zip(images, inputs, strict=True)]


def _read(image: Image, into: Tensor) -> None:
    into.copy_(normalise(resize(read_rgb(image), (into.shape[1], into.shape[2]))))


def pixels_per_batch(device: torch.device) -> int:
    """Batch size in pixels: large on a GPU to keep it busy, and small on a CPU to fit its caches."""
    return 16 * 512 * 512 if device.type == "cuda" else 4 * 256 * 256
