"""The training loop: accumulated gradients, merged batches, log and checkpoints."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.schema import Accumulate, Augmentation, Backbone, Classifier, Head, Training
from pipeline.data import loading
from pipeline.data.index import Index
from pipeline.data.loader import LoadingPlan, load
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.methods.cam import Cam
from pipeline.runtime import Runtime
from pipeline.training import checkpoint
from pipeline.training.loop import Loop, Stateless, alike, has_batch_statistics
from pipeline.training.settings import (
    autocast,
    build_optimizer,
    parameter_groups,
    prepare,
)
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.classifier import ClassifierTask
from tests.marks import needs_cuda
from tests.voc_tree import make_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=9))


def dataset(index: Index, images: int = 9) -> TrainingSet:
    return TrainingSet(index.images("train")[:images], 3, Augmentation(crop=20), seed=0)


class TinyTask(Stateless):
    """A linear score of each image's mean colour; what a test wants done at a loss, it overrides."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = nn.Sequential(nn.AvgPool2d(20), nn.Flatten(), nn.Linear(3, 3))
        self.epochs: list[int] = []

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.network]

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        self.epochs.append(epoch)
        scores: Tensor = self.network(batch.images)
        return nn.functional.binary_cross_entropy_with_logits(scores, batch.tags)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        return {"ended": float(epoch)}


def loop(task: Any, data: TrainingSet, settings: Training, path: Path | None = None, every: float = 0.0) -> Loop:
    return Loop(task, data, settings, CPU, runtime=Runtime(checkpoint_every=every), path=path, label="training x")


