"""Batch loading by worker processes, limited to the free shared memory; batches do not depend on the workers.

The workers live as long as the training. They ship bytes; the training device turns these into inputs
(``LoadedBatch.to``). A training on the CPU leaves the colour jitter to its workers as well.
"""

import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline import ranks
from pipeline.data.collation import LoadedBatch, collate
from pipeline.data.loading import Item, TrainingSet, resized
from pipeline.data.sampling import epoch_order
from pipeline.errors import PipelineError
from pipeline.stores.workers import Workers

SHM = "/dev/shm"  # PyTorch passes tensors from workers through this folder
SHM_SHARE = 0.8  # share of its free space that batches may use
PREFETCH = 2  # batches that each worker prepares ahead; PyTorch's default


@dataclass(frozen=True)
class LoadingPlan:
    """Number of worker processes and of batches that each prepares ahead. It does not affect results."""

    workers: int = 0
    prefetch: int = PREFETCH
    label: str = "loader"  # name of the stage in messages
    gpu: bool = False  # the batches go to a GPU: pin them, and leave the colour jitter to it
    unit: int = 1  # consecutive images of a batch that one rank must compute together


def loading_plan(
    dataset: TrainingSet, batch_size: int, workers: int, label: str, gpu: bool = False, unit: int = 1
) -> LoadingPlan:
    """Plan with as many of ``workers`` as fit into /dev/shm; prints one line if these are fewer than requested.

    Space is reserved for the prefetched batches and for the one in training. In a training of several ranks,
    ``workers`` are those of each rank, which load its parts of batches of ``batch_size``: together they need the space
    of one rank that loads whole batches.
    """
    size = _batch_bytes(dataset, batch_size)
    free = _free(SHM)
    full = LoadingPlan(workers, PREFETCH, label, gpu, unit)
    plan = _largest_plan(full, int(SHM_SHARE * free / size) - 1)
    if plan != full:
        need = (workers * PREFETCH + 1) * size / SHM_SHARE
        loads = f"using {plan.workers}, each one batch ahead" if plan.workers else "the main process loads"
        print(
            f"{label}: {SHM} has {free / 1e6:.0f} MB free, and {workers} workers (batches of {size / 1e6:.0f} MB) "
            f"need {need / 1e6:.0f} MB: {loads}; enlarge it (e.g. docker run --shm-size) to load faster",
            flush=True,
        )
    return plan


def _largest_plan(full: LoadingPlan, capacity: int) -> LoadingPlan:
    """Fit the plan into ``capacity`` batches: first reduce prefetching to one batch, then the number of workers."""
    if full.workers * PREFETCH <= max(0, capacity):
        return full
    return replace(full, workers=max(0, min(full.workers, capacity)), prefetch=1)


def _batch_bytes(dataset: TrainingSet, batch_size: int) -> int:
    """Bytes of the largest batch of this dataset, including label maps and maps."""
    settings = dataset.settings
    if settings.crop is not None:
        pixels = settings.crop**2
    else:
        length = None if settings.length is None else settings.length[1]
        sizes = (resized(image.height, image.width, settings.side, length) for image in dataset.images)
        scale = 1.0 if settings.scale is None else settings.scale[1]
        pixels = int(scale**2 * max((height * width for height, width in sizes), default=1))
    maps = max((sum(dataset.areas(image.id).values()) for image in dataset.images), default=0)
    return batch_size * (pixels * (3 + (0 if dataset.labels is None else 1)) + maps)


