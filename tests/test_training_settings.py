"""What a training is set to: learning rates, parameter groups, precision, and the card."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import cards
from pipeline.config.schema import Training
from pipeline.errors import PipelineError
from pipeline.runtime import deterministic_only
from pipeline.training import settings as settings_module
from pipeline.training.loop import Extent, extent
from pipeline.training.settings import (
    autocast,
    build_optimizer,
    has_bf16,
    learning_rate,
    parameter_groups,
    prepare,
)

CPU = torch.device("cpu")
AVAILABLE, SELECTED = torch.cuda.is_available, os.environ.get(cards.VISIBLE)  # before ``tests.conftest`` hides GPUs


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
