"""Segment many photos into an output folder: only what is missing, and the rest even if some photos are broken."""

import hashlib
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data import photos
from pipeline.errors import PipelineError, counted
from pipeline.memory import is_shortage
from wsss.folder import OutputError, OutputFolder
from wsss.formats import FORMATS, Item
from wsss.model import Model, Result
from wsss.sources import Source

AHEAD = 3  # photos that are read while the network runs


@dataclass(frozen=True)
class Task:
    """A photo to segment.

    Attributes:
        tags: names of the classes that may occur; None: all.
        limit: number of pixels above which the photo is refused.
    """

    source: Source
    tags: tuple[str, ...] | None = None
    limit: int = photos.PIXELS


@dataclass
class Outcome:
    """What became of the photos; ``faults`` has a line for each broken one."""

    segmented: int
    current: int
    faults: list[str]

    def counts(self) -> str:
        """A line such as '48 photos segmented, 2 up to date, 1 broken'."""
        broken = f", {len(self.faults)} broken" if self.faults else ""
        return f"{counted(self.segmented, 'photo')} segmented, {self.current} up to date{broken}"


def segment(
    model: Model, tasks: Sequence[Task], folder: OutputFolder, formats: Sequence[str], basis: Mapping[str, Any]
) -> Outcome:
    """Write the masks of photos in all formats, except those that are up to date.

    Args:
        basis: what all outputs depend on, such as the model's hash; the photo's hash and tags are added.

    Raises:
        OutputError: the output folder cannot be written.
    """
    outcome = Outcome(0, 0, [])
    terminal = sys.stderr.isatty()
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=len(tasks), unit="photo", mininterval=0.2 if terminal else 10) as bar,
    ):
        waiting: deque[tuple[Task, Future[tuple[dict[str, Any], NDArray[np.uint8] | None]]]] = deque()
        queue = iter(tasks)
        try:
            while True:
                while len(waiting) < AHEAD and (task := next(queue, None)) is not None:
                    waiting.append((task, pool.submit(_read, task, folder, formats, basis)))
                if not waiting:
                    return outcome
                task, future = waiting.popleft()
                try:
                    own_basis, rgb = future.result()
                    if rgb is None:
                        outcome.current += 1
                    else:
                        _write(model, task, rgb, folder, formats, own_basis)
                        outcome.segmented += 1
                except OutputError:
                    raise
                except PipelineError as error:
                    outcome.faults.extend(error.lines)
                bar.update()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(
    task: Task, folder: OutputFolder, formats: Sequence[str], shared: Mapping[str, Any]
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    """The photo's own basis and its pixels, which are None if its outputs are up to date."""
    try:
        data = task.source.file.read_bytes()
    except OSError as error:
        raise PipelineError(f"{task.source.file}: cannot be read: {error.strerror}") from None
    tags = None if task.tags is None else sorted(task.tags)
    basis = {**shared, "photo": hashlib.sha256(data).hexdigest(), "tags": tags}
    if folder.is_current(task.source, basis, formats):
        return basis, None
    return basis, photos.read(data, str(task.source.file), task.limit)


def _write(
    model: Model,
    task: Task,
    rgb: NDArray[np.uint8],
    folder: OutputFolder,
    formats: Sequence[str],
    basis: Mapping[str, Any],
) -> None:
    try:
        result = model.predict(rgb, task.tags)
    except Exception as error:
        if not is_shortage(error):
            raise
        size = f"{rgb.shape[1]}x{rgb.shape[0]}"
        raise PipelineError(
            f"{task.source.file}: {size} pixels need more memory than there is; use --megapixels, such as 1"
        ) from None
    names = folder.all_formats(task.source, formats)
    item = to_item(result, rgb, folder.name(task.source), task.source.relative, names)
    folder.write(task.source, item, basis, names)


def to_item(result: Result, rgb: NDArray[np.uint8], name: str, photo: str, formats: Sequence[str]) -> Item:
    """The photo and its segmentation as the formats take it; levels are computed only if a format needs them."""
    levels = {}
    if any(FORMATS[form].needs == "levels" for form in formats):
        for number in range(1, len(result.classes)):
            levels[number] = np.rint(result.probability(number) * 255).astype(np.uint8)
    height, width = result.mask.shape
    return Item(name, photo, height, width, result.classes, result.mask, rgb, levels, result.confidence, result.score)
