"""Batches by worker processes: the same whoever loads them, within the shared memory that is free."""

import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.data.loading import Batch, TrainingSet, collate, resized
from pipeline.data.sampling import epoch_order
from pipeline.errors import PipelineError
from pipeline.stores.workers import Workers

SHARED = "/dev/shm"  # where PyTorch keeps the tensors that a worker hands over
SHARE = 0.8  # of what is free there
AHEAD = 2  # batches that each worker prepares, as PyTorch's own default


@dataclass(frozen=True)
class LoadingPlan:
    """How many processes load, and how many batches ahead each of them. No part of the result."""

    workers: int = 0
    ahead: int = AHEAD
    label: str = "loader"  # names the stage in messages


def loading_plan(dataset: TrainingSet, batch_size: int, workers: int, label: str) -> LoadingPlan:
    """As many of the workers as /dev/shm has room for; where they are fewer than asked for, says so in one line.

    Beside the batches that the workers prepare there is room for the one that is trained on.
    """
    size = _batch_bytes(dataset, batch_size)
    free = _free(SHARED)
    plan = _fitting(workers, int(SHARE * free / size) - 1, label)
    if plan != LoadingPlan(workers, AHEAD, label):
        need = (workers * AHEAD + 1) * size / SHARE
        loads = f"it starts {plan.workers}, each one batch ahead" if plan.workers else "the main process loads"
        print(
            f"{label}: {SHARED} has {free / 1e6:.0f} MB free, and {workers} workers (batches of {size / 1e6:.0f} MB) "
            f"need {need / 1e6:.0f} MB: {loads}; enlarge it, as by docker run --shm-size, to load faster",
            flush=True,
        )
    return plan


def _fitting(workers: int, room: int, label: str) -> LoadingPlan:
    """``room``: batches. One batch ahead of each worker comes before fewer workers."""
    if workers * AHEAD <= max(0, room):
        return LoadingPlan(workers, AHEAD, label)
    return LoadingPlan(max(0, min(workers, room)), 1, label)


def _batch_bytes(dataset: TrainingSet, batch_size: int) -> int:
    """The largest batch of this dataset, its label maps included."""
    settings = dataset.settings
    if settings.crop is not None:
        pixels = settings.crop**2
    else:
        length = None if settings.length is None else settings.length[1]
        sizes = (resized(image.height, image.width, settings.side, length) for image in dataset.images)
        scale = 1.0 if settings.scale is None else settings.scale[1]
        pixels = int(scale**2 * max((height * width for height, width in sizes), default=1))
    return batch_size * pixels * (3 * 4 + (0 if dataset.labels is None else 8))


def _free(folder: str) -> int:
    """Bytes; unlimited where there is no such folder, since PyTorch then does not use it."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize


class Batches:
    """The batches of one epoch from batch number ``first`` on, in an order that seed and epoch decide.

    The batch size counts images; as a multiple of the dataset's ``group`` it cuts no group in two.
    """

    def __init__(self, dataset: TrainingSet, batch_size: int, epoch: int, first: int = 0) -> None:
        order = epoch_order([image.tags for image in dataset.images], dataset.group, dataset.seed, epoch)
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        self.batches = [[(epoch, number) for number in batch] for batch in batches[first:]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Source(Dataset[Batch]):
    """Whole batches of a training set. A fault comes back in the place of its batch: PyTorch would add a traceback."""

    def __init__(self, dataset: TrainingSet) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | PipelineError:
        try:
            batch = collate([self.dataset[key] for key in keys])
            return batch if get_worker_info() is None else _shared(batch)
        except PipelineError as fault:
            return fault


def _shared(batch: Batch) -> Batch:
    """The batch in shared memory. Left to PyTorch, it gets there in a thread whose failure nobody would learn of."""
    try:
        for tensor in (batch.images, batch.tags, batch.labels):
            if tensor is not None:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise PipelineError(
            f"{SHARED}: no space for another batch ({error}); enlarge it (e.g. docker run --shm-size 1g) "
            "or use fewer --workers"
        ) from None
    return batch


def _one_thread(worker: int) -> None:
    """OpenCV's threads would take the cores from the other workers, and do not survive a fork."""
    cv2.setNumThreads(0)


def data_loader(
    dataset: TrainingSet, batch_size: int, epoch: int, first: int, plan: LoadingPlan
) -> DataLoader[Batch | PipelineError]:
    """PyTorch's loader of an epoch's batches, from batch number ``first`` on."""
    return DataLoader(
        _Source(dataset),
        batch_sampler=Batches(dataset, batch_size, epoch, first),
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # _Source collates
        num_workers=plan.workers,
        prefetch_factor=plan.ahead if plan.workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one, and a resumed run would differ
    )


def load(
    dataset: TrainingSet, batch_size: int, epoch: int, first: int, plan: LoadingPlan = LoadingPlan()
) -> Generator[Batch, None, None]:
    """Load an epoch's batches; the same whatever the plan.

    Raises:
        PipelineError: an image cannot be read, or the workers stopped delivering.
    """
    loader = data_loader(dataset, batch_size, epoch, first, plan)
    for batch in _delivered(loader, plan) if plan.workers else loader:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch


def _as_it_is(batch: Batch | PipelineError) -> Batch | PipelineError:
    return batch


def _delivered(loader: DataLoader[Any], plan: LoadingPlan) -> Iterator[Batch | PipelineError]:
    """What the loader's workers deliver."""
    workers = Workers(plan.label)
    before = signal.getsignal(signal.SIGCHLD)
    with workers.started():
        iterator = iter(loader)
    # PyTorch's handler tells of a dead worker wherever the main thread is, in the middle of an optimizer step, too.
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
            if workers.gone():
                raise workers.failure() from None
            raise
        finally:
            del iterator  # PyTorch ends its workers
