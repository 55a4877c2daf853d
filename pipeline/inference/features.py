"""Feature maps of every layer of a classifier, to be looked at (DRS Fig. 5)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.index import Image
from pipeline.data.loading import resized
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.methods.base import Method
from pipeline.networks.base import observe
from pipeline.stores.blocks import Row

LONG_SIDE = 321  # pixels of an input at most: the side of DRS's training crops


def feature_maps(network: Method, images: Sequence[Image], device: torch.device) -> Iterator[Row]:
    """One raster a layer of ``network.layers()``, numbered from 1, at the layer's own resolution.

    The layer's features, suppressed where the network suppresses them, are averaged over their channels and normalised
    so that the least value of each map is 0 and the greatest 1 (DRS, "Effect of DRS on each layer"). A map that is the
    same everywhere is 0.
    """
    for part, inputs in batches(images, _size, pixels_per_batch(device)):
        for number, means in enumerate(_channel_means(network, inputs.to(device)), 1):
            low, high = means.amin((1, 2), keepdim=True), means.amax((1, 2), keepdim=True)
            shares = (means - low) / (high - low).clamp_min(1e-12)
            levels = (shares * 255).round().to(torch.uint8).cpu().numpy()
            for image, level in zip(part, levels, strict=True):
                yield image.id, number, np.ascontiguousarray(level)


def _size(image: Image) -> tuple[int, int]:
    return resized(image.height, image.width, "long", min(LONG_SIDE, max(image.height, image.width)))


@torch.inference_mode()
def _channel_means(network: Method, inputs: Tensor) -> list[Tensor]:
    """B x h x w a layer: what the last module of the layer passes on, hooks that change it included."""
    last = [modules[-1] for modules in network.layers().values()]
    return observe(network, last, inputs, lambda output: output.float().mean(1))
