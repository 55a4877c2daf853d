"""Resumable computation of a raster store: block by block, with each finished block saved to disk.

An HDF5 store that was cut off cannot be continued (``stores.raster``). Finished blocks are therefore saved as separate
part files until the store is complete.
"""

import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline import arithmetic, interrupts, ranks
from pipeline.errors import PipelineError
from pipeline.memory import shortage
from pipeline.stores import sealed
from pipeline.stores.raster import Raster, RasterStore, RasterWriter
from pipeline.stores.workers import Workers

Row = tuple[str, int, Raster]  # image id, class id, H x W values
POLL = 0.02  # seconds between two looks for a part file of another rank


class Identified(Protocol):
    @property
    def id(self) -> str: ...


class Sized(Identified, Protocol):
    @property
    def size(self) -> tuple[int, int]: ...  # height, width


_Image = TypeVar("_Image", bound=Sized)


class Writer(Protocol):
    def add_image(self, image_id: str) -> None: ...

    def append(self, image_id: str, raster: Raster, class_id: int = 0) -> None: ...


class Writers:
    """Stores with one raster per image each, which are computed together. A row's class id selects its store."""

    def __init__(self, stores: Mapping[int, RasterWriter]) -> None:
        self._stores = stores

    def add_image(self, image_id: str) -> None:
        for store in self._stores.values():
            store.add_image(image_id)

    def append(self, image_id: str, raster: Raster, class_id: int = 0) -> None:
        self._stores[class_id].append(image_id, raster)


def write_blocks(
    images: Sequence[_Image],
    compute: Callable[[Sequence[_Image]], Iterable[Row]],
    writer: Writer,
    checkpoint: Path,
    size: int = 128,
    progress: Callable[[Sequence[_Image]], Iterable[_Image]] = iter,
) -> None:
    """Write the rasters of all ``images`` in their order; the store also lists images without a raster.

    Several ranks (``pipeline.ranks``) share the blocks: they compute them in turn and save them as part files, from
    which rank 0 writes. Only rank 0 returns. The bytes are those of one process.

    Args:
        compute: returns the rows of a block of at most ``size`` images in any order, so that it may batch images of
            equal shape. An image may have no row. The result must depend on the block alone.
        checkpoint: folder of the part files (``Work.checkpoint``). The stage frame removes it once the store is
            published.
        progress: wraps the iteration over the images, e.g. ``partial(stage.progress, label=work.job.label)``. It
            advances while a block is computed.

    Raises:
        PipelineError: the memory does not suffice.
        ValueError: ``compute`` returned a row of an image that is not in the block.
    """
    place = ranks.place()
    if place.rank:
        _compute_share(images, compute, checkpoint, size)
        ranks.leave()
    rows: dict[str, list[tuple[int, Raster]]] = {}
    shown = _Shown(progress(images))
    loaded, computed = set[str](), set[str]()  # kinds of arithmetic
    for number, image in enumerate(images):
        interrupts.check()
        if number % size == 0:
            block = images[number : number + size]
            part = _part(checkpoint, number, size)
            with arithmetic.recording():
                _await(part, number // size % place.count)
                stored = _load(part, [image.id for image in block])
                rows = _compute(part, block, shown.along(number, compute)) if stored is None else stored
                kinds = arithmetic.used()
            arithmetic.note(kinds)
            (computed if stored is None else loaded).update(kinds)
        shown.finish(number + 1)
        writer.add_image(image.id)
        for class_id, raster in rows[image.id]:
            writer.append(image.id, raster, class_id)
    if loaded and computed and loaded != computed:
        print(f"note: resumed in {'; '.join(sorted(computed))} after blocks in {'; '.join(sorted(loaded))}", flush=True)


def _part(checkpoint: Path, number: int, size: int) -> Path:
    """Return the part file of the block that starts at image ``number``."""
    return checkpoint / f"{number // size:05d}.part"


def _await(part: Path, rank: int) -> None:
    """Wait until another rank has saved this part file, or has ended.

    Raises:
        PipelineError: the rank has failed.
    """
    while rank and not part.exists() and ranks.working(rank):
        interrupts.check()
        time.sleep(POLL)


def _compute_share(
    images: Sequence[_Image], compute: Callable[[Sequence[_Image]], Iterable[Row]], checkpoint: Path, size: int
) -> None:
    """Compute this rank's blocks that have no part file yet."""
    place, shown = ranks.place(), _Shown(images)
    for number in range(place.rank * size, len(images), place.count * size):
        block, part = images[number : number + size], _part(checkpoint, number, size)
        with arithmetic.recording():
            if _load(part, [image.id for image in block]) is None:
                _compute(part, block, shown.along(number, compute))


class _Shown:
    """Progress over images, in their order, whatever the order in which they are finished."""

    def __init__(self, images: Iterable[Any]) -> None:
        self._images = iter(images)
        self._taken = 0

    def finish(self, count: int) -> None:
        """Show that ``count`` images are finished, unless more have been. Taking an image finishes the one before."""
        while self._taken <= count:
            next(self._images, None)
            self._taken += 1

    def along(
        self, start: int, compute: Callable[[Sequence[_Image]], Iterable[Row]]
    ) -> Callable[[Sequence[_Image]], Iterator[Row]]:
        """Wrap ``compute`` of the block that starts at image ``start`` to show each image that is finished."""

        def computed(block: Sequence[_Image]) -> Iterator[Row]:
            largest = max(block, key=lambda image: image.size[0] * image.size[1])
            where = f"{largest.id} ({largest.size[1]}x{largest.size[0]} pixels, the largest of a block of {len(block)})"
            begun: set[str] = set()
            with shortage(where, "reduce dataset.working_megapixels, or the scales (test.scales or the block's)"):
                for row in compute(block):
                    begun.add(row[0])
                    self.finish(start + len(begun) - 1)
                    yield row

        return computed


def _compute(
    part: Path, block: Sequence[_Image], compute: Callable[[Sequence[_Image]], Iterable[Row]]
) -> dict[str, list[tuple[int, Raster]]]:
    """Compute the rows of the block by image, and save them in its part file."""
    ids = [image.id for image in block]
    rows = _by_image(ids, compute(block))
    _save(part, ids, rows)
    return rows


def require(store: RasterStore, images: Sequence[Identified]) -> None:
    """Check that the store has all ``images``.

    Raises:
        PipelineError: some are missing; the message lists them.
    """
    if missing := [image.id for image in images if image.id not in store]:
        raise PipelineError(
            f"{store.path}: lacks {len(missing)} training images: {listed(missing)}; run its stage again"
        )


def listed(ids: Sequence[str]) -> str:
    """Format image ids for an error message: the first 20, then the number of the others."""
    return ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")


def _by_image(ids: list[str], rows: Iterable[Row]) -> dict[str, list[tuple[int, Raster]]]:
    grouped: dict[str, list[tuple[int, Raster]]] = {image_id: [] for image_id in ids}
    for image_id, class_id, raster in rows:
        if image_id not in grouped:
            raise ValueError(f"image {image_id} has a raster but is not in the current block")
        grouped[image_id].append((class_id, raster))
    return grouped


def _save(part: Path, ids: list[str], rows: dict[str, list[tuple[int, Raster]]]) -> None:
    table = [(n, class_id, *raster.shape) for n, name in enumerate(ids) for class_id, raster in rows[name]]
    values = [raster.reshape(-1) for name in ids for _, raster in rows[name]]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=np.array(ids, str),
        table=np.array(table, np.int64).reshape(-1, 4),
        values=np.concatenate(values) if values else np.zeros(0, np.uint8),
        arithmetic=np.array(arithmetic.used(), str),
    )
    sealed.write(part, buffer.getbuffer())


