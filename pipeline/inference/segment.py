"""Segmentation of whole images: multi-scale with flips, and dense CRF."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

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
from pipeline.networks.finite import Identified, check_outputs
from pipeline.training.settings import autocast

if TYPE_CHECKING:
    from pipeline.stores.blocks import Row

Map = Callable[..., Iterator[NDArray[np.uint8]]]


def segmentations(
    network: nn.Module,
    images: Sequence[Image],
    settings: Test,
    device: torch.device,
    mapper: Map,
    precision: str = "auto",
) -> "Iterator[Row]":
    """Yield label maps at the images' size: the softmax averaged over scales and flips, the optional CRF, and argmax.

    Args:
        mapper: ``map``, or an equivalent over worker processes, because the CRF takes much longer than the network.
    """
    for part, inputs in batches(images, lambda image: image.size, pixels_per_batch(device)):
        mean = class_probabilities(network, part, inputs.to(device), settings, precision)
        labels: Iterable[NDArray[np.uint8]]
        if settings.crf is None:
            labels = mean.argmax(1).to(torch.uint8).cpu().numpy()
        else:
            tasks = [(image, scores, settings.crf) for image, scores in zip(part, mean.cpu().numpy(), strict=True)]
            labels = mapper(_refined, tasks)
        for image, label in zip(part, labels, strict=True):
            yield image.id, 0, label


def label_map(probabilities: Tensor, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The most probable class of each pixel and its probability, at ``size`` (height, width).

    Args:
        probabilities: C x h x w. They are resized bilinearly, one class at a time, so that memory does not grow with C.
    """
    if probabilities.shape[1:] == size:
        return probabilities.argmax(0).to(torch.uint8).cpu().numpy(), probabilities.amax(0).cpu().numpy()
    best = torch.full(size, -1.0, device=probabilities.device)
    labels = torch.zeros(size, dtype=torch.uint8, device=probabilities.device)
    for number, scores in enumerate(probabilities):
        level = enlarged(scores, size)
        labels[level > best] = number
        best = torch.maximum(best, level)
    return labels.cpu().numpy(), best.cpu().numpy()


def enlarged(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize h x w values bilinearly to ``size`` (height, width)."""
    return functional.interpolate(scores[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _refined(task: tuple[Image, NDArray[np.float32], Crf]) -> NDArray[np.uint8]:
    image, probabilities, settings = task
    return refine(read_rgb(image), probabilities, settings).argmax(0).astype(np.uint8)


def refine(rgb: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
    """Run the CRF over the classes whose probability is highest or above 0.05 somewhere; others only cost time.

    Args:
        rgb: H x W x 3.
        probabilities: C x H x W, summing to 1 over C.

    Returns:
        C x H x W, summing to 1 over C; 0 for the classes that were left out.
    """
    plausible = probabilities.reshape(len(probabilities), -1).max(1) > 0.05
    plausible[np.unique(probabilities.argmax(0))] = True  # with many classes, the maximum may be below 0.05
    kept = np.flatnonzero(plausible)
    refined = np.zeros_like(probabilities)
    refined[kept] = dense_crf(rgb, np.ascontiguousarray(probabilities[kept]), settings)
    return refined


@torch.inference_mode()
def class_probabilities(
    network: nn.Module, images: Sequence[Identified], inputs: Tensor, settings: Test, precision: str
) -> Tensor:
    """Softmax averaged over scales and flips, B x (K + 1) x H x W.

    Args:
        images: the images of the inputs, for messages.
        inputs: B x 3 x H x W, normalised.
        precision: of the network's training; 'auto', 'bf16' or 'fp32'.

    Raises:
        PipelineError: an output is not finite.
    """
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
