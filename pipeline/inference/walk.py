"""Maps of whole images, spread by a random walk along the edges that an affinity network sees."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Walk
from pipeline.data.index import Image
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.refinement.walk import random_walk
from pipeline.stores.blocks import Row
from pipeline.stores.raster import RasterStore
from pipeline.training.settings import autocast


@torch.no_grad()
def walked_maps(
    network: nn.Module, maps: RasterStore, images: Sequence[Image], settings: Walk, device: torch.device
) -> Iterator[Row]:
    """The walk's maps of each image's tags, on the grid of the network's edges: a quarter of the image's size.

    Edges are those of the image and of its mirror image, their logits averaged (IRN's code). The stored maps are
    resized to their grid. What comes of the walk is divided by the maximum over all of the image's classes (IRN), so
    that a weak class stays weak; maps of nothing but 0 stay 0. A tag without a map gets none.
    """
    for part, inputs in batches(images, lambda image: (image.height, image.width), pixels_per_batch(device)):
        edges = edge_maps(network, inputs.to(device))
        size = (edges.shape[1], edges.shape[2])
        seeds = [_seeds(maps, image, size) for image in part]
        channels = max(len(found) for found in seeds)
        if channels == 0:
            continue
        joined = torch.zeros(len(part), channels, *size)
        for row, found in zip(joined, seeds, strict=True):
            for channel, seed in enumerate(found.values()):
                row[channel] = seed
        spread = random_walk(joined.to(device), edges, settings)
        spread = spread / spread.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(spread.dtype).tiny)
        levels = (spread.clamp_max(1) * 255).round().to(torch.uint8).cpu().numpy()
        for image, found, values in zip(part, seeds, levels, strict=True):
            for tag, level in zip(found, values, strict=False):
                yield image.id, tag, np.ascontiguousarray(level)


def edge_maps(network: nn.Module, inputs: Tensor) -> Tensor:
    """B x 3 x H x W -> B x h x w edges in [0, 1], of the inputs and of their mirror images."""
    straight = inputs.contiguous(memory_format=torch.channels_last)
    mirrored = inputs.flip(3).contiguous(memory_format=torch.channels_last)
    with autocast(inputs.device, "auto"):
        logits = network(straight) + network(mirrored).flip(3)
    return (logits[:, 0].float() / 2).sigmoid()


def _seeds(maps: RasterStore, image: Image, size: tuple[int, int]) -> dict[int, Tensor]:
    """The stored maps of the image's tags at ``size``, bilinear, in [0, 1]."""
    stored = maps.maps(image.id)
    return {tag: _resized(torch.from_numpy(stored[tag]).float() / 255, size) for tag in image.tags if tag in stored}


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False, antialias=True)[
        0, 0
    ]
