"""Training inputs: unchanged files, and batches that do not depend on the loading process."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pipeline.config.schema import Augmentation
from pipeline.data.collation import LoadedBatch, collate
from pipeline.data.images import read_rgb
from pipeline.data.index import Image, Index
from pipeline.data.loader import Batches, LoadingPlan, _BatchDataset, data_loader, load, loading_plan
from pipeline.data.loading import TrainingSet, normalise
from pipeline.errors import PipelineError
from pipeline.stores.raster import RasterStore, RasterWriter
from tests.test_augment import blocks
from tests.voc_tree import make_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=7))


@pytest.fixture(scope="module")
def labels(index: Index, tmp_path_factory: pytest.TempPathFactory) -> RasterStore:
    path = tmp_path_factory.mktemp("labels") / "labels.h5"
    with RasterWriter(path, "labels") as writer:
        for seed, image in enumerate(index.images("train")):
            writer.append(image.id, blocks(image.height, image.width, seed)[1])
    return RasterStore(path)


UNKNOWN = "is not a photo of a known format; save it as JPEG or PNG; or run the index stage again if it was replaced"


class TestFiles:
    def test_images_are_rgb(self, tmp_path: Path) -> None:
        rgb = np.broadcast_to(np.array([250, 120, 10], np.uint8), (5, 6, 3))
        path = tmp_path / "a.png"
        cv2.imwrite(str(path), rgb[..., ::-1])
        image = Image("a", path, 5, 6, (1,), None, None)
        assert read_rgb(image).tolist() == rgb.tolist()
        expected = (np.array([250, 120, 10]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(normalise(rgb)[:, 2, 3].numpy(), expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("harm", "fault"),
        [
            ("missing", "cannot be read (No such file or directory); restore it, or run the index stage again"),
            ("FIFO", "cannot be read (Not a regular file); restore it, or run the index stage again"),
            ("other size", "differs from the indexed image; run the index stage again"),
            ("no image", UNKNOWN),
            ("empty", UNKNOWN),
        ],
    )
    def test_a_file_that_differs_from_the_index_is_refused(self, tmp_path: Path, harm: str, fault: str) -> None:
        path = tmp_path / "a.png"
        if harm == "other size":
            cv2.imwrite(str(path), np.zeros((6, 5, 3), np.uint8))
        elif harm == "FIFO":
            os.mkfifo(path)
        elif harm != "missing":
            path.write_text("" if harm == "empty" else "text")
        with pytest.raises(PipelineError) as caught:
            read_rgb(Image("a", path, 5, 6, (1,), None, None))
        assert caught.value.lines == (f"{path}: {fault}",)


CPU = torch.device("cpu")
SETTINGS = Augmentation(scale=(0.7, 1.4), jitter=(0.3, 0.3, 0.3, 0.1), crop=20)


class TestTrainingSet:
    def same(self, one: LoadedBatch, other: LoadedBatch) -> bool:
        assert one.labels is not None
        assert other.labels is not None
        return (
            one.ids == other.ids
            and one.windows == other.windows
            and torch.equal(one.to(CPU).images, other.to(CPU).images)
            and torch.equal(one.labels, other.labels)
        )

    def test_an_item_is_the_same_in_any_order(self, index: Index, labels: RasterStore) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        keys = [(epoch, number) for epoch in range(2) for number in range(7)]
        forward = {key: dataset[key] for key in keys}
        again = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        for key in reversed(keys):
            assert self.same(collate([again[key]]), collate([forward[key]]))
        for number in range(7):
            assert not np.array_equal(forward[0, number].sample.pixels, forward[1, number].sample.pixels)

    def test_another_seed_draws_other_batches(self, index: Index) -> None:
        one, other = (TrainingSet(index.images("train"), 3, SETTINGS, seed) for seed in (5, 6))
        assert sum(one[0, number].sample.window != other[0, number].sample.window for number in range(7)) >= 6
        assert Batches(one, 2, 0).batches != Batches(other, 2, 0).batches

    def test_the_number_of_workers_changes_nothing(self, index: Index, labels: RasterStore) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        assert data_loader(dataset, 2, [3], 1, LoadingPlan(2)).num_workers == 2
        alone, together = (list(load(dataset, 2, [3, 4], 1, LoadingPlan(workers))) for workers in (0, 2))
        assert len(alone) == 3 + 4
        assert all(self.same(one, other) for one, other in zip(alone, together, strict=True))

    def test_loading_leaves_the_global_generator_alone(self, index: Index) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5)
        before = torch.get_rng_state()
        list(load(dataset, 2, [0]))
        assert torch.equal(torch.get_rng_state(), before)

    def test_every_epoch_has_each_image_once_in_its_own_order(self, index: Index) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5)
        epochs = [[number for batch in Batches(dataset, 3, epoch) for _, number in batch] for epoch in range(4)]
        assert all(sorted(numbers) == list(range(7)) for numbers in epochs)
        assert len({tuple(numbers) for numbers in epochs}) == 4
        assert [len(batch) for batch in Batches(dataset, 3, 0)] == [3, 3, 1]
        assert Batches(dataset, 3, 2, start=1).batches == Batches(dataset, 3, 2).batches[1:]
        assert len(Batches(dataset, 3, 2, start=2)) == 1
        assert dataset.group == 1

    def test_tags_are_the_indexs(self, index: Index) -> None:
        """Image n of the tree has class n mod 3 + 1; every second image also has the next class."""
        dataset = TrainingSet(index.images("train"), 3, Augmentation(), 5)
        assert dataset.tags[:4].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0]]
        assert dataset[0, 3].tags.tolist() == [1, 1, 0]

    def test_sizes_that_differ_in_a_batch_are_refused(self, index: Index) -> None:
        dataset = TrainingSet(index.images("train"), 3, Augmentation(scale=(0.5, 2.0)), 5)
        with pytest.raises(
            PipelineError,
            match=r"^augmentation: the images of a batch differ in size; set crop, side: square, or batch_size: 1",
        ):
            collate([dataset[0, 0], dataset[0, 1]])

    def test_missing_label_maps_are_counted_at_once(self, index: Index, tmp_path: Path) -> None:
        with RasterWriter(tmp_path / "few.h5", "labels") as writer:
            writer.append("img_001", np.zeros((24, 32), np.uint8))
        few = RasterStore(tmp_path / "few.h5")
        with pytest.raises(PipelineError, match=r"few\.h5: has no label map for 6 training images, first img_000"):
            TrainingSet(index.images("train"), 3, SETTINGS, 5, few)

    def test_a_batch_moves_completely(self, index: Index, labels: RasterStore) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        batch: Any = next(load(dataset, 4, [0]))
        items = [dataset[key] for key in Batches(dataset, 4, 0).batches[0]]
        assert (batch.ids, batch.windows) == ([item.id for item in items], [item.sample.window for item in items])
        assert torch.equal(batch.tags, torch.stack([item.tags for item in items]))
        moved = batch.to(CPU)
        assert moved.images.is_contiguous(memory_format=torch.channels_last)
        assert moved.labels is not None
        assert (moved.images.dtype, moved.labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(moved.labels, batch.labels.long())
        assert torch.equal(moved.images, batch.to(CPU).images)  # the loaded bytes are left as they were
        elsewhere = batch.to(torch.device("meta"))
        assert {values.device.type for values in (elsewhere.images, elsewhere.tags, elsewhere.labels)} == {"meta"}
        assert (elsewhere.ids, elsewhere.windows) == (batch.ids, batch.windows)

    def test_without_label_maps_a_batch_has_none(self, index: Index) -> None:
        batch: Any = next(load(TrainingSet(index.images("train"), 3, SETTINGS, 5), 4, [0]))
        assert batch.labels is None
        assert batch.to(CPU).labels is None

    @pytest.mark.parametrize("gpu", [False, True])
    def test_batches_are_pinned_for_a_gpu_alone(
        self, index: Index, labels: RasterStore, monkeypatch: pytest.MonkeyPatch, gpu: bool
    ) -> None:
        """Whether a GPU is present does not matter. Without one, pinning is recorded in place of done."""
        pinned: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: not gpu)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        plan = loading_plan(dataset, 2, 0, "x", gpu)
        assert data_loader(dataset, 2, [0], 0, plan).pin_memory == gpu
        batch = next(load(dataset, 2, [0], 0, plan)).pin_memory()
        assert set(batch.tensors()) >= {"pixels", "tags", "labels"}
        assert set(pinned) == {values.data_ptr() for values in batch.tensors().values()}

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_on_cuda_batches_are_pinned_and_equal_the_cpus(
        self, index: Index, labels: RasterStore, workers: int
    ) -> None:
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5, labels)
        card = torch.device("cuda")
        plan = loading_plan(dataset, 2, workers, "x", gpu=True)
        there, here = (list(load(dataset, 2, [0, 1], 0, plan)) for plan in (plan, LoadingPlan()))
        for one, other in zip(there, here, strict=True):
            assert all(values.is_pinned() for values in one.tensors().values())
            moved, expected = one.to(card), other.to(CPU)
            assert torch.equal(moved.images.cpu(), expected.images)
            assert moved.labels is not None
            assert torch.equal(moved.labels.cpu(), expected.labels)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_jitter_is_the_same_before_and_after_collation(self, index: Index, workers: int) -> None:
        """On the CPU the workers apply it, else the device. Batches bound for a GPU still have its factors."""
        dataset = TrainingSet(index.images("train"), 3, SETTINGS, 5)
        early, late = (
            list(load(dataset, 2, [0], 0, LoadingPlan(workers))),
            [_BatchDataset(dataset, True).__getitems__(keys) for keys in Batches(dataset, 2, 0)],
        )
        for one, other in zip(early, late, strict=True):
            assert isinstance(other, LoadedBatch)
            assert one.factors is None
            assert other.factors is not None
            assert not torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.to(CPU).images, other.to(CPU).images)
        assert any(batch.insets is not None for batch in early)  # padding has no colours to change

    def test_a_worker_uses_one_thread(self, index: Index) -> None:
        start = data_loader(
            TrainingSet(index.images("train"), 3, SETTINGS, 5), 2, [0], 0, LoadingPlan(2)
        ).worker_init_fn
        threads = cv2.getNumThreads()
        try:
            cv2.setNumThreads(3)
            assert start is not None
            start(0)
            assert cv2.getNumThreads() == 1
        finally:
            cv2.setNumThreads(threads)
