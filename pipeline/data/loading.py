"""Network inputs from files: decoding and augmentation, reproducible whatever process loads them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.config.schema import Augmentation
from pipeline.data import jitter
from pipeline.data.cache import Cache
from pipeline.data.geometry import Window
from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.streams import Purpose, rng
from pipeline.errors import PipelineError

if TYPE_CHECKING:  # the library runs without h5py
    from pipeline.stores.raster import Raster, RasterStore

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalisation(mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """3 x 256: the normalised value of each grey level."""
    levels = (np.arange(256, dtype=np.float32)[:, None] / 255 - mean) / std
    return np.ascontiguousarray(levels.T, np.float32)


NORMALISED = normalisation(MEAN, STD)
IGNORE = 255


@dataclass
class Batch:
    """B images of one size on the training device.

    ``labels`` is B x H x W class ids (255: ignore), or None without label maps.
    """

    images: Tensor  # B x 3 x H x W, normalised, channels-last; padding is 0, the mean colour
    tags: Tensor  # B x K, 0 or 1
    ids: list[str]
    windows: list[Window]
    labels: Tensor | None = None
    maps: "Maps | None" = None


class Maps(NamedTuple):
    """Stored maps of a batch's samples, over their whole images. Classes without a map are absent."""

    values: Tensor  # the rasters one after the other, flat uint8
    pairs: list[tuple[int, int, int, int]]  # sample, index of the class, height and width of each raster

    def by_shape(self) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        """Consecutive rasters of equal shape, n x h x w, with their samples and class indices."""
        start = 0
        for (height, width), group in itertools.groupby(self.pairs, lambda pair: pair[2:]):
            pairs = [(sample, index) for sample, index, *_ in group]
            end = start + len(pairs) * height * width
            yield self.values[start:end].view(len(pairs), height, width), pairs
            start = end


def normalise(rgb: NDArray[np.uint8], tables: NDArray[np.float32] = NORMALISED) -> Tensor:
    """Normalise H x W x 3 uint8, by default by ImageNet mean and standard deviation: 3 x H x W float32."""
    out = np.empty((3, *rgb.shape[:2]), np.float32)
    for channel, table in enumerate(tables):
        np.take(
            table, rgb[..., channel], out=out[channel], mode="clip"
        )  # uint8 indices are always valid; "clip" avoids a buffer
    return torch.from_numpy(out)


def resized(height: int, width: int, side: str, length: int | None) -> tuple[int, int]:
    """Size (height, width) after resizing ``side`` to ``length``; only 'square' changes the aspect ratio."""
    if side == "none" or length is None:
        return height, width
    if side == "square":
        return length, length
    factor = length / (min(height, width) if side == "short" else max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize H x W x 3 to ``size`` (height, width), shrinking axes with an area filter and growing ones with a cubic.

    Shrinking comes first: OpenCV's area filter averages only if no axis grows; otherwise it interpolates bilinearly and
    aliases.
    """
    smaller = min(rgb.shape[0], size[0]), min(rgb.shape[1], size[1])
    return _resample(_resample(rgb, smaller, cv2.INTER_AREA), size, cv2.INTER_CUBIC)


def _resample(rgb: NDArray[np.uint8], size: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    return rgb if rgb.shape[:2] == size else cv2.resize(rgb, size[::-1], interpolation=interpolation).astype(np.uint8)


class Sample(NamedTuple):
    """An augmented image."""

    pixels: NDArray[np.uint8]  # H x W x 3; padding is 0
    window: Window
    inset: tuple[int, int, int, int]  # top, left, bottom and right of the image in the input; the rest is padding
    factors: NDArray[np.float32] | None  # of a colour jitter that is still to be applied (``jitter.draw``)
    label: NDArray[np.uint8] | None  # H x W class ids; 255 in the padding


def augment(
    rgb: NDArray[np.uint8], label: "Raster | None", settings: Augmentation, random: np.random.Generator
) -> Sample:
    """Resize, scale, flip and crop an image together with its label map, and draw the factors of its colour jitter.

    Args:
        rgb: H x W x 3.
        label: class ids at the size of the image or another size; resized by nearest neighbour.
    """
    length = None if settings.length is None else int(random.integers(settings.length[0], settings.length[1] + 1))
    height, width = resized(rgb.shape[0], rgb.shape[1], settings.side, length)
    if settings.scale is not None:
        factor = random.uniform(*settings.scale)
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
    rgb = resize(rgb, (height, width))
    if label is not None:
        label = resize_label(label, (height, width))
    flip = settings.flip and bool(random.random() < 0.5)
    if flip:
        rgb, label = cv2.flip(rgb, 1).astype(np.uint8, copy=False), None if label is None else label[:, ::-1]
    factors = None if settings.jitter is None else jitter.draw(settings.jitter, rgb, random)
    rows, columns = settings.crop or height, settings.crop or width
    top, left = _offset(height, rows, random), _offset(width, columns, random)
    window = Window(top / height, left / width, (top + rows) / height, (left + columns) / width, flip)
    cropped = np.s_[max(0, top) : top + rows, max(0, left) : left + columns]
    above, before = max(0, -top), max(0, -left)
    inset = (above, before, above + min(height, rows), before + min(width, columns))
    pixels = _padded(rgb[cropped], inset, (rows, columns, 3), 0)
    classes = None if label is None else _padded(label[cropped], inset, (rows, columns), IGNORE)
    return Sample(pixels, window, inset, factors, classes)


def resize_label(label: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an H x W label map to ``size`` (height, width) by nearest neighbour."""
    if label.shape == size:
        return label
    return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8, copy=False)


