"""Maps of whole images, propagated by a random walk along the affinities that a network predicts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Walk
from pipeline.data.index import Image
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.networks.finite import check_outputs
from pipeline.refinement.walk import random_walk
from pipeline.stores.blocks import Row
from pipeline.stores.raster import RasterStore
from pipeline.training.settings import autocast


@torch.no_grad()
def walked_maps(
    network: nn.Module,
    images: Sequence[Image],
    maps: RasterStore,
    settings: Walk,
    device: torch.device,
    precision: str = "auto",
) -> Iterator[Row]:
    """Yield the propagated maps of each image's tags.

    They lie on the grid of the predicted edges (1/4 of the image's size), or at the image's size with ``grid: pixels``.

    Edge logits are averaged over the image and its mirror image (IRN's code). The stored maps are resized to the edge
    grid. The results are divided by the maximum over all classes of the image (IRN), so that a weak class stays weak;
    all-zero maps stay 0. Tags without a stored map are skipped.

    IRN's code upsamples the results first and crops them to the image: ``grid: pixels``. Then the maximum is lower, so
    that values are higher and fewer pixels fall below the background threshold: 5 to 11 % of the labels of maps with
    sharp peaks differ.
    """
    for part, inputs in batches(images, lambda image: (image.height, image.width), pixels_per_batch(device)):
        edges = edge_maps(network, inputs.to(device), precision)
        size = (edges.shape[1], edges.shape[2])
        seeds = [_seeds(maps, image, size) for image in part]
        channels = max(len(seed) for seed in seeds)
        if channels == 0:
            continue
        joined = torch.zeros(len(part), channels, *size)
        for sample, seed in zip(joined, seeds, strict=True):
            for channel, values in enumerate(seed.values()):
                sample[channel] = values
        spread = random_walk(joined.to(device), edges, settings)
        check_outputs(spread, part)
        if settings.grid == "pixels":
            height, width = inputs.shape[2:]
            factor: int = network.stride  # type: ignore[assignment]
            pixels = [factor * side for side in size]
            spread = functional.interpolate(spread, pixels, mode="bilinear", align_corners=False)
            spread = spread[:, :, :height, :width]
        spread = spread / spread.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(spread.dtype).tiny)
        levels = (spread.clamp_max(1) * 255).round().to(torch.uint8).cpu().numpy()
        for image, seed, rasters in zip(part, seeds, levels, strict=True):
            for tag, level in zip(seed, rasters, strict=False):
                yield image.id, tag, np.ascontiguousarray(level)


def edge_maps(network: nn.Module, inputs: Tensor, precision: str = "auto") -> Tensor:
    """Predict B x h x w edges in [0, 1] of B x 3 x H x W images, averaged with their mirror images."""
    straight = inputs.contiguous(memory_format=torch.channels_last)
    mirrored = inputs.flip(3).contiguous(memory_format=torch.channels_last)
    with autocast(inputs.device, precision):
        logits = network(straight) + network(mirrored).flip(3)
    return (logits[:, 0].float() / 2).sigmoid()


def _seeds(maps: RasterStore, image: Image, size: tuple[int, int]) -> dict[int, Tensor]:
    """The stored maps of the image's tags by tag, in [0, 1], resized bilinearly to ``size``."""
    stored = maps.maps(image.id)
    return {tag: _resized(torch.from_numpy(stored[tag]).float() / 255, size) for tag in image.tags if tag in stored}


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False, antialias=True)[
        0, 0
    ]