class TestLoop:
    def test_accumulated_batches_make_the_gradient_of_the_big_one(self, index: Index) -> None:
        """8 images as one batch of 8, as 4 of 2 and as 8 of 1: the same steps."""
        weights = []
        for batch_size, accumulation in [(8, 1), (2, 4), (1, 8)]:
            task = TinyTask()
            settings = Training(batch_size, 0.5, epochs=3, accumulation=accumulation, precision="fp32")
            loop(task, dataset(index, 8), settings).run()
            weights.append(task.network[2].weight.detach().clone())  # type: ignore[index]
        start = TinyTask().network[2].weight.detach()  # type: ignore[index]
        assert (weights[0] - start).abs().max() > 0.01
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("seconds", "every", "expected"),
        [(0.1, 55, [6, 12, 18]), (1.1, 55, [6, 17]), (3.0, 55, [6]), (1.1, 28, [3, 9, 15]), (3.0, 0, range(1, 19))],
    )
    def test_slow_checkpoints_are_written_less_often(
        self,
        index: Index,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        every: float,
        expected: Iterable[int],
    ) -> None:
        """18 steps of 10 s; the seconds are those of a save. The last one follows the last step."""
        now, saved = [0.0], []

        def save(path: Path, state: dict[str, Any]) -> None:
            now[0] += seconds
            saved.append(state["step"])

        class Slow(TinyTask):
            def loss(self, batch: Batch, epoch: int) -> Tensor:
                now[0] += 10
                return super().loss(batch, epoch)

        monkeypatch.setattr("pipeline.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(checkpoint, "save", save)
        loop(Slow(), dataset(index), Training(3, 0.1, epochs=6), tmp_path / "state", every).run()
        assert sorted({*saved, 18}) == sorted({*expected, 18})
        assert len(saved) == len(set(saved))

    def test_a_step_of_fewer_batches_is_their_mean(self, index: Index) -> None:
        """9 images in batches of 2, three batches a step: 3 and 2 an epoch. Each batch's gradient is 1."""

        class Slope(TinyTask):
            def __init__(self) -> None:
                super().__init__()
                self.network = nn.Linear(1, 1, bias=False)
                nn.init.zeros_(self.network.weight)

            def loss(self, batch: Batch, epoch: int) -> Tensor:
                self.epochs.append(epoch)
                return self.network(torch.ones(1, 1)).sum()

        task = Slope()
        settings = Training(
            2, 0.1, epochs=2, accumulation=3, momentum=0.0, weight_decay=0.0, lr_new=1.0, precision="fp32"
        )
        log = loop(task, dataset(index), settings).run()
        assert task.epochs == [0] * 5 + [1] * 5
        assert len(log["steps"]) == 4
        assert task.network.weight.item() == pytest.approx(-4 * 0.1)  # type: ignore[operator]

    def test_rates_reach_the_groups_and_the_log(self, index: Index) -> None:
        task = TinyTask()
        settings = Training(3, 0.1, epochs=3, milestones=(2,), warmup=2)
        made = loop(task, dataset(index), settings)
        log = made.run()
        rates = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
        assert [point["lr"] for point in log["steps"]] == pytest.approx(rates)
        assert [point["epoch"] for point in log["steps"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert {group["multiplier"]: group["lr"] for group in made.optimizer.param_groups} == pytest.approx(
            {10: 0.1, 20: 0.2}
        )

    def test_the_log_averages_an_epochs_losses(self, index: Index) -> None:
        losses: list[float] = []

        class Keeping(TinyTask):
            def loss(self, batch: Batch, epoch: int) -> Tensor:
                found = super().loss(batch, epoch)
                losses.append(float(found.detach()))
                return found

        log = loop(Keeping(), dataset(index), Training(2, 0.1, epochs=2)).run()
        expected = [sum(losses[:5]) / 5, sum(losses[5:]) / 5]
        assert [entry["loss"] for entry in log["epochs"]] == pytest.approx(expected, abs=1e-6)
        assert [entry["ended"] for entry in log["epochs"]] == [0, 1]
        assert [point["loss"] for point in log["steps"]] == pytest.approx(losses, abs=1e-6)

    def test_iterations_may_end_within_an_epoch(self, index: Index) -> None:
        """9 images, batches of 2, two a step: 5 batches and 3 steps an epoch. Four steps end after 2 more batches."""
        task = TinyTask()
        log = loop(task, dataset(index), Training(2, 0.1, iterations=4, accumulation=2)).run()
        assert task.epochs == [0] * 5 + [1] * 2
        assert [point["step"] for point in log["steps"]] == [0, 1, 2, 3]
        assert [entry["ended"] for entry in log["epochs"]] == [0, 1]

    def test_long_epochs_log_about_twenty_points(self, index: Index) -> None:
        log = loop(TinyTask(), dataset(index), Training(1, 0.1, iterations=9)).run()
        assert len(log["steps"]) == 9
        many = TrainingSet(index.images("train")[:] * 5, 3, Augmentation(crop=20), seed=0)
        log = loop(TinyTask(), many, Training(1, 0.1, epochs=1)).run()
        assert len(log["steps"]) == 23  # 45 steps, every second one

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_no_number_ends_the_training(self, index: Index, value: float) -> None:
        class Failing(TinyTask):
            def loss(self, batch: Batch, epoch: int) -> Tensor:
                return super().loss(batch, epoch) * (value if epoch else 1)

        with pytest.raises(PipelineError, match=rf"^training x: the loss is {value} at step 3; lower training\.lr$"):
            loop(Failing(), dataset(index), Training(3, 0.1, epochs=2)).run()

    def test_a_loss_that_fails_between_logged_steps_ends_the_training_too(self, index: Index) -> None:
        """Of 45 steps every second one is logged; the last batch's loss alone is no number."""
        many = TrainingSet(index.images("train")[:] * 5 + index.images("train")[:1], 3, Augmentation(crop=20), seed=0)
        calls: list[int] = []

        class Failing(TinyTask):
            def loss(self, batch: Batch, epoch: int) -> Tensor:
                calls.append(epoch)
                return super().loss(batch, epoch) * (math.nan if len(calls) == 46 else 1)

        with pytest.raises(PipelineError, match=r"^training x: the loss is nan at step 45; lower training\.lr$"):
            loop(Failing(), many, Training(1, 0.1, epochs=1)).run()
        assert len(calls) == 46

    def test_the_network_trains_in_training_mode(self, index: Index) -> None:
        task = TinyTask()
        task.network.eval()
        loop(task, dataset(index), Training(3, 0.1, epochs=1)).run()
        assert task.network.training


class TestMerging:
    """Batches of an optimizer step that become one on a GPU; here on the CPU."""

    SETTINGS = Classifier(
        Backbone("small", frozen_batch_norm=True, weights=None),
        Training(1, 0.05, epochs=2, accumulation=5, precision="fp32"),
        head=Head(convs=1, channels=8),
        accumulate=Accumulate(cells=4, skip_epochs=0),
        augmentation=Augmentation(side="short", length=(24, 24)),
    )

    def trained(
        self, index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
    ) -> tuple[Any, list[int]]:
        """Weights, accumulator and log; and the images of each forward pass."""
        torch.manual_seed(0)
        images = index.images("train")
        tall = [replace(image, height=image.width, width=image.height) for image in images[:3]]
        monkeypatch.setattr(loading, "read_rgb", lambda image: noise(image.id, image.size))
        images = [*tall, *images[3:]]
        job = Job("classifier", "x", {}, {}, {}, self.SETTINGS)
        task = ClassifierTask(Cam(self.SETTINGS, 3), images, 2, 0, Work(job, {}, {}, Runtime(), "", folder))
        sizes: list[int] = []
        task.network.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
        data = TrainingSet(images, 3, self.SETTINGS.augmentation, 0)
        made = loop(task, data, self.SETTINGS.training)
        made.task.network.train()
        if merge:
            assert task.is_mean
            assert not has_batch_statistics(task.network)
            monkeypatch.setattr(Loop, "_merges", True)
        log = made.run()
        return (task.network.state_dict(), task.accumulator.state(), log), sizes

    def test_where_shapes_agree_one_batch_gives_the_same_gradient(
        self, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OAA's five batches of one image; three of nine images are tall."""
        (weights, maps, log), single = self.trained(index, tmp_path, monkeypatch, merge=False)
        (merged, merged_maps, merged_log), sizes = self.trained(index, tmp_path, monkeypatch, merge=True)
        assert single == [1] * 18
        assert sum(sizes) == 18
        assert len(sizes) <= 8  # two shapes in each of four steps
        for name, values in weights.items():
            torch.testing.assert_close(merged[name], values, rtol=1e-4, atol=1e-6)
        assert torch.equal(merged_maps["_seen"], maps["_seen"])
        assert (merged_maps["_values"].int() - maps["_values"].int()).abs().max() <= 1
        for one, other in zip(merged_log["epochs"], log["epochs"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)

    def test_a_merged_batch_is_limited(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        data = TrainingSet(index.images("train"), 3, Augmentation(crop=20), 0)
        group = list(load(data, 2, [0]))  # 2, 2, 2, 2 and 1 images
        assert [len(batches) for batches in alike(group)] == [4, 1]
        monkeypatch.setattr("pipeline.training.loop.MERGED_PIXELS", 3 * 800)
        assert [len(batches) for batches in alike(group)] == [3, 1, 1]
        monkeypatch.setattr("pipeline.training.loop.MERGED_PIXELS", 10)
        assert [len(batches) for batches in alike(group)] == [1] * 5

    def test_a_network_that_couples_the_images_of_a_batch_is_not_merged(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        assert has_batch_statistics(network)
        network[1].eval()
        assert not has_batch_statistics(network)
        assert not TinyTask().is_mean


class TestCuda:
    pytestmark = needs_cuda

    def test_a_classifiers_step_does_not_wait_for_the_device(self, index: Index, tmp_path: Path) -> None:
        """After the first two steps, which fill caches. Fusing the maps afterwards waits for them alone."""
        device = prepare("cuda", 1)
        settings = TestMerging.SETTINGS
        images = index.images("train")
        job = Job("classifier", "x", {}, {}, {}, settings)
        task = ClassifierTask(Cam(settings, 3), images, 1, 0, Work(job, {}, {}, Runtime(), "", tmp_path))
        task.network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = build_optimizer(
            parameter_groups(task.network, task.new_layers(), settings.training), settings.training
        )
        data = TrainingSet(images, 3, Augmentation(crop=20), seed=0)
        steps = 0
        for steps, loaded in enumerate(load(data, 2, [0], 0, LoadingPlan(gpu=True)), 1):
            torch.cuda.set_sync_debug_mode("error" if steps > 2 else "default")
            try:
                with autocast(device, "auto"):
                    loss = task.loss(loaded.to(device), 0)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            task.end_batch()
        assert steps == 5


def noise(name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(int(name[-3:])).integers(0, 256, (*size, 3)).astype(np.uint8)
