"""The training loop: learning rates, parameter groups, accumulated gradients, log, and the checkpoint's file."""

import errno
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import cards
from pipeline.config.schema import Accumulate, Augmentation, Backbone, Classifier, Head, Training
from pipeline.data import loading
from pipeline.data.index import Index
from pipeline.data.loader import LoadingPlan, load
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.methods.cam import Cam
from pipeline.runtime import Runtime, deterministic_only
from pipeline.stores import sealed
from pipeline.training import checkpoint
from pipeline.training import settings as settings_module
from pipeline.training.loop import Extent, Loop, Stateless, alike, extent, has_batch_statistics
from pipeline.training.settings import (
    autocast,
    build_optimizer,
    has_bf16,
    learning_rate,
    parameter_groups,
    prepare,
)
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages.classifier import ClassifierTask
from tests.voc_tree import make_index

CPU = torch.device("cpu")
AVAILABLE, SELECTED = torch.cuda.is_available, os.environ.get(cards.VISIBLE)  # before ``tests.conftest`` hides GPUs
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=9))


def dataset(index: Index, images: int = 9) -> TrainingSet:
    return TrainingSet(index.images("train")[:images], 3, Augmentation(crop=20), seed=0)


class TestLearningRates:
    """By hand, at lr 0.1."""

    @pytest.mark.parametrize(
        ("settings", "steps_per_epoch", "expected"),
        [
            ({"schedule": "constant", "epochs": 4}, 5, {0: 0.1, 19: 0.1}),
            (
                {"schedule": "step", "epochs": 4, "milestones": (2, 3)},
                5,
                {0: 0.1, 9: 0.1, 10: 0.01, 14: 0.01, 15: 0.001, 19: 0.001},
            ),
            ({"schedule": "step", "iterations": 20, "milestones": (4,), "gamma": 0.5}, 5, {3: 0.1, 4: 0.05, 19: 0.05}),
            ({"schedule": "poly", "epochs": 4}, 5, {0: 0.1, 10: 0.1 * 0.5**0.9, 19: 0.1 * 0.05**0.9}),
            ({"schedule": "poly", "iterations": 20, "power": 2.0}, 7, {5: 0.1 * 0.75**2, 15: 0.1 * 0.25**2}),
            ({"schedule": "constant", "epochs": 4, "warmup": 4}, 5, {0: 0.025, 1: 0.05, 3: 0.1, 4: 0.1}),
            ({"schedule": "poly", "epochs": 4, "power": 1.0, "warmup": 10}, 5, {4: 0.1 * 0.8 * 0.5, 10: 0.05}),
            ({"schedule": "step", "epochs": 4, "milestones": (1,), "warmup": 10}, 5, {4: 0.05, 5: 0.006, 10: 0.01}),
            (
                {"schedule": "poly", "epochs": 4, "hold": 10},
                5,
                {0: 0.1, 9: 0.1, 10: 0.1 * 0.5**0.9, 19: 0.1 * 0.5**0.9},
            ),
            ({"schedule": "step", "iterations": 20, "milestones": (4,), "hold": 3}, 5, {4: 0.1, 5: 0.1, 6: 0.01}),
            (
                {"schedule": "constant", "epochs": 4, "warmup": 8, "hold": 3},
                5,
                {0: 0.0125, 2: 0.0125, 3: 0.05, 5: 0.05, 6: 0.0875, 8: 0.0875, 9: 0.1},
            ),
            (
                {"schedule": "constant", "epochs": 4, "warmup": 9, "warmup_start": 0.1},
                5,
                {0: 0.02, 1: 0.03, 7: 0.09, 8: 0.1, 9: 0.1},
            ),
            ({"schedule": "poly", "epochs": 4, "power": 1.0, "warmup": 8, "warmup_start": 0.6}, 5, {4: 0.08 * 0.85}),
            ({"schedule": "constant", "epochs": 4, "warmup": 8, "warmup_start": 1.0}, 5, {0: 0.1, 7: 0.1}),
        ],
    )
    def test_schedules(self, settings: dict[str, Any], steps_per_epoch: int, expected: dict[int, float]) -> None:
        training = Training(2, 0.1, **settings)
        found = {step: learning_rate(training, step, steps_per_epoch, 20) for step in expected}
        assert found == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("settings", "images", "expected"),
        [
            ({"batch_size": 1, "accumulation": 5, "epochs": 15}, 10_582, Extent(10_582, 2_117, 31_755, 15)),  # OAA
            ({"batch_size": 5, "epochs": 15}, 10_582, Extent(2_117, 2_117, 31_755, 15)),  # DRS
            ({"batch_size": 5, "accumulation": 2, "iterations": 20_000}, 10_582, Extent(2_117, 1_059, 20_000, 19)),
            ({"batch_size": 16, "iterations": 3}, 9, Extent(1, 1, 3, 3)),
        ],
    )
    def test_extent(self, settings: dict[str, Any], images: int, expected: Extent) -> None:
        assert extent(Training(lr=0.1, **settings), images) == expected


