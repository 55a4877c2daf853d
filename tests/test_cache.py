"""Decoded images in memory: shared by processes, within the budget, and without an effect on the batches."""

import os
import pickle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline import memory, runtime
from pipeline.config.dataset import Dataset
from pipeline.config.schema import Augmentation, Training
from pipeline.data import loading
from pipeline.data.cache import Cache
from pipeline.data.index import Index
from pipeline.data.loader import LoadingPlan, data_loader, load
from pipeline.data.loading import TrainingSet
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime, cache_budget
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.training.loop import Loop
from pipeline.workflow import stage
from tests.test_augment import blocks
from tests.test_training import TinyTask
from tests.voc_tree import make_index, make_tree, minimal_params

CPU = torch.device("cpu")


def fill(cache: Cache, number: int) -> None:
    cache.put(number, np.full(3, number + 7, np.uint8))


class TestCache:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_what_a_child_stores_all_processes_read(self, method: str) -> None:
        cache = Cache([3, 3, 3], 100)
        child = get_context(method).Process(target=fill, args=(cache, 1))  # type: ignore[attr-defined]
        child.start()
        child.join()
        assert child.exitcode == 0
        assert cache.get(0) is None
        found = cache.get(1)
        assert found is not None
        assert found.tolist() == [8, 8, 8]
        assert not found.flags.writeable

    @pytest.mark.parametrize(("budget", "count"), [(0, 0), (3, 0), (4, 1), (9, 2), (10, 3), (1000, 3)])
    def test_the_first_arrays_within_the_budget_have_a_place(self, budget: int, count: int) -> None:
        cache = Cache([4, 5, 1], budget)
        assert cache.count == count
        for number, size in enumerate((4, 5, 1)):
            cache.put(number, np.arange(size, dtype=np.uint8))
            found = cache.get(number)
            assert (found is None) == (number >= count)
            assert found is None or found.tolist() == list(range(size))

    def test_nothing_is_stored_once_the_memory_is_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available", lambda: 99)
        for reserve, stored in ((100, False), (99, True)):
            cache = Cache([3], 100, reserve)
            fill(cache, 0)
            assert (cache.get(0) is not None) == stored

    def test_it_needs_no_folder_and_leaves_no_descriptor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = os.listdir("/proc/self/fd")
        cache = Cache([1 << 40], 1 << 41)  # far more than /dev/shm or the memory: pages come as they are filled
        assert cache.count == 1
        del cache
        assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=7))


@pytest.fixture(scope="module")
def labels(index: Index, tmp_path_factory: pytest.TempPathFactory) -> RasterStore:
    """Every second label map has another size than its image."""
    path = tmp_path_factory.mktemp("labels") / "labels.h5"
    with RasterWriter(path, "labels") as writer:
        for number, image in enumerate(index.images("train")):
            step = 1 + number % 2
            writer.append(image.id, blocks(image.height, image.width, number)[1][::step, ::step])
    return RasterStore(path)


SETTINGS = {
    "whole": Augmentation(side="square", length=(20, 20)),
    "fixed": Augmentation(side="short", length=(40, 40), jitter=(0.3, 0.3, 0.3, 0.1), crop=28),
    "drawn": Augmentation(side="long", length=(20, 60), crop=28),
    "scaled": Augmentation(scale=(0.7, 1.3), crop=20),
    "both": Augmentation(side="short", length=(30, 30), scale=(0.7, 1.3), crop=20),
    "plain": Augmentation(crop=24),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("budget", [10**9, 7000, 0])
def test_batches_do_not_depend_on_what_is_kept(
    index: Index, labels: RasterStore, settings: str, workers: int, budget: int
) -> None:
    """All, some or none of the images and label maps are kept; the second and third epoch read what the first kept."""
    plain, keeping = (TrainingSet(index.images("train"), 3, SETTINGS[settings], 5, labels) for _ in range(2))
    assert (keeping.keep(budget) == 7) == (budget == 10**9)
    expected = load(plain, 2, range(3))
    for one, other in zip(expected, load(keeping, 2, range(3), 0, LoadingPlan(workers)), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.pixels, other.pixels)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)


