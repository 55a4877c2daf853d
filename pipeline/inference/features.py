"""Feature maps of every layer of a classifier, for display (DRS Fig. 5)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.index import Image
from pipeline.data.loading import resized
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.methods.base import Method
from pipeline.networks.base import observe
from pipeline.networks.finite import check_outputs
from pipeline.stores.blocks import Row
from pipeline.training.settings import autocast

LONG_SIDE = 321  # maximum long side of an input, in pixels: the side of DRS's training crops


def feature_maps(network: Method, images: Sequence[Image], device: torch.device) -> Iterator[Row]:
    """Yield one raster per layer of ``network.layers()``, numbered from 1, at the layer's resolution.

    The layer's features, after suppression if the network has any, are averaged over their channels. Each map is scaled
    to [0, 1] by its minimum and maximum (DRS, "Effect of DRS on each layer"). A constant map becomes 0.
    """
    for part, inputs in batches(images, _size, pixels_per_batch(device)):
        for number, means in enumerate(_channel_means(network, inputs.to(device)), 1):
            check_outputs(means, part)
            low, high = means.amin((1, 2), keepdim=True), means.amax((1, 2), keepdim=True)
            shares = (means - low) / (high - low).clamp_min(1e-12)
            levels = (shares * 255).round().to(torch.uint8).cpu().numpy()
            for image, level in zip(part, levels, strict=True):
                yield image.id, number, np.ascontiguousarray(level)


def _size(image: Image) -> tuple[int, int]:
    return resized(image.height, image.width, "long", min(LONG_SIDE, max(image.height, image.width)))


@torch.inference_mode()
def _channel_means(network: Method, inputs: Tensor) -> list[Tensor]:
    """Channel means, B x h x w, of the output of each layer's last module, after forward hooks, in fp32."""
    last = [modules[-1] for modules in network.layers().values()]
    with autocast(inputs.device, "fp32"):
        return observe(network, last, inputs, lambda output: output.float().mean(1))
