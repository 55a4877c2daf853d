"""What every method promises: a method's test is a subclass of ``MethodContract`` with its block and its formula.

    class TestCam(MethodContract):
        block = small_classifier(method="cam")

        def expected(self, weights, images):
            return ...  # logits and maps of ``images`` by plain arithmetic in float64

``Arithmetic`` holds that plain arithmetic: NumPy in float64, no line of it shared with the networks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.registry import METHODS, Choice, plain
from pipeline.config.schema import Backbone, Classifier, Head, Training
from pipeline.methods.base import Method, Output, Step
from pipeline.training import models
from pipeline.training.settings import build_optimizer, parameter_groups

Array = NDArray[np.float64]
K = 5


def small_classifier(method: str = "cam", settings: Any = None, **others: Any) -> Classifier:
    """A block with the light backbone, from scratch, at stride 8. ``settings``: the method's, null its defaults."""
    choice = Choice(METHODS, method, None if settings is None else plain(settings))
    return Classifier(Backbone("small"), Training(4, 0.05, epochs=1, lr_new=1.0), choice, head=Head(1, 16), **others)


def build_method(block: Classifier, num_classes: int) -> Method:
    method = models.build(block, num_classes)
    assert isinstance(method, Method)
    return method


class Arithmetic:
    """Layers in NumPy float64."""

    @staticmethod
    def conv(x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
        """B x C x H x W by O x C x k x k: a sum over the kernel's places."""
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        kernel = weight.shape[2]
        height, width = ((extent - kernel) // stride + 1 for extent in x.shape[2:])
        out = np.zeros((len(x), len(weight), height, width))
        for row in range(kernel):
            for column in range(kernel):
                seen = x[:, :, row : row + stride * height : stride, column : column + stride * width : stride]
                out += np.einsum("bchw,oc->bohw", seen[:, :, :height, :width], weight[:, :, row, column])
        return out if bias is None else out + bias[:, None, None]

    @staticmethod
    def batch_norm(x: Array, gamma: Array, beta: Array, mean: Array, variance: Array) -> Array:
        scale = gamma / np.sqrt(variance + 1e-5)
        found: Array = x * scale[:, None, None] + (beta - mean * scale)[:, None, None]
        return found

    @classmethod
    def small_backbone(
        cls, weights: dict[str, Array], x: Array, after: Callable[[int, Array], Array] = lambda number, x: x
    ) -> Array:
        """The light backbone at stride 8: six convolutions (the first is 5x5, the others 3x3) with batch norm and ReLU.

        Its stages have two convolutions each.

        ``after`` is applied to the output of each layer (0 to 5).
        """
        strides = (2, 2, 1, 1, 2, 1)
        for number, stride in enumerate(strides):
            layer = f"backbone.stages.conv{number // 2 * 2 + 2}.{number % 2}."
            x = cls.conv(x, weights[f"{layer}0.weight"], None, stride, 1 if number else 2)
            names = ("weight", "bias", "running_mean", "running_var")
            x = np.maximum(cls.batch_norm(x, *(weights[f"{layer}1.{name}"] for name in names)), 0)
            x = after(number, x)
        return x


class MethodContract:
    """Inherit it, and define ``block`` and ``expected``."""

    block: Classifier
    steps = 25  # of the training in the test of the loss

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        """Logits B x K and maps B x K x h x w of ``images`` by the paper's formulas, in evaluation mode."""
        raise NotImplementedError

    def step(self, method: Method, images: Tensor, tags: Tensor) -> Step:
        """A training step as the classifier stage runs it."""
        return method.training_step(images, tags, 0)

    @pytest.fixture
    def method(self) -> Method:
        """With weights and statistics that a wrong order or a forgotten layer would show in."""
        torch.manual_seed(0)
        method = build_method(self.block, K)
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.normal_(std=0.1)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.data.normal_(std=0.1)
        return method

    @pytest.fixture
    def images(self) -> Tensor:
        return torch.randn(4, 3, 40, 56, generator=torch.Generator().manual_seed(1))

    def test_it_is_known_by_name(self, method: Method) -> None:
        assert type(method) is METHODS[self.block.method.name]
        assert method.block == self.block
        assert method.settings == self.block.method.settings
        assert method.num_classes == K

    def test_the_report_can_name_it_and_its_maps(self, method: Method) -> None:
        about = method.about()
        assert about["text"].startswith(method.describe())
        assert "small from random weights" in about["text"]
        assert about["map_name"] == method.map_name
        assert all(isinstance(text, str) and text.strip() for text in (*about.values(), method.describe()))

    @pytest.mark.parametrize(("height", "width"), [(40, 56), (33, 47), (64, 64)])
    def test_forward_gives_logits_and_maps(self, method: Method, height: int, width: int) -> None:
        stride = self.block.backbone.output_stride
        output = method(torch.randn(2, 3, height, width))
        assert isinstance(output, Output)
        assert output.logits.shape == (2, K)
        assert output.maps.shape == (2, K, -(-height // stride), -(-width // stride))
        assert output.logits.dtype == torch.float32

    def test_output_is_its_formula(self, method: Method, images: Tensor) -> None:
        method.eval()
        weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
        logits, maps = self.expected(weights, images.double().numpy())
        with torch.no_grad():
            output = method(images)
        assert np.abs(output.logits.numpy() - logits).max() < 1e-4 * np.abs(logits).max()
        assert np.abs(output.maps.numpy() - maps).max() < 1e-4 * np.abs(maps).max()
        assert np.ptp(maps, (2, 3)).min() > 1e-3 * np.abs(maps).max()  # maps that say something

    def test_samples_of_a_batch_are_apart(self, method: Method, images: Tensor) -> None:
        method.eval()
        with torch.no_grad():
            together, alone = method(images), method(images[2:3])
        torch.testing.assert_close(together.logits[2:3], alone.logits)
        torch.testing.assert_close(together.maps[2:3], alone.maps, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_training_makes_the_loss_finite_and_small(
        self, method: Method, images: Tensor, precision: torch.dtype
    ) -> None:
        """A few steps on one batch by the settings' own optimizer; every parameter that learns is reached."""
        settings = replace(self.block.training, weight_decay=0.0)
        optimizer = build_optimizer(parameter_groups(method, method.new_layers(), settings), settings)
        tags = torch.eye(K)[[0, 1, 1, 4]] + torch.eye(K)[[2, 1, 3, 4]]
        losses = []
        for step in range(self.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss, output = self.step(method, images, tags.clamp(max=1))
            assert loss.shape == ()
            assert output.logits.shape == (4, K)
            assert output.maps.shape[:2] == (4, K)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if step == 0:
                for name, parameter in method.named_parameters():
                    assert not parameter.requires_grad or parameter.grad is not None, name
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.7 * losses[0]

    def test_images_without_a_class_are_learned_from(self, method: Method, images: Tensor) -> None:
        """All tags of a batch may be 0: the loss is finite and falls."""
        settings = replace(self.block.training, weight_decay=0.0)
        optimizer = build_optimizer(parameter_groups(method, method.new_layers(), settings), settings)
        losses = []
        for _ in range(3):
            loss, _ = self.step(method, images, torch.zeros(4, K))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]

    def test_extreme_logits_leave_the_loss_finite(self, method: Method) -> None:
        logits = torch.full((2, K), 1e4, requires_grad=True)
        output = Output(logits, torch.zeros(2, K, 3, 3))
        loss = method.loss(output, torch.zeros(2, K))
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.any()

    def test_localization_maps_are_not_negative(self, method: Method, images: Tensor) -> None:
        method.eval()
        with torch.inference_mode():
            found = method.localize(images)
        stride = self.block.backbone.output_stride
        assert found.shape == (4, K, -(-40 // stride), -(-56 // stride))
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.isfinite().all()
        assert found.flatten(2).amax(2).gt(0).any()

    def test_occlusion_reaches_the_output(self, method: Method, images: Tensor) -> None:
        """The attention drop layer's contract: what is not occluded anywhere changes nothing, what is does."""
        method.eval()
        occluded = torch.zeros(4, 1, 40, 56, dtype=torch.bool)
        occluded[1, :, 8:32, 8:40] = True
        with torch.no_grad():
            plain, without = method(images), method(images, occluded)
        assert torch.equal(plain.logits[[0, 2, 3]], without.logits[[0, 2, 3]])
        assert not torch.equal(plain.logits[1], without.logits[1])

    def test_new_layers_are_some_of_the_method(self, method: Method) -> None:
        """They learn at a rate of their own; pretrained layers are not among them."""
        new = {id(parameter) for layer in method.new_layers() for parameter in layer.parameters()}
        assert new
        assert new < {id(parameter) for parameter in method.parameters()}

    def test_saved_it_comes_back(self, method: Method, images: Tensor, tmp_path: Path) -> None:
        method.eval()
        models.save(tmp_path / "model.pt", method, self.block, K)
        loaded = models.load(tmp_path / "model.pt", K, torch.device("cpu"))
        assert isinstance(loaded, Method)
        assert loaded.block == self.block
        with torch.no_grad():
            one, other = method(images), loaded(images)
        torch.testing.assert_close(other.logits, one.logits)
        torch.testing.assert_close(other.maps, one.maps, rtol=1e-4, atol=1e-4)

    def test_the_seed_decides_the_start(self) -> None:
        states = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            states.append(build_method(self.block, K).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
