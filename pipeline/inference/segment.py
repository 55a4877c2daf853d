"""Segmentation of whole images: multi-scale with flips, and dense CRF."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Crf, Test
from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.labels.crf import dense_crf
from pipeline.networks.finite import check_outputs
from pipeline.stores.blocks import Row
from pipeline.training.settings import autocast

Map = Callable[..., Iterator[NDArray[np.uint8]]]


def segmentations(
    network: nn.Module,
    images: Sequence[Image],
    settings: Test,
    device: torch.device,
    mapper: Map,
    precision: str = "auto",
) -> Iterator[Row]:
    """Yield label maps at the images' size: the softmax averaged over scales and flips, the optional CRF, and argmax.

    Args:
        mapper: ``map``, or an equivalent over worker processes, because the CRF takes much longer than the network.
    """
    for part, inputs in batches(images, lambda image: (image.height, image.width), pixels_per_batch(device)):
        mean = _probabilities(network, part, inputs.to(device), settings, precision)
        labels: Iterable[NDArray[np.uint8]]
        if settings.crf is None:
            labels = mean.argmax(1).to(torch.uint8).cpu().numpy()
        else:
            tasks = [(image, scores, settings.crf) for image, scores in zip(part, mean.cpu().numpy(), strict=True)]
            labels = mapper(_refined, tasks)
        for image, label in zip(part, labels, strict=True):
            yield image.id, 0, label


def _refined(task: tuple[Image, NDArray[np.float32], Crf]) -> NDArray[np.uint8]:
    """Run the CRF over the classes whose probability is highest or above 0.05 somewhere; others only cost time."""
    image, probabilities, settings = task
    plausible = probabilities.reshape(len(probabilities), -1).max(1) > 0.05
    plausible[np.unique(probabilities.argmax(0))] = True  # with many classes, the maximum may be below 0.05
    kept = np.flatnonzero(plausible)
    refined = dense_crf(read_rgb(image), np.ascontiguousarray(probabilities[kept]), settings)
    labels: NDArray[np.uint8] = kept.astype(np.uint8)[refined.argmax(0)]
    return labels


@torch.inference_mode()
def _probabilities(
    network: nn.Module, images: Sequence[Image], inputs: Tensor, settings: Test, precision: str
) -> Tensor:
    """Softmax averaged over scales and flips, B x (K + 1) x H x W."""
    height, width = inputs.shape[2:]
    total: Tensor | None = None
    for scale in settings.scales:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = inputs
        if scale != 1:
            scaled = functional.interpolate(
                inputs, size=size, mode="bilinear", align_corners=False, antialias=scale < 1
            )
        for flip in (False, True) if settings.flip else (False,):
            view = (scaled.flip(3) if flip else scaled).contiguous(memory_format=torch.channels_last)
            with autocast(inputs.device, precision):
                logits = network(view)
            check_outputs(logits, images)
            logits = logits.float().flip(3) if flip else logits.float()
            probabilities = functional.interpolate(
                logits, size=(height, width), mode="bilinear", align_corners=False
            ).softmax(1)
            total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / (len(settings.scales) * (2 if settings.flip else 1))