class Layers(nn.Module):
    """A backbone of two convolutions, one of them frozen, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 2, 1).requires_grad_(False)
        self.backbone = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 5, 1)


class TestGroups:
    def described(self, **settings: Any) -> dict[str, tuple[Any, Any]]:
        network = Layers()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        groups = parameter_groups(network, [network.head], Training(2, 0.1, weight_decay=0.005, **settings))
        found: dict[str, tuple[Any, Any]] = {}
        for group in groups:
            assert isinstance(group["params"], list)
            for parameter in group["params"]:
                assert names[id(parameter)] not in found
                found[names[id(parameter)]] = group["multiplier"], group["weight_decay"]
        return found

    def test_multipliers_are_1_2_10_20(self) -> None:
        assert self.described() == {
            "backbone.weight": (1, 0.005),
            "backbone.bias": (2, 0.005),
            "norm.weight": (1, 0.005),
            "norm.bias": (2, 0.005),
            "head.weight": (10, 0.005),
            "head.bias": (20, 0.005),
        }

    def test_biases_need_not_decay(self) -> None:
        found = self.described(decay_biases=False, lr_bias=1.0, lr_new=3.0)
        assert {name: values for name, values in found.items() if not name.startswith("norm")} == {
            "backbone.weight": (1, 0.005),
            "backbone.bias": (1, 0),
            "head.weight": (3, 0.005),
            "head.bias": (3, 0),
        }

    def test_optimizers_take_their_settings(self) -> None:
        network = Layers()
        for settings, kind in [
            (Training(2, 0.1, momentum=0.8, nesterov=True), torch.optim.SGD),
            (Training(2, 0.1, optimizer="adam"), torch.optim.Adam),
        ]:
            optimizer = build_optimizer(parameter_groups(network, [], settings), settings)
            assert isinstance(optimizer, kind)
            if kind is torch.optim.SGD:
                assert all(group["momentum"] == 0.8 and group["nesterov"] for group in optimizer.param_groups)


class TestPrecision:
    def test_autocast_follows_the_settings(self) -> None:
        layer, x = nn.Conv2d(3, 2, 1), torch.randn(1, 3, 4, 4)
        for precision, expected in [
            ("bf16", torch.bfloat16),
            ("fp32", torch.float32),
            ("auto", torch.bfloat16 if has_bf16(CPU) else torch.float32),
        ]:
            with autocast(CPU, precision):
                assert layer(x).dtype == expected

    def test_cuda_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(PipelineError, match="--device cuda:0: this torch sees no CUDA device; use --device cpu"):
            prepare("cuda:0", 1)
        with pytest.raises(PipelineError, match="--device gpu: no such device; use auto, cpu, cuda or cuda:N"):
            prepare("gpu", 1)
        assert prepare("auto", 1).type == "cpu"

    def test_a_test_without_the_mark_sees_no_gpu(self) -> None:
        assert os.environ[cards.VISIBLE] == ""  # for the processes that it starts
        assert torch.cuda.is_available is not AVAILABLE

    @pytest.mark.cuda
    def test_a_test_with_the_mark_sees_the_gpus(self) -> None:
        assert os.environ.get(cards.VISIBLE) == SELECTED
        assert torch.cuda.is_available is AVAILABLE


class TestCudaSettings:
    """On any machine: the calls are replaced, the flags are torch's."""

    @pytest.fixture(autouse=True)
    def two_cards(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
        chosen: list[torch.device] = []
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("pipeline.cards.choose", lambda device, slots: {"cuda": "cuda:0"}.get(device, device))
        monkeypatch.setattr("torch.cuda.set_device", chosen.append)
        threads = torch.get_num_threads()
        yield chosen
        settings_module._configure_cuda(deterministic=False)
        torch.set_num_threads(threads)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_determinism_is_strict_or_off(self, deterministic: bool) -> None:
        prepare("cuda", 1, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic == deterministic
        fused = (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        )
        assert fused == (not deterministic,) * 3
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def test_the_chosen_card_is_the_current_one(self, two_cards: list[torch.device]) -> None:
        assert prepare("cuda:1", 1) == torch.device("cuda:1")
        assert prepare("cuda", 1) == torch.device("cuda:0")
        assert two_cards == [torch.device("cuda:1"), torch.device("cuda:0")]

    def test_bf16_that_a_card_emulates_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
        assert not has_bf16(torch.device("cuda"))

    def test_an_operation_without_a_deterministic_kernel_is_named(self) -> None:
        message = (
            "reflection_pad2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'."
        )
        with (
            pytest.raises(PipelineError) as caught,
            deterministic_only("affinity cam"),
        ):
            raise RuntimeError(message)
        assert caught.value.lines == (
            "affinity cam: --deterministic: reflection_pad2d_backward_cuda has no deterministic form on CUDA; "
            "run without --deterministic",
        )
        with pytest.raises(RuntimeError, match="size mismatch"), deterministic_only("affinity cam"):
            raise RuntimeError("size mismatch")


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


class TestCheckpointFile:
    def test_it_holds_tensors_and_plain_values(self, tmp_path: Path) -> None:
        state = {"weights": torch.arange(5.0), "log": {"steps": [{"loss": 0.25}]}, "epoch": 3, "sum": 0.1}
        checkpoint.save(tmp_path / "state", state)
        found = checkpoint.load(tmp_path / "state")
        assert found is not None
        assert torch.equal(found.pop("weights"), state.pop("weights"))  # type: ignore[arg-type]
        assert found == state

    def test_no_copy_of_it_is_held_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = [0]

        class Buffer(io.BytesIO):
            def write(self, data: Any) -> int:
                written[0] += len(data)
                return super().write(data)

        monkeypatch.setattr("io.BytesIO", Buffer)
        checkpoint.save(tmp_path / "state", {"weights": torch.arange(1e5)})
        assert 0 < written[0] < 1000  # torch writes the pickled structure to memory
        digest, payload = (content := (tmp_path / "state").read_bytes())[:64], content[64:]
        assert digest.decode() == hashlib.sha256(payload).hexdigest()

    @pytest.mark.parametrize("space", [0, 10, 64, 1000, 5000])
    def test_a_full_disk_is_named_and_the_last_one_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: int
    ) -> None:
        """``torch.save`` replaces the error of some writes by its own."""

        class Full(sealed.Writer):
            def __init__(self, file: Any) -> None:
                super().__init__(SimpleNamespace(write=self.limited, flush=file.flush))  # type: ignore[arg-type]
                self.free = space

            def limited(self, data: Any) -> int:
                self.free -= len(data)
                if self.free < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return len(data)

        checkpoint.save(tmp_path / "state", {"epoch": 1})
        monkeypatch.setattr(sealed, "Writer", Full)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoint.save(tmp_path / "state", {"epoch": 2, "weights": torch.zeros(1000)})
        assert checkpoint.load(tmp_path / "state") == {"epoch": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["state"]

    def test_none_is_none(self, tmp_path: Path) -> None:
        assert checkpoint.load(tmp_path / "state") is None

    @pytest.mark.parametrize("cut", [0, 10, 64, 100])
    def test_a_cut_file_is_refused(self, tmp_path: Path, cut: int) -> None:
        checkpoint.save(tmp_path / "state", {"epoch": 3})
        (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:cut])
        with pytest.raises(PipelineError, match=r"state: damaged: sha256 is .*; delete it to start over$"):
            checkpoint.load(tmp_path / "state")

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        """``weights_only``: a pickled call does not load."""

        class Call:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "touched",)

        checkpoint.save(tmp_path / "state", {"epoch": Call()})
        with pytest.raises(Exception, match="Weights only load failed"):
            checkpoint.load(tmp_path / "state")
        torch.save({"epoch": Call()}, tmp_path / "model.pt")
        with pytest.raises(Exception, match="Weights only load failed"):
            checkpoint.load_model(tmp_path / "model.pt")
        assert not (tmp_path / "touched").exists()
