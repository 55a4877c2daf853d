"""Batches: collated from items in a loading process, moved to the training device and normalised there."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import jitter
from pipeline.data.geometry import Window
from pipeline.data.loading import MEAN, STD, Batch, Item, Maps
from pipeline.errors import PipelineError


@dataclass
class LoadedBatch:
    """B images of one size as they are loaded: bytes on the CPU, which ``to`` turns into the network's inputs."""

    pixels: Tensor  # B x H x W x 3 uint8
    tags: Tensor  # B x K, 0 or 1
    ids: list[str]
    windows: list[Window]
    insets: Tensor | None  # B x 4 int32: top, left, bottom and right of the image in the input; None without padding
    factors: Tensor | None  # factors of a colour jitter that is still to be applied (``jitter.draw``)
    labels: Tensor | None = None  # B x H x W uint8
    maps: Maps | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by attribute; without those of ``maps``."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def pin_memory(self) -> "LoadedBatch":
        """Copy to pinned memory, from which a GPU copies without waiting. The loader's thread calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "LoadedBatch":
        tensors: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        maps = None if self.maps is None else self.maps._replace(values=function(self.maps.values))
        return replace(self, **tensors, maps=maps)

    def jitter_in_place(self) -> None:
        """Apply the colour jitter to ``pixels``, without the padding, if it is still to be applied."""
        if self.factors is None:
            return
        height, width = self.pixels.shape[1:3]
        insets = [[0, 0, height, width]] * len(self.pixels) if self.insets is None else self.insets.tolist()
        for image, factors, (top, left, bottom, right) in zip(self.pixels, self.factors, insets, strict=True):
            part = image[top:bottom, left:right]  # of one image, which fits a CPU's caches
            part.copy_(jitter.apply(part[None], factors[None])[0])
        self.factors = None

    def to(self, device: torch.device) -> Batch:
        """Move the bytes to the device; jitter and normalise them there."""
        there = self._mapped(lambda values: values.to(device, non_blocking=True))
        pixels = there.pixels if there.factors is None else jitter.apply(there.pixels, there.factors)
        images = _normalised(pixels)
        if there.insets is not None:
            images.masked_fill_(_padding(there.insets, *images.shape[2:]), 0)
        labels = None if there.labels is None else there.labels.long()
        return Batch(images, there.tags, self.ids, self.windows, labels, there.maps)


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches of images of one size."""
    if len(batches) == 1:
        return batches[0]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    values, pairs, samples = [], [], 0
    for batch in batches:
        if batch.maps is not None:
            values.append(batch.maps.values)
            pairs += [(samples + sample, *rest) for sample, *rest in batch.maps.pairs]
        samples += len(batch.ids)
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.tags for batch in batches]),
        [name for batch in batches for name in batch.ids],
        [window for batch in batches for window in batch.windows],
        torch.cat(labels) if labels else None,
        Maps(torch.cat(values), pairs) if values else None,  # type: ignore[arg-type]
    )


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a small CPU tensor to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _normalised(pixels: Tensor) -> Tensor:
    """Normalise B x H x W x 3 uint8 by ImageNet mean and standard deviation: B x 3 x H x W float32, channels-last.

    The values are those of ``NORMALISED`` to the bit on every device. A GPU would multiply by the reciprocal of a
    number, hence the divisors are tensors.
    """
    count, height, width, _ = pixels.shape
    rows = pixels.reshape(count * height, width * 3).float()  # whole rows: much faster on a CPU than three columns
    most, mean, std = _rows(width, pixels.device)
    return rows.div_(most).sub_(mean).div_(std).view(count, height, width, 3).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=256)
def _rows(width: int, device: torch.device) -> tuple[Tensor, ...]:
    """255, mean and standard deviation of each value of a row of pixels."""
    rows = (np.full(width * 3, 255, np.float32), np.tile(MEAN, width), np.tile(STD, width))
    return tuple(torch.from_numpy(row).to(device) for row in rows)


def _padding(insets: Tensor, height: int, width: int) -> Tensor:
    """B x 1 x H x W: whether a pixel lies outside of its image's inset."""
    top, left, bottom, right = (insets[:, side, None] for side in range(4))
    rows, columns = (torch.arange(extent, device=insets.device) for extent in (height, width))
    above_or_below, beside = (rows < top) | (rows >= bottom), (columns < left) | (columns >= right)
    return (above_or_below[:, :, None] | beside[:, None, :])[:, None]


def collate(items: Sequence[Item], shared: bool = False) -> LoadedBatch:
    """Stack items of equal size into a batch, in shared memory if it is ``shared`` with another process.

    Raises:
        PipelineError: the sizes differ.
        RuntimeError: there is no space in shared memory.
    """
    samples = [item.sample for item in items]
    shapes = {sample.pixels.shape for sample in samples}
    if len(shapes) > 1:
        raise PipelineError(
            "augmentation: the images of a batch differ in size; set crop, side: square, or batch_size: 1"
        )
    height, width, _ = shapes.pop()
    is_padded = any(sample.inset != (0, 0, height, width) for sample in samples)
    factors = [sample.factors for sample in samples if sample.factors is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    return LoadedBatch(
        _stacked([sample.pixels for sample in samples], shared),
        torch.stack([item.tags for item in items]),
        [item.id for item in items],
        [sample.window for sample in samples],
        torch.tensor([sample.inset for sample in samples], dtype=torch.int32) if is_padded else None,
        torch.from_numpy(np.stack(factors)) if factors else None,
        _stacked(labels, shared) if labels else None,
        None if items[0].maps is None else _collated_maps(items, shared),
    )


def _collated_maps(items: Sequence[Item], shared: bool) -> Maps:
    """The maps of all items, ordered by shape."""
    found = [
        (raster.shape, sample, tag - 1, raster)
        for sample, item in enumerate(items)
        for tag, raster in (item.maps or {}).items()
    ]
    found.sort(key=lambda entry: entry[:3])
    values = [raster.reshape(-1) for *_, raster in found]
    flat = np.concatenate(values) if values else np.zeros(0, np.uint8)
    pairs = [(sample, index, *shape) for shape, sample, index, _ in found]
    return Maps(_stacked([flat], shared)[0], pairs)


def _stacked(arrays: Sequence[NDArray[np.uint8]], shared: bool) -> Tensor:
    out = torch.empty(len(arrays), *arrays[0].shape, dtype=torch.uint8)
    if shared:
        out.share_memory_()  # type: ignore[no-untyped-call]
    np.stack(arrays, out=out.numpy())
    return out