def _load(part: Path, ids: list[str]) -> dict[str, list[tuple[int, Raster]]] | None:
    """Read a part file and note its arithmetic; None if it is missing, damaged or holds other images."""
    try:
        payload = sealed.read(part)
    except (FileNotFoundError, PipelineError):
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        stored, table, values = arrays["ids"].tolist(), arrays["table"].tolist(), arrays["values"]
        kinds = arrays["arithmetic"].tolist()
    if stored != ids:
        return None
    arithmetic.note(kinds)
    rows: dict[str, list[tuple[int, Raster]]] = {image_id: [] for image_id in ids}
    start = 0
    for number, class_id, height, width in table:
        rows[ids[number]].append((class_id, values[start : start + height * width].reshape(height, width)))
        start += height * width
    return rows


@contextmanager
def parallel(label: str, workers: int, chunk: int = 4) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield an order-preserving ``map(function, items)``: the built-in one if ``workers`` is 0, else a parallel one.

    Worker processes are spawned, so that they inherit no lock or HDF5 handle; ``function`` must be picklable. Each
    worker takes ``chunk`` items at a time.

    Raises:
        PipelineError: a worker died, or the workers stalled.
    """
    if workers == 0:
        yield map
        return
    processes = Workers(label)
    with processes.watched(), ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as executor:
        try:
            yield partial(_map, executor, processes, chunk)
        except BrokenProcessPool:
            raise processes.failure() from None
        except BaseException:
            processes.kill()  # the executor would wait for them to finish
            raise


def _map(
    executor: ProcessPoolExecutor, workers: Workers, chunk: int, function: Callable[..., Any], *items: Iterable[Any]
) -> Iterator[Any]:
    """Like ``executor.map``, but never cancel a future: the executor's thread would fail on it after a kill."""
    calls = list(zip(*items, strict=True))
    with workers.started():
        futures = deque(
            executor.submit(_apply, function, calls[start : start + chunk]) for start in range(0, len(calls), chunk)
        )
    return _awaited(futures, workers)


def _apply(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    return [function(*arguments) for arguments in calls]


def _awaited(futures: "deque[Future[list[Any]]]", workers: Workers) -> Iterator[Any]:
    while futures:
        with workers.waiting():
            results = futures.popleft().result()
        yield from results


def _start_worker() -> None:
    """Limit OpenCV to one thread, and exit when the parent process dies."""
    import cv2

    cv2.setNumThreads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
