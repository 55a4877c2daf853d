"""Network inputs from files: decoding, augmentation and collation, reproducible whatever process loads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from pipeline.config.schema import Augmentation
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
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma weights of R, G, B
IGNORE = 255


@dataclass
class Batch:
    """B images of one size. ``labels`` is B x H x W class ids (255: ignore), or None without label maps."""

    images: Tensor  # B x 3 x H x W, normalised; padding is 0, the mean colour
    tags: Tensor  # B x K, 0 or 1
    ids: list[str]
    windows: list[Window]
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        images = self.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(images, self.tags.to(device, non_blocking=True), self.ids, self.windows, labels)


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


def augment(
    rgb: NDArray[np.uint8], label: "Raster | None", settings: Augmentation, random: np.random.Generator
) -> tuple[Tensor, Tensor | None, Window]:
    """Resize, scale, flip, jitter and crop an image together with its label map.

    For speed, jitter and normalisation run only on the cropped part; the result is identical to the byte.

    Args:
        rgb: H x W x 3.
        label: class ids at the size of the image or another size; resized by nearest neighbour.

    Returns:
        3 x H x W normalised image, H x W int64 label map (255 in the padding) or None, and the window.
    """
    length = None if settings.length is None else int(random.integers(settings.length[0], settings.length[1] + 1))
    height, width = resized(rgb.shape[0], rgb.shape[1], settings.side, length)
    if settings.scale is not None:
        factor = random.uniform(*settings.scale)
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
    rgb = resize(rgb, (height, width))
    if label is not None and label.shape != (height, width):
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8)
    flip = settings.flip and bool(random.random() < 0.5)
    if flip:
        rgb, label = cv2.flip(rgb, 1).astype(np.uint8, copy=False), None if label is None else label[:, ::-1]
    jitter = None if settings.jitter is None else Jitter.draw(settings.jitter, rgb, random)
    rows, columns = settings.crop or height, settings.crop or width
    top, left = _offset(height, rows, random), _offset(width, columns, random)
    window = Window(top / height, left / width, (top + rows) / height, (left + columns) / width, flip)
    down, across = slice(max(0, top), top + rows), slice(max(0, left), left + columns)
    rgb = (rgb[down] if jitter is None else jitter.apply(rgb[down]))[:, across]
    above, before = max(0, -top), max(0, -left)
    padding = (before, columns - before - rgb.shape[1], above, rows - above - rgb.shape[0])
    tensor = functional.pad(normalise(rgb), padding)
    if label is None:
        return tensor, None, window
    classes = torch.from_numpy(label[down, across].astype(np.int64))
    return tensor, functional.pad(classes, padding, value=IGNORE), window


def _offset(extent: int, crop: int, random: np.random.Generator) -> int:
    """Start of a random crop; negative if the image is smaller than the crop and lies at a random place within it."""
    low, high = sorted((0, extent - crop))
    return int(random.integers(low, high + 1))


class Jitter(NamedTuple):
    """Colour jitter: brightness, then contrast, saturation and hue."""

    brightness: float
    contrast: float
    saturation: float
    hue: int | None  # rotation in units of 2 degrees, as in OpenCV
    mean: np.float32  # mean grey level of the whole image after the brightness change; fixed point of the contrast

    @classmethod
    def draw(
        cls, strength: tuple[float, float, float, float], rgb: NDArray[np.uint8], random: np.random.Generator
    ) -> "Jitter":
        """Draw factors from 1 +- strength, and the hue rotation from +- ``strength[3]`` of the colour circle.

        Args:
            strength: strengths of brightness, contrast, saturation and hue.
            rgb: the whole H x W x 3 image.
        """
        brightness, contrast, saturation = (random.uniform(max(0, 1 - s), 1 + s) for s in strength[:3])
        hue = round(180 * random.uniform(-strength[3], strength[3])) if strength[3] > 0 else None
        return cls(brightness, contrast, saturation, hue, _grey(rgb.astype(np.float32) * brightness).mean())

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Apply the jitter to complete rows of the image.

        Rows must not be cropped: OpenCV converts hues in blocks and rounds differently in a smaller last block.
        """
        values = rgb.astype(np.float32) * self.brightness
        values = (values - self.mean) * self.contrast + self.mean
        grey = _grey(values)[..., None]
        values = (values - grey) * self.saturation + grey
        out = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
        if self.hue is not None:
            hsv = cv2.cvtColor(out, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + self.hue) % 180
            out = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8)
        return out


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """H x W grey levels. A matrix product could round each pixel differently depending on its position."""
    red, green, blue = (values[..., channel] * GREY[channel] for channel in range(3))
    return red + green + blue


class TrainingSet(Dataset[tuple[Any, ...]]):
    """Augmented training images; item (epoch, number) does not depend on the loading process or order.

    Args:
        images: the training images; their positions are the numbers.
        num_classes: K.
        labels: label maps of all images, or None.
        group: number of consecutive images that share a class if possible (``sampling.epoch_order``).

    Raises:
        PipelineError: ``labels`` lacks some images.
    """

    def __init__(
        self,
        images: Sequence[Image],
        num_classes: int,
        settings: Augmentation,
        seed: int,
        labels: "RasterStore | None" = None,
        group: int = 1,
    ) -> None:
        self.images = list(images)
        self.settings = settings
        self.seed = seed
        self.labels = labels
        self.group = group
        self.tags = torch.zeros(len(self.images), num_classes)
        for row, image in enumerate(self.images):
            self.tags[row, [tag - 1 for tag in image.tags]] = 1
        if labels is not None:
            missing = [image.id for image in self.images if image.id not in labels]
            if missing:
                raise PipelineError(
                    f"{labels.path}: has no label map for {len(missing)} training images, first {missing[0]}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        epoch, number = key
        image = self.images[number]
        random = rng(self.seed, Purpose.AUGMENTATION, epoch, number)
        label = None if self.labels is None else self.labels.get(image.id)
        tensor, classes, window = augment(read_rgb(image), label, self.settings, random)
        return tensor, self.tags[number], image.id, window, classes


def collate(items: list[tuple[Any, ...]]) -> Batch:
    """Stack items of equal size into a batch.

    Raises:
        PipelineError: the sizes differ.
    """
    images, tags, ids, windows, labels = zip(*items, strict=True)
    if len({image.shape for image in images}) > 1:
        raise PipelineError(
            "augmentation: the images of a batch differ in size; set crop, side: square, or batch_size: 1"
        )
    return Batch(
        torch.stack(images),
        torch.stack(tags),
        list(ids),
        list(windows),
        None if labels[0] is None else torch.stack(labels),
    )
