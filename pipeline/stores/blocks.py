"""Long work on many images that goes on where it was: rasters are computed block by block, and each block is kept.

A store's file cannot be resumed (``stores.raster``), so finished blocks lie as parts beside it until it is whole.
"""

import os
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline import interrupts
from pipeline.errors import PipelineError
from pipeline.stores.files import atomic
from pipeline.stores.raster import Raster, RasterStore, RasterWriter
from pipeline.stores.workers import Workers

Row = tuple[str, int, Raster]  # image id, class id, H x W values


class Identified(Protocol):
    @property
    def id(self) -> str: ...


_Image = TypeVar("_Image", bound=Identified)


def write_blocks(
    images: Sequence[_Image],
    compute: Callable[[Sequence[_Image]], Iterable[Row]],
    writer: RasterWriter,
    checkpoint: Path,
    size: int = 128,
    progress: Callable[[Sequence[_Image]], Iterable[_Image]] = iter,
) -> None:
    """Write the rasters of all ``images`` in their order; images without a raster are named in the store.

    Args:
        compute: gives the rows of a block of at most ``size`` images, in any order (so that it may batch images of
            equal shape), none for an image that has no raster. It must depend on nothing but its block.
        checkpoint: ``Work.checkpoint``: the folder of the parts, which the stage frame removes once the store is
            published.
        progress: wraps the images, e.g. ``partial(stage.progress, label=work.job.label)``.

    Raises:
        ValueError: a row of an image that is not in its block.
    """
    rows: dict[str, list[tuple[int, Raster]]] = {}
    for number, image in enumerate(progress(images)):
        interrupts.check()
        if number % size == 0:
            block = images[number : number + size]
            rows = _block(checkpoint / f"{number // size:05d}.npz", block, compute)
        writer.add_image(image.id)
        for class_id, raster in rows[image.id]:
            writer.append(image.id, raster, class_id)


def _block(
    part: Path, block: Sequence[_Image], compute: Callable[[Sequence[_Image]], Iterable[Row]]
) -> dict[str, list[tuple[int, Raster]]]:
    """The block's rows by image: from its part, or computed and kept as one."""
    ids = [image.id for image in block]
    rows = _load(part, ids)
    if rows is None:
        rows = _ordered(ids, compute(block))
        _save(part, ids, rows)
    return rows


def require(store: RasterStore, images: Sequence[Identified]) -> None:
    """Raises PipelineError naming the training images that the store lacks."""
    if missing := [image.id for image in images if image.id not in store]:
        raise PipelineError(
            f"{store.path}: lacks {len(missing)} training images: {listed(missing)}; run its stage again"
        )


def listed(ids: Sequence[str]) -> str:
    """Up to 20 image ids for an error message, and how many more there are."""
    return ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")


def _ordered(ids: list[str], rows: Iterable[Row]) -> dict[str, list[tuple[int, Raster]]]:
    found: dict[str, list[tuple[int, Raster]]] = {image_id: [] for image_id in ids}
    for image_id, class_id, raster in rows:
        if image_id not in found:
            raise ValueError(f"a raster of image {image_id}, which is not in the block at work")
        found[image_id].append((class_id, raster))
    return found


def _save(part: Path, ids: list[str], rows: dict[str, list[tuple[int, Raster]]]) -> None:
    table = [(n, class_id, *raster.shape) for n, name in enumerate(ids) for class_id, raster in rows[name]]
    values = [raster.reshape(-1) for name in ids for _, raster in rows[name]]
    with atomic(part) as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.array(ids, str),
            table=np.array(table, np.int64).reshape(-1, 4),
            values=np.concatenate(values) if values else np.zeros(0, np.uint8),
        )


def _load(part: Path, ids: list[str]) -> dict[str, list[tuple[int, Raster]]] | None:
    """The part's rows, or None where it is missing, damaged (its arrays carry a CRC) or of other images."""
    try:
        with np.load(part, allow_pickle=False) as arrays:
            stored, table, values = arrays["ids"].tolist(), arrays["table"].tolist(), arrays["values"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if stored != ids:
        return None
    rows: dict[str, list[tuple[int, Raster]]] = {image_id: [] for image_id in ids}
    start = 0
    for number, class_id, height, width in table:
        rows[ids[number]].append((class_id, values[start : start + height * width].reshape(height, width)))
        start += height * width
    return rows


@contextmanager
def parallel(label: str, workers: int, chunk: int = 4) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a ``map(function, items)`` that keeps the items' order: the built-in one, or one over worker processes.

    The processes are spawned, so that they inherit no lock or HDF5 handle from this one; ``function`` must be
    picklable. Each takes ``chunk`` items at a time.

    Raises:
        PipelineError: a worker ended before its time, or the workers stopped delivering.
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
            processes.kill()  # the executor would let them finish
            raise


def _map(
    executor: ProcessPoolExecutor, workers: Workers, chunk: int, function: Callable[..., Any], *items: Iterable[Any]
) -> Iterator[Any]:
    """Do as ``executor.map``, but never cancel a future: the executor's thread would fail on it after a kill."""
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
    """One thread of arithmetic each, and no worker outlives a parent that was killed."""
    import cv2

    cv2.setNumThreads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