def _free(folder: str) -> int:
    """Free bytes in ``folder``; unlimited if it does not exist, since PyTorch does not use it then."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return sys.maxsize
    return status.f_bavail * status.f_frsize


class Batches:
    """Batch sampler: the (epoch, image number) keys of an epoch's batches, starting at batch number ``start``.

    The order depends only on seed and epoch. Batches whose size is a multiple of ``group`` split no group.
    """

    def __init__(self, dataset: TrainingSet, batch_size: int, epoch: int, start: int = 0) -> None:
        order = epoch_order([image.tags for image in dataset.images], dataset.group, dataset.seed, epoch)
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        self.batches = [[(epoch, number) for number in batch] for batch in batches[start:]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Epochs:
    """Batch sampler: the keys of this rank's parts of the batches of consecutive epochs.

    The first epoch starts at batch number ``start``. A rank without a part loads the first images (``ranks.loaded``).
    """

    def __init__(self, dataset: TrainingSet, batch_size: int, epochs: Sequence[int], start: int, unit: int) -> None:
        self.dataset, self.batch_size, self.epochs, self.start, self.unit = dataset, batch_size, epochs, start, unit

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, epoch in enumerate(self.epochs):
            for batch in Batches(self.dataset, self.batch_size, epoch, 0 if number else self.start):
                yield batch[ranks.place().loaded(len(batch), self.unit)]


class _BatchDataset(Dataset[LoadedBatch]):
    """Collated batches of a training set. Errors are returned, since PyTorch would add a traceback to a raised one."""

    def __init__(self, dataset: TrainingSet, gpu: bool) -> None:
        self.dataset, self.gpu = dataset, gpu

    def __getitems__(self, keys: list[tuple[int, int]]) -> LoadedBatch | PipelineError:
        try:
            items = [self.dataset[key] for key in keys]
            batch = self._collated(items, shared=get_worker_info() is not None)
            if not self.gpu:
                batch.jitter_in_place()
            return batch
        except PipelineError as error:
            return error

    def _collated(self, items: list[Item], shared: bool) -> LoadedBatch:
        """Collate in shared memory: PyTorch would move the batch there in a thread whose failure goes unnoticed."""
        try:
            return collate(items, shared)
        except RuntimeError as error:
            raise PipelineError(
                f"{SHM}: no space for another batch ({error}); enlarge it (e.g. docker run --shm-size 1g) "
                "or use fewer --workers"
            ) from None


def _init_worker(worker: int) -> None:
    """Disable OpenCV's threads: they compete with the other workers and do not survive a fork."""
    cv2.setNumThreads(0)


def data_loader(
    dataset: TrainingSet, batch_size: int, epochs: Sequence[int], start: int, plan: LoadingPlan
) -> DataLoader[LoadedBatch | PipelineError]:
    """Create PyTorch's loader of all batches of consecutive epochs, from batch number ``start`` of the first one."""
    return DataLoader(
        _BatchDataset(dataset, plan.gpu),
        batch_sampler=_Epochs(dataset, batch_size, epochs, start, plan.unit),
        collate_fn=_identity,  # type: ignore[arg-type]  # _BatchDataset collates
        num_workers=plan.workers,
        prefetch_factor=plan.prefetch if plan.workers else None,
        worker_init_fn=_init_worker,
        pin_memory=plan.gpu,
        generator=torch.Generator(),  # the global generator would advance, so that a resumed run would differ
    )


def load(
    dataset: TrainingSet, batch_size: int, epochs: Sequence[int], start: int = 0, plan: LoadingPlan = LoadingPlan()
) -> Generator[LoadedBatch, None, None]:
    """Load the batches of consecutive epochs, from batch number ``start`` of the first one.

    The same worker processes load all epochs, so that the first batches of an epoch are ready when the epoch before
    ends. The batches do not depend on ``plan``.

    Raises:
        PipelineError: an image cannot be read, or the workers died or stalled.
    """
    loader = data_loader(dataset, batch_size, epochs, start, plan)
    for batch in _from_workers(loader, plan) if plan.workers else loader:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch


def _identity(batch: LoadedBatch | PipelineError) -> LoadedBatch | PipelineError:
    return batch


def _from_workers(loader: DataLoader[Any], plan: LoadingPlan) -> Iterator[LoadedBatch | PipelineError]:
    """Yield the loader's batches while ``Workers`` watches its processes."""
    workers = Workers(plan.label)
    before = signal.getsignal(signal.SIGCHLD)
    with workers.started():
        iterator = iter(loader)
    # PyTorch's handler raises for a dead worker at any point of the main thread, even within an optimizer step.
    if signal.getsignal(signal.SIGCHLD) != before:
        signal.signal(signal.SIGCHLD, before)
    with workers.watched():
        try:
            while True:
                with workers.waiting():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        except Exception:
            if workers.gone(timeout=1.0):
                raise workers.failure() from None
            raise
        finally:
            del iterator  # this ends PyTorch's workers