def test_each_image_is_decoded_once(index: Index, labels: RasterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    read = loading.read_rgb
    monkeypatch.setattr(loading, "read_rgb", lambda image: decoded.append(image.id) or read(image))
    dataset = TrainingSet(index.images("train"), 3, SETTINGS["scaled"], 5, labels)
    dataset.keep(10**9)
    list(load(dataset, 2, range(3)))
    assert sorted(decoded) == [image.id for image in index.images("train")]


def test_spawned_workers_load_the_same(index: Index, labels: RasterStore) -> None:
    dataset = TrainingSet(index.images("train"), 3, SETTINGS["fixed"], 5, labels)
    dataset.keep(10**9)
    here = [batch.pixels for batch in load(dataset, 2, [0, 1])]
    loader = data_loader(dataset, 2, [0, 1], 0, LoadingPlan(1))
    loader.multiprocessing_context = "spawn"
    there: list[Any] = list(loader)
    assert all(torch.equal(one, other.pixels) for one, other in zip(here, there, strict=True))


def test_a_store_that_is_passed_on_opens_its_file_anew(labels: RasterStore) -> None:
    labels.get("img_000")
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.get("img_003").tolist() == labels.get("img_003").tolist()


class TestMemory:
    def write(self, root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    @pytest.mark.parametrize(
        ("group", "files", "expected"),
        [
            ("0::/", {}, 5_120_000),  # no limit: /proc/meminfo
            ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": "7", "a/b/memory.stat": ""}, 5_120_000),
            (
                "0::/a/b",  # the limit of the outer group, of which cached files are not subtracted
                {"a/memory.max": "9000", "a/memory.current": "3000", "a/memory.stat": "anon 5\ninactive_file 500\n"},
                6500,
            ),
            (
                "0::/not/visible",  # a container's own group is the root
                {"memory.max": "9000", "memory.current": "9500", "memory.stat": "inactive_file 0\n"},
                0,
            ),
            (
                "9:cpu,memory:/job\n3:pids:/",  # version 1
                {
                    "memory/job/memory.limit_in_bytes": "9000",
                    "memory/job/memory.usage_in_bytes": "1000",
                    "memory/job/memory.stat": "total_inactive_file 0\n",
                },
                8000,
            ),
        ],
    )
    def test_the_least_of_machine_and_groups(
        self, tmp_path: Path, group: str, files: dict[str, str], expected: int
    ) -> None:
        proc = self.write(
            tmp_path / "proc", {"meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n", "self/cgroup": f"{group}\n"}
        )
        assert memory.available(proc, self.write(tmp_path / "cgroup", files)) == expected

    def test_of_this_machine_it_is_known(self) -> None:
        assert 0 < memory.available() < 1 << 50

    def test_a_share_of_the_cores_has_a_share_of_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available", lambda: 1000)
        monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(16)))
        assert cache_budget(Runtime(threads=2, workers=6)) == 250
        assert cache_budget(Runtime(threads=16, workers=14)) == 500
        assert cache_budget(Runtime(threads=2, workers=1, helpers=5)) == 250
        assert cache_budget(Runtime(cache=1.5)) == 1_500_000_000
        assert cache_budget(Runtime(cache=0.0)) == 0


class TestOption:
    def test_a_training_says_what_does_not_fit(self, index: Index, capsys: pytest.CaptureFixture[str]) -> None:
        """7 images of 24 x 32."""
        for cache, said in (
            (1.0, ""),
            (5e-6, "x: 2 of 7 decoded images fit into 5e-06 GB of memory; the others are decoded in each epoch "),
        ):
            dataset = TrainingSet(index.images("train"), 3, Augmentation(crop=20), 0)
            Loop(TinyTask(), dataset, Training(2, 0.1, epochs=2), CPU, runtime=Runtime(cache=cache), label="x")
            assert capsys.readouterr().out.startswith(said) if said else not capsys.readouterr().out

    def test_a_single_epoch_keeps_nothing(self, index: Index) -> None:
        dataset = TrainingSet(index.images("train"), 3, Augmentation(crop=20), 0)
        Loop(TinyTask(), dataset, Training(2, 0.1, epochs=1), CPU, runtime=Runtime())
        assert dataset._kept is None

    def test_a_limit_of_the_process_is_no_error(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(descriptor: int, size: int) -> None:
            raise OSError(27, "File too large")

        monkeypatch.setattr(os, "ftruncate", refuse)
        dataset = TrainingSet(index.images("train"), 3, Augmentation(crop=20), 0)
        assert dataset.keep(10**9) == 0
        assert len(list(load(dataset, 2, range(2)))) == 8

    @pytest.mark.parametrize("text", ["-1", "much", "inf"])
    def test_a_wrong_amount_is_refused(self, text: str) -> None:
        with pytest.raises(PipelineError, match=rf"^--cache '{text}': must be a number of GB of at least 0"):
            stage._gigabytes(text)
        assert stage._gigabytes("") is None
        assert stage._gigabytes("0") == 0

    def test_options_of_the_command_reach_the_stage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each in its own field: the positions of two once differed, and every training ran without a cache."""
        make_tree(tmp_path / "data", train=1, evaluation=1)
        Path(tmp_path, "params.yaml").write_text(yaml.safe_dump(minimal_params(Dataset("data"))))
        monkeypatch.chdir(tmp_path)
        seen: list[Runtime] = []
        monkeypatch.setattr(stage, "execute", lambda job, work, runtime, force: seen.append(runtime))
        stage.run("index", lambda work: None, [])
        options = ["--cache", "2", "--deterministic", "--workers", "3", "--threads", "2", "--device", "cpu"]
        stage.run("index", lambda work: None, [*options, "--checkpoint-every", "5"])
        assert seen[0].cache is None
        assert not seen[0].deterministic
        assert seen[1] == Runtime(device="cpu", workers=3, threads=2, checkpoint_every=5, cache=2, deterministic=True)
