"""The library: load a model file and segment photos."""

import copy
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.config.schema import Test
from pipeline.data import photos
from pipeline.data.faults import hint
from pipeline.data.images import working_size
from pipeline.data.loading import normalise
from pipeline.errors import PipelineError
from pipeline.inference import model_file
from pipeline.inference.batching import pixels_per_batch
from pipeline.inference.folding import placed
from pipeline.inference.segment import class_probabilities, enlarged, label_map, refine
from pipeline.inference.shapes import FewShapes
from pipeline.training.settings import uses_bf16

BACKGROUND = "background"
Photo = str | Path | bytes | NDArray[Any] | Image.Image
"""A path, the bytes of a file, an array (H x W, H x W x 3 RGB, H x W x 4 RGBA; uint8 or uint16) or a Pillow image."""


@dataclass(frozen=True)
class Result:
    """The segmentation of one photo, at the size at which a viewer shows it.

    Attributes:
        mask: H x W uint8 class ids; 0 is the background.
        classes: the name of each class id; ``classes[0]`` is 'background'.
        confidence: for each class id in the mask, its mean probability over the pixels that have it.
        score: the mean probability of the mask's class over all pixels.
        scores: (K + 1) x h x w float32 probabilities at the size that the network saw: smaller than the photo if that
            has more than ``Model.megapixels``.
    """

    mask: NDArray[np.uint8]
    classes: tuple[str, ...]
    confidence: Mapping[int, float]
    score: float
    scores: NDArray[np.float32]

    @property
    def names(self) -> list[str]:
        """Names of the object classes in the mask."""
        return [self.classes[number] for number in self.confidence if number]

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """(K + 1) x H x W float32 probabilities; the mask is their argmax."""
        return np.stack([self.probability(number) for number in range(len(self.classes))])

    def probability(self, class_id: int) -> NDArray[np.float32]:
        """H x W float32 probabilities of one class."""
        if self.scores.shape[1:] == self.mask.shape:
            return self.scores[class_id]
        size = self.mask.shape[0], self.mask.shape[1]
        return np.asarray(enlarged(torch.from_numpy(self.scores[class_id]), size).numpy())


