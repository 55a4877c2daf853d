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
LABELS, DOUBT = 0, 1  # the kinds of rasters that ``segmentations`` yields
DOUBT_STRIDE = 8  # a doubt map has every eighth pixel of every eighth row


def segmentations(
    network: nn.Module,
    images: Sequence[Image],
    settings: Test,
    device: torch.device,
    mapper: Map,
    precision: str = "auto",
) -> "Iterator[Row]":
    """Yield two rasters per image: LABELS, its label map, and DOUBT, its doubt map.

    Labels have the image's size: the softmax averaged over scales and flips, the optional CRF, and argmax. The doubt
    map holds, of every eighth pixel, one minus the probability of the most probable class, before the CRF; 255 stands
    for 1.

    Args:
        mapper: ``map``, or an equivalent over worker processes, because the CRF takes much longer than the network.
    """
    for part, inputs in batches(images, lambda image: image.size, pixels_per_batch(device)):
        labels: Iterable[NDArray[np.uint8]]
        if settings.crf is None:
            found, doubts = _labels_and_doubts(network, part, inputs.to(device), settings, precision)
            labels = found.cpu().numpy()
        else:
            mean = class_probabilities(network, part, inputs.to(device), settings, precision)
            plausible = _plausible(mean).cpu()
            tasks = [
                (image, np.flatnonzero(kept), scores[kept].cpu().numpy(), settings.crf)
                for image, scores, kept in zip(part, mean, plausible, strict=True)
            ]
            labels = mapper(_refined, tasks)
            doubts = _doubts(_sampled(mean))
        for image, label, doubt in zip(part, labels, doubts.cpu().numpy(), strict=True):
            yield image.id, LABELS, label
            yield image.id, DOUBT, doubt


def _sampled(scores: Tensor) -> Tensor:
    """The scores, B x C x H x W, of the pixels of a doubt map: the middles of cells of ``DOUBT_STRIDE`` pixels."""
    first = (min(DOUBT_STRIDE // 2, size // 2) for size in scores.shape[2:])
    rows, columns = (slice(start, None, DOUBT_STRIDE) for start in first)
    return scores[:, :, rows, columns]


def _doubts(probabilities: Tensor) -> Tensor:
    """One minus the largest of B x C x h x w probabilities, as B x h x w uint8."""
    return ((1 - probabilities.amax(1)) * 255).round().clamp_min(0).to(torch.uint8)


def label_map(probabilities: Tensor, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The most probable class of each pixel and its probability, at ``size`` (height, width).

    Args:
        probabilities: C x h x w. They are resized bilinearly, one class at a time, so that memory does not grow with C.
    """
    if probabilities.shape[1:] == size:
        highest, classes = probabilities.max(0)
        return classes.to(torch.uint8).cpu().numpy(), highest.cpu().numpy()
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


def _refined(task: tuple[Image, NDArray[np.intp], NDArray[np.float32], Crf]) -> NDArray[np.uint8]:
    """The label map of an image from the probabilities of its plausible classes, after the CRF."""
    image, classes, probabilities, settings = task
    return classes[dense_crf(read_rgb(image), probabilities, settings).argmax(0)].astype(np.uint8)


def refine(rgb: NDArray[np.uint8], probabilities: Tensor, settings: Crf) -> Tensor:
    """Run the CRF over the plausible classes of one image.

    Args:
        rgb: H x W x 3.
        probabilities: C x H x W, summing to 1 over C.

    Returns:
        C x H x W, on the CPU, summing to 1 over C; 0 for the classes that were left out.
    """
    kept = _plausible(probabilities[None])[0].cpu()
    refined = torch.zeros(probabilities.shape)
    refined[kept] = torch.from_numpy(dense_crf(rgb, probabilities[kept].cpu().numpy(), settings))
    return refined


def _plausible(probabilities: Tensor) -> Tensor:
    """B x C: the classes whose probability is highest or above 0.05 somewhere. Others only cost the CRF time.

    With many classes, the highest probability of a pixel may be below 0.05.
    """
    highest = _highest(probabilities).flatten(1)
    return (probabilities.amax((2, 3)) > 0.05).scatter_(1, highest, True)


def _highest(scores: Tensor) -> Tensor:
    """B x H x W: the class of the highest of B x C x H x W scores. ``Tensor.argmax`` takes 3 times as long on a CPU."""
    return scores.max(1).indices


@torch.inference_mode()
def _labels_and_doubts(
    network: nn.Module, images: Sequence[Identified], inputs: Tensor, settings: Test, precision: str
) -> tuple[Tensor, Tensor]:
    """B x H x W uint8 labels of highest probability, which the softmax of a single view does not change; and doubts."""
    views = _views(network, images, inputs, settings, precision)
    if _count(settings) == 1:
        logits = next(views)
        return _highest(logits).to(torch.uint8), _doubts(_sampled(logits).softmax(1))
    mean = _mean(views, settings)
    return _highest(mean).to(torch.uint8), _doubts(_sampled(mean))


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
    return _mean(_views(network, images, inputs, settings, precision), settings)


def _mean(views: Iterator[Tensor], settings: Test) -> Tensor:
    total = _softmax(next(views))
    for logits in views:
        total += _softmax(logits)
    return total / _count(settings)


def _softmax(logits: Tensor) -> Tensor:
    """The softmax over C of B x C x H x W logits, which are in channels-last memory, as networks yield them.

    ``logits.softmax(1)`` takes 1.7 times as long on a CPU, since it copies them to contiguous memory first.
    """
    return logits.movedim(1, 3).softmax(3).movedim(3, 1)


def _count(settings: Test) -> int:
    return len(settings.scales) * (2 if settings.flip else 1)


def _views(
    network: nn.Module, images: Sequence[Identified], inputs: Tensor, settings: Test, precision: str
) -> Iterator[Tensor]:
    """B x (K + 1) x H x W logits of each scale and flip, at the inputs' size; flips are undone."""
    height, width = inputs.shape[2:]
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
            yield functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
