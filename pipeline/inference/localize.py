"""Localization maps of whole images: multi-scale with flips, normalised per class, present classes only."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.views import Localization, Views
from pipeline.data.index import Image
from pipeline.data.loading import resized
from pipeline.inference.batching import batches, pixels_per_batch
from pipeline.inference.climbing import climb
from pipeline.methods.base import Method
from pipeline.networks.finite import check_outputs
from pipeline.stores.blocks import Row
from pipeline.training.settings import autocast


class Localizer(Protocol):
    def localize(self, images: Tensor) -> Tensor: ...


def localization_maps(
    network: nn.Module,
    images: Sequence[Image],
    settings: Localization,
    device: torch.device,
    precision: str = "auto",
) -> Iterator[Row]:
    """Yield maps of each image's tags at 1 / ``settings.stride`` of the image's size.

    The maps of all scales and flips are resized to the same grid and fused by mean or maximum. They are divided by
    their maximum after the fusion, so that scales with strong responses weigh most. With ``normalise: none`` they are
    clipped at 1 instead. DRS's code resizes maps to the input's pixels with aligned corners before it divides them by
    their maximum: ``align_corners: true`` and ``stride: 1`` reproduce it. Values differ by up to 0.5 at the rim.

    ``settings.climbing`` applies climbing to each view of an image; only classifiers support it.
    """

    def shape(image: Image) -> tuple[int, int]:
        return resized(image.height, image.width, settings.side, settings.length)

    for part, inputs in batches(images, shape, pixels_per_batch(device)):
        if not any(image.tags for image in part):
            continue  # images without a class have no maps
        present = [[tag - 1 for tag in image.tags] for image in part]
        localize: Callable[[Tensor], Tensor] = partial(_localize, network, precision=precision)
        if settings.climbing is not None:
            assert isinstance(network, Method)
            localize = partial(climb, network, present=present, settings=settings.climbing, precision=precision)
        views = view_maps(localize, inputs.to(device), settings)
        yield from fused_rows(views, part, present, settings, settings.normalise == "max")


def fused_rows(
    views: Sequence[Tensor], images: Sequence[Image], classes: Sequence[Sequence[int]], settings: Views, normalise: bool
) -> Iterator[Row]:
    """Yield the stored maps of a batch: those of each image's classes, numbered from 0.

    Args:
        views: B x K x h x w maps of each scale and flip.
        normalise: divide each map by its maximum.
    """
    grids = [(-(-image.height // settings.stride), -(-image.width // settings.stride)) for image in images]
    for grid in dict.fromkeys(grids):  # images of equal input may have grids of their own
        pairs = [(n, label) for n in range(len(images)) if grids[n] == grid for label in classes[n]]
        if not pairs:
            continue
        samples, labels = torch.tensor(pairs, device=views[0].device).unbind(1)
        fused = _fused([maps[samples, labels] for maps in views], grid, settings)
        check_outputs(fused, [images[n] for n, _ in pairs])
        if normalise:
            fused = fused / fused.amax((1, 2), keepdim=True).clamp_min(1e-5)
        levels = (fused.clamp_max(1) * 255).round().to(torch.uint8).cpu().numpy()
        for (n, label), level in zip(pairs, levels, strict=True):
            yield images[n].id, label + 1, np.ascontiguousarray(level)


def _fused(views: Sequence[Tensor], grid: tuple[int, int], settings: Views) -> Tensor:
    """Resize the N x h x w maps of each view to the grid, and fuse them."""
    fused: Tensor | None = None
    for maps in views:
        corners = settings.align_corners
        resampled = functional.interpolate(maps[None], size=grid, mode="bilinear", align_corners=corners)[0]
        if fused is None:
            fused = resampled
        else:
            fused = torch.maximum(fused, resampled) if settings.fusion == "max" else fused + resampled
    assert fused is not None
    return fused / len(views) if settings.fusion == "mean" else fused


@torch.inference_mode()
def _localize(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    with autocast(images.device, precision):
        return network.localize(images).float()  # type: ignore[operator]


def view_maps(localize: Callable[[Tensor], Tensor], inputs: Tensor, settings: Views) -> list[Tensor]:
    """B x K x h x w maps of each scale and flip; flips are undone."""
    out = []
    height, width = inputs.shape[2:]
    for scale in settings.scales:
        scaled = inputs
        if scale != 1:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = functional.interpolate(
                inputs, size=size, mode="bilinear", align_corners=False, antialias=scale < 1
            )
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        out.append(localize(scaled))
        if settings.flip:
            out.append(localize(scaled.flip(3)).flip(3))
    return out