class Model:
    """A trained segmentation network.

    Attributes:
        classes: the name of each class id; ``classes[0]`` is 'background'.
        test: the test protocol: scales, flip and crf.
        megapixels: the network sees larger photos reduced to this; results are enlarged again.
        metadata: the network's settings, normalisation and provenance (``pipeline.inference.model_file``).
        device: where the network runs.
    """

    def __init__(self, content: model_file.ModelFile, device: torch.device, test: Test, megapixels: float) -> None:
        self.network = content.network
        self.classes = (BACKGROUND, *content.classes)
        self.metadata = content.metadata
        self.test = test
        self.megapixels = megapixels
        self.device = device
        self._tables = content.tables
        self._precision = content.precision

    @cached_property
    def _folded(self) -> nn.Module:
        """The network as the prediction stage uses it. ``network`` itself stays as it was trained, for exports."""
        if not uses_bf16(self.device, self._precision):
            return self.network
        return placed(copy.deepcopy(self.network).cpu(), self.device, self._precision)

    def predict(self, photo: Photo, tags: Iterable[str] | None = None) -> Result:
        """Segment a photo.

        Args:
            tags: names of the classes that may occur; no other class gets a pixel. None: all classes.

        Raises:
            PipelineError: the photo cannot be read, or a tag is not a class.
            ValueError: an array has a shape or type that is not that of a photo.
        """
        return self.predict_batch([photo], [tags])[0]

    def predict_batch(
        self, photos: Sequence[Photo], tags: Sequence[Iterable[str] | None] | None = None
    ) -> list[Result]:
        """Segment several photos. Those of equal size pass through the network together, as many as suit the device.

        Args:
            photos: the photos, as for ``predict``.
            tags: of each photo, as for ``predict``. None: all classes for all photos.

        Raises:
            PipelineError: a photo cannot be read, or a tag is not a class.
            ValueError: ``tags`` has another length, or an array is not a photo.
        """
        if tags is not None and len(tags) != len(photos):
            raise ValueError(f"tags has {len(tags)} items for {len(photos)} photos; use None for an untagged photo")
        allowed = [self.class_ids(names) for names in tags or [None] * len(photos)]
        pixels = [read(photo) for photo in photos]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, rgb in enumerate(pixels):
            groups.setdefault(working_size((rgb.shape[0], rgb.shape[1]), self.megapixels), []).append(number)
        results: dict[int, Result] = {}
        for size, numbers in groups.items():
            step = max(1, pixels_per_batch(self.device) // (size[0] * size[1]))
            for start in range(0, len(numbers), step):
                part = numbers[start : start + step]
                reduced = [_reduced(pixels[number], size) for number in part]
                inputs = torch.stack([normalise(rgb, self._tables) for rgb in reduced]).to(self.device)
                named = [_named(photos[number]) for number in part]
                with FewShapes() if self.device.type == "cuda" else nullcontext():
                    scores = class_probabilities(self._folded, named, inputs, self.test, self._precision)
                for number, rgb, probabilities in zip(part, reduced, scores, strict=True):
                    shape = pixels[number].shape
                    results[number] = self._result(probabilities, rgb, (shape[0], shape[1]), allowed[number])
        return [results[number] for number in range(len(photos))]

    def predict_stream(
        self, photos: Iterable[Photo], tags: Iterable[Iterable[str] | None] | None = None
    ) -> Iterator[Result]:
        """Yield the results of photos one by one; the next ones are read while the network runs.

        Args:
            photos: any number of photos, as for ``predict``; they are not held in memory.
            tags: of each photo, as for ``predict``. None: all classes for all photos.

        Raises:
            PipelineError: a photo cannot be read, or a tag is not a class. The stream ends there.
        """
        named = iter(tags) if tags is not None else None
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[tuple[Future[NDArray[np.uint8]], Iterable[str] | None]] = deque()
            for photo in photos:
                waiting.append((pool.submit(read, photo), next(named) if named is not None else None))
                if len(waiting) > 2:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)

    def _next(self, waiting: deque[tuple[Future[NDArray[np.uint8]], Iterable[str] | None]]) -> Result:
        pixels, tags = waiting.popleft()
        return self.predict(pixels.result(), tags)

    def class_ids(self, tags: Iterable[str] | None) -> list[int] | None:
        """Ids of the classes with these names, and of the background. Case and blanks are ignored.

        Raises:
            PipelineError: a name is not that of a class.
        """
        if tags is None:
            return None
        if isinstance(tags, str):
            raise ValueError(f"tags must be a list of names, not the text {tags!r}")
        ids = {_folded(name): number for number, name in enumerate(self.classes)}
        faults = [
            f"tag {name!r}: is not a class of the model; {hint(name, self.classes[1:], self._choices())}"
            for name in tags
            if _folded(name) not in ids
        ]
        if faults:
            raise PipelineError(*faults)
        return sorted({0, *(ids[_folded(name)] for name in tags)})

    def _choices(self) -> str:
        return f"its classes are {', '.join(self.classes[1:21])}{', ...' if len(self.classes) > 21 else ''}"

    def _result(
        self, probabilities: Tensor, rgb: NDArray[np.uint8], size: tuple[int, int], allowed: list[int] | None
    ) -> Result:
        if allowed is not None:
            kept = torch.zeros_like(probabilities)
            kept[allowed] = probabilities[allowed]
            probabilities = kept / kept.sum(0).clamp_min(torch.finfo(kept.dtype).tiny)
        if self.test.crf is not None:
            probabilities = refine(rgb, probabilities, self.test.crf)
        mask, best = label_map(probabilities, size)
        counts = np.bincount(mask.reshape(-1))
        sums = np.bincount(mask.reshape(-1), weights=best.reshape(-1))
        confidence = {int(number): float(sums[number] / counts[number]) for number in counts.nonzero()[0]}
        return Result(mask, self.classes, confidence, float(best.mean(dtype=np.float64)), probabilities.cpu().numpy())


def load(path: str | Path, device: str = "auto", crf: bool = True, megapixels: float | None = None) -> Model:
    """Load a model file, such as results/EXPERIMENT/predictions/ROW/model.safetensors.

    Args:
        device: 'auto' (CUDA if there is a card, else the CPU), 'cpu', 'cuda' or 'cuda:N'.
        crf: run the dense CRF if the test protocol has one; it needs pydensecrf.
        megapixels: the network sees larger photos reduced to this; None: as the model was evaluated.

    Raises:
        PipelineError: the file is not a model, or the device does not exist.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise PipelineError(f"device {device}: no such device; use auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        fix = f"the GPUs are cuda:0 to cuda:{count - 1}" if count else "this torch sees no CUDA device; use cpu"
        raise PipelineError(f"device {device}: {fix}")
    content = model_file.read(Path(path), place)
    test = content.test if crf else dataclasses.replace(content.test, crf=None)
    return Model(content, place, test, content.megapixels if megapixels is None else megapixels)


def read(photo: Photo) -> NDArray[np.uint8]:
    """Read a photo in any of its forms as H x W x 3 uint8 RGB, upright (``pipeline.data.photos``)."""
    if isinstance(photo, np.ndarray):
        return photos.from_pixels(photo)
    if isinstance(photo, Image.Image):
        return photos.from_picture(photo)
    return photos.read(photo if isinstance(photo, bytes) else Path(photo))


class _Named(NamedTuple):
    """A photo as messages name it."""

    id: str


def _named(photo: Photo) -> _Named:
    return _Named(str(photo) if isinstance(photo, str | Path) else "the photo")


def _reduced(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Reduce to the working size as ``pipeline.data.images.read_rgb`` does."""
    if rgb.shape[:2] == size:
        return rgb
    return np.asarray(cv2.resize(rgb, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())
