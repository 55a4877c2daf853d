"""Worker processes that die or stall end their stage with a one-line error; slow ones do not."""

import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import Augmentation
from pipeline.data import loader
from pipeline.data.index import Index
from pipeline.data.loader import LoadingPlan, load, loading_plan
from pipeline.data.loading import Item, TrainingSet
from pipeline.errors import PipelineError
from pipeline.stores import workers
from pipeline.stores.blocks import parallel
from pipeline.stores.raster import RasterStore, RasterWriter
from tests.harm import bus_error, call, compute, die, hang, leave
from tests.voc_tree import make_index

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=12))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "PATIENCE", 3)
    yield
    assert not active_children()


class Harmed(TrainingSet):
    """A training set that calls ``harm`` in the worker that loads image 5."""

    def __init__(self, index: Index, harm: Callable[[], object]) -> None:
        super().__init__(index.images("train"), 3, Augmentation(side="square", length=(16, 16)), 0)
        self.harm = harm

    def __getitem__(self, key: tuple[int, int]) -> Item:
        if key[1] == 5:
            self.harm()
        return super().__getitem__(key)


def test_a_worker_that_is_about_to_end_counts_as_gone() -> None:
    """Its connections break before the kernel reports its exit."""
    watch, context = workers.Workers("training"), get_context("fork")
    asked = context.Event()
    with watch.started():
        context.Process(target=asked.wait).start()
    with watch.watched():
        assert not watch.gone()
        asked.set()
        assert watch.gone(timeout=60)


def unreadable() -> None:
    raise PipelineError("img_005.jpg: cannot be read")


CASES = [
    (die, "training: a worker process was killed, probably because memory ran out; use fewer --workers"),
    (leave, "training: a worker process ended unexpectedly (exit status 3); run the stage with --workers 0"),
    (hang, "training: the worker processes stalled: no result and no activity for 3 s; run the stage again"),
]


@pytest.mark.parametrize(
    ("harm", "expected"), [*CASES, (bus_error, "training: a worker process ran out of space in /dev/shm")]
)
def test_a_stalled_loader_ends_with_a_one_line_error(index: Index, harm: Callable[[], object], expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(PipelineError) as caught:
        list(load(Harmed(index, harm), 2, [0], 0, LoadingPlan(2, label="training")))
    assert str(caught.value).startswith(expected)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 60


def test_an_image_error_is_raised_without_a_workers_traceback(index: Index) -> None:
    with pytest.raises(PipelineError) as caught:
        list(load(Harmed(index, unreadable), 2, [0], 0, LoadingPlan(2)))
    assert caught.value.lines == ("img_005.jpg: cannot be read",)


def test_a_worker_that_computes_is_waited_for(index: Index) -> None:
    assert sum(len(batch.ids) for batch in load(Harmed(index, compute), 2, [0], 0, LoadingPlan(2))) == 12


def test_workers_end_with_their_epoch_however_it_ends(index: Index) -> None:
    batches = load(Harmed(index, int), 2, [0], 0, LoadingPlan(2))
    next(batches)
    assert len(active_children()) == 2
    batches.close()


def test_the_same_workers_load_all_epochs(index: Index) -> None:
    """They start once, and the next epoch's first batches do not wait for the end of the epoch before."""
    batches = load(Harmed(index, int), 2, range(3), 0, LoadingPlan(2))
    pids = []
    for batch in batches:
        pids.append({process.pid for process in active_children()})
        assert len(batch.ids) == 2
    assert len(pids) == 3 * 6
    assert len(pids[0]) == 2
    assert all(seen == pids[0] for seen in pids[:-6])


@pytest.mark.parametrize(("harm", "expected"), CASES)
def test_a_stalled_pool_ends_with_a_one_line_error(harm: Callable[[], object], expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(PipelineError) as caught, parallel("training", 2, chunk=1) as each:
        list(each(call, [int, harm, int, int]))
    assert str(caught.value).startswith(expected)
    assert time.monotonic() - start < 60


def test_a_pools_worker_that_computes_is_waited_for() -> None:
    with parallel("training", 1, chunk=1) as each:
        assert len(set(each(call, [int, compute]))) == 1


class TestSharedMemory:
    @pytest.fixture
    def dataset(self, index: Index, tmp_path: Path) -> TrainingSet:
        """Crops of 500 x 500 pixels and their label maps: 1 MB each."""
        with RasterWriter(tmp_path / "labels.h5", "labels") as writer:
            for image in index.images("train"):
                writer.append(image.id, np.zeros((24, 32), np.uint8))
        labels = RasterStore(tmp_path / "labels.h5")
        return TrainingSet(index.images("train"), 3, Augmentation(crop=500), 0, labels)

    @pytest.mark.parametrize(
        ("megabytes", "expected"),
        [
            (10**12, LoadingPlan(4, 2, "x")),
            (1000, LoadingPlan(4, 2, "x")),
            (113, LoadingPlan(4, 2, "x")),  # 9 batches of 10 MB are 80 % of it
            (112, LoadingPlan(4, 1, "x")),
            (63, LoadingPlan(4, 1, "x")),
            (62, LoadingPlan(3, 1, "x")),
            (26, LoadingPlan(1, 1, "x")),
            (24, LoadingPlan(0, 1, "x")),
            (0, LoadingPlan(0, 1, "x")),
        ],
    )
    def test_workers_are_limited_to_what_fits(
        self,
        dataset: TrainingSet,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        megabytes: int,
        expected: LoadingPlan,
    ) -> None:
        monkeypatch.setattr(loader, "_free", lambda folder: megabytes * MEGABYTE)
        assert loading_plan(dataset, 10, 4, "x") == expected
        said = capsys.readouterr().out
        assert (said == "") == (expected == LoadingPlan(4, 2, "x"))
        assert said.count("\n") <= 1
        if said:
            assert f"x: /dev/shm has {megabytes} MB free, and 4 workers (batches of 10 MB) need 112 MB: " in said

    def test_without_workers_nothing_is_printed(
        self, dataset: TrainingSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(loader, "_free", lambda folder: 0)
        assert loading_plan(dataset, 10, 0, "x").workers == 0
        assert capsys.readouterr().out == ""

    def test_without_a_crop_the_largest_image_sets_the_batch_size(self, index: Index) -> None:
        of = {
            Augmentation(): 24 * 32,
            Augmentation(side="short", length=(48, 96)): 96 * 128,
            Augmentation(side="square", length=(50, 50), scale=(0.5, 2.0)): 100 * 100,
        }
        for settings, pixels in of.items():
            dataset = TrainingSet(index.images("train"), 3, settings, 0)
            assert loader._batch_bytes(dataset, 4) == 4 * pixels * 3

    def test_a_batch_that_does_not_fit_is_a_one_line_error(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another program may fill /dev/shm after the plan was computed."""

        def full(tensor: Any) -> None:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

        monkeypatch.setattr("torch.Tensor.share_memory_", full)
        with pytest.raises(PipelineError, match=r"^/dev/shm: no space for another batch .*--shm-size 1g\) or use"):
            list(load(Harmed(index, int), 2, [0], 0, LoadingPlan(2)))