def _padded(
    values: NDArray[np.uint8], inset: tuple[int, int, int, int], shape: tuple[int, ...], fill: int
) -> NDArray[np.uint8]:
    """Put values at ``inset`` (see ``Sample``) of an array that is otherwise ``fill``."""
    if values.shape == shape:
        return values
    top, left, bottom, right = inset
    out = np.full(shape, fill, np.uint8)
    out[top:bottom, left:right] = values
    return out


def _offset(extent: int, crop: int, random: np.random.Generator) -> int:
    """Start of a random crop; negative if the image is smaller than the crop and lies at a random place within it."""
    low, high = sorted((0, extent - crop))
    return int(random.integers(low, high + 1))


class Item(NamedTuple):
    """A training image and what is known of it."""

    sample: Sample
    tags: Tensor  # K, 0 or 1
    id: str
    maps: dict[int, "Raster"] | None = None  # by class id


class TrainingSet(Dataset[Item]):
    """Augmented training images; item (epoch, number) does not depend on the loading process or order.

    Args:
        images: the training images; their positions are the numbers.
        num_classes: K.
        labels: label maps of all images, or None.
        group: number of consecutive images that share a class if possible (``sampling.epoch_order``).
        maps: maps of the images' classes, or None.

    Raises:
        PipelineError: ``labels`` or ``maps`` lacks some images.
    """

    def __init__(
        self,
        images: Sequence[Image],
        num_classes: int,
        settings: Augmentation,
        seed: int,
        labels: "RasterStore | None" = None,
        group: int = 1,
        maps: "RasterStore | None" = None,
    ) -> None:
        self.images = images
        self.settings = settings
        self.seed = seed
        self.labels, self.maps = labels, maps
        self.group = group
        self._kept: Cache | None = None
        self._kept_labels: Cache | None = None
        self._kept_maps: Cache | None = None
        self.tags = torch.zeros(len(self.images), num_classes)
        for row, image in enumerate(self.images):
            self.tags[row, [tag - 1 for tag in image.tags]] = 1
        for store, kind in ((labels, "label map"), (maps, "maps")):
            missing = [] if store is None else [image.id for image in self.images if image.id not in store]
            if store is not None and missing:
                raise PipelineError(
                    f"{store.path}: has no {kind} for {len(missing)} training images, first {missing[0]}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, number = key
        image = self.images[number]
        random = rng(self.seed, Purpose.AUGMENTATION, epoch, number)
        size = self._base_size(image)
        return Item(
            augment(self._pixels(number, size), self._label(number, size), self.settings, random),
            self.tags[number],
            image.id,
            self._maps(number),
        )

    def keep(self, budget: int, reserve: int = 0) -> int:
        """Keep decoded images and label maps in memory at their base size, and maps; return the number of images.

        Args:
            budget: bytes to use at most; images come before label maps or maps.
            reserve: bytes of memory to leave to others (``Cache``).
        """
        sizes = [self._base_size(image) for image in self.images]
        try:
            kept = Cache([3 * height * width for height, width in sizes], budget, reserve)
            if self.labels is not None:
                areas = [height * width for height, width in sizes]
                self._kept_labels = Cache(areas, budget - kept.size, reserve)
            if self.maps is not None:
                areas = [sum(self.areas(image.id).values()) for image in self.images]
                self._kept_maps = Cache(areas, budget - kept.size, reserve)
        except OSError:  # a limit of this process
            return 0
        self._kept = kept
        return kept.count

    @property
    def _has_drawn_size(self) -> bool:
        """Whether the size of an image before the crop differs from epoch to epoch."""
        length = self.settings.length
        return self.settings.scale is not None or (length is not None and length[0] < length[1])

    def _base_size(self, image: Image) -> tuple[int, int]:
        """The (height, width) that an image has in all epochs, before the steps that differ."""
        length = self.settings.length
        if self._has_drawn_size or length is None:
            return image.size
        return resized(*image.size, self.settings.side, length[0])

    def _pixels(self, number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The decoded image at its base size."""
        if self._kept is None:
            return resize(read_rgb(self.images[number]), size)
        kept = self._kept.get(number)
        if kept is not None:
            return kept.reshape(*size, 3)
        rgb = resize(read_rgb(self.images[number]), size)
        self._kept.put(number, rgb)
        return rgb

    def _label(self, number: int, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """The image's label map, resized to its base size if that is its final size."""
        if self.labels is None:
            return None
        kept = None if self._kept_labels is None else self._kept_labels.get(number)
        if kept is not None:
            return kept.reshape(size)
        label = self.labels.get(self.images[number].id)
        label = label if self._has_drawn_size else resize_label(label, size)
        if self._kept_labels is not None and label.shape == size:
            self._kept_labels.put(number, label)
        return label

    def areas(self, name: str) -> dict[int, int]:
        """Pixels of the image's maps by class id."""
        if self.maps is None:
            return {}
        return {tag: math.prod(self.maps.shape(name, tag)) for tag in self.maps.classes(name)}

    def _maps(self, number: int) -> dict[int, "Raster"] | None:
        """The image's maps by class id."""
        if self.maps is None:
            return None
        name = self.images[number].id
        kept = None if self._kept_maps is None else self._kept_maps.get(number)
        if kept is None:
            found = self.maps.maps(name)
            if self._kept_maps is not None and found:
                self._kept_maps.put(number, np.concatenate([raster.reshape(-1) for raster in found.values()]))
            return found
        areas = self.areas(name)
        parts = np.split(kept, np.cumsum([*areas.values()])[:-1])
        return {tag: part.reshape(self.maps.shape(name, tag)) for tag, part in zip(areas, parts, strict=True)}
