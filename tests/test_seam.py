"""SEAM under the methods' contract, its pixel correlation module and its loss in NumPy, and its options."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.reader import build_block
from pipeline.config.schema import Classifier
from pipeline.errors import PipelineError
from pipeline.methods import seam as module
from pipeline.methods.base import Method
from pipeline.methods.seam import PixelCorrelation, Seam, SeamOutput
from tests.method_contract import Arithmetic, Array, K, MethodContract, build_method, small_classifier

Settings = Seam.Settings
TAGS = torch.eye(K)[[0, 1, 1, 4]] + torch.eye(K)[[2, 3, 0, 2]]


def seam(**settings: Any) -> Classifier:
    return small_classifier("seam", Settings(**settings))


def built(block: Classifier, seed: int = 0) -> Seam:
    torch.manual_seed(seed)
    method = build_method(block, K)
    assert isinstance(method, Seam)
    return method


def bilinear(x: Array, height: int, width: int) -> Array:
    """B x C x H x W; a weight falls linearly to 0 one pixel away, and the border is continued."""

    def matrix(before: int, after: int) -> Array:
        places = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
        weights: Array = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(before)))
        return weights

    found: Array = np.einsum("yh,bchw,xw->bcyx", matrix(x.shape[2], height), x, matrix(x.shape[3], width))
    return found


def pooled(x: Array, height: int, width: int) -> Array:
    """The means of cells, whose bounds are rounded outwards."""
    bounds = [
        [(n * extent // cells, -(-(n + 1) * extent // cells)) for n in range(cells)]
        for extent, cells in zip(x.shape[2:], (height, width), strict=True)
    ]
    means = [[x[:, :, top:bottom, left:right].mean((2, 3)) for left, right in bounds[1]] for top, bottom in bounds[0]]
    return np.moveaxis(np.array(means), (0, 1), (2, 3))


class Formula:
    """SEAM in NumPy float64, in evaluation mode."""

    def __init__(self, settings: Seam.Settings, weights: dict[str, Array]) -> None:
        self.settings, self.weights = settings, weights

    def maps(self, images: Array) -> tuple[Array, list[Array]]:
        """Raw maps, and the features of all six layers."""
        weights, layers = self.weights, []

        def after(_number: int, x: Array) -> Array:
            layers.append(x)
            return x

        x = Arithmetic.small_backbone(weights, images, after)
        x = Arithmetic.conv(x, weights["head.convs.0.weight"], weights["head.convs.0.bias"], padding=1)
        maps = Arithmetic.conv(np.maximum(x, 0), weights["head.classifier.weight"], weights["head.classifier.bias"])
        return maps, layers

    def attention(self, maps: Array, tags: Array) -> Array:
        positive = np.maximum(maps, 0)
        found: Array = positive / np.maximum(positive.max((2, 3), keepdims=True), 1e-5) * tags[:, :, None, None]
        return found

    def scores(self, found: Array) -> Array:
        most = found.max(1, keepdims=True)
        kept = np.where(found == most, found, 0) if self.settings.strongest else found
        return np.concatenate([kept, 1 - most], 1)

    def refined(self, maps: Array, images: Array, layers: list[Array]) -> Array:
        """Eq. 8 and 9, cell by cell."""
        size = maps.shape[2:]
        taps = {"conv2": 1, "conv4": 3, "conv6": 5}
        parts = [pooled(images, *size)]
        for number, tap in enumerate(self.settings.levels or ("conv2", "conv4")):
            weight = self.weights[f"correlation.reductions.{number}.weight"]
            parts.append(np.maximum(Arithmetic.conv(pooled(layers[taps[tap]], *size), weight), 0))
        cells = Arithmetic.conv(np.concatenate(parts, 1), self.weights["correlation.embedding.weight"])
        out = np.zeros_like(maps)
        for sample in range(len(maps)):
            x, y = cells[sample].reshape(len(cells[sample]), -1), maps[sample].reshape(maps.shape[1], -1)
            for i in range(x.shape[1]):
                cosines = [
                    x[:, i] @ x[:, j] / np.linalg.norm(x[:, i]) / np.linalg.norm(x[:, j]) for j in range(len(x.T))
                ]
                weights = np.maximum(cosines, 0)
                out[sample, :, i // size[1], i % size[1]] = y @ weights / weights.sum()
        return out

    def branch(self, images: Array, tags: Array) -> tuple[Array, Array]:
        maps, layers = self.maps(images)
        return maps, self.refined(self.scores(self.attention(maps, tags)), images, layers)

    def loss(self, images: Array, tags: Array) -> dict[str, float]:
        """Each term without its weight."""
        height, width = (round(self.settings.scale * extent) for extent in images.shape[2:])
        (maps, refined), (maps_t, refined_t) = (
            self.branch(view, tags) for view in (images, bilinear(images, height, width))
        )
        size = maps_t.shape[2:]
        found, found_t = bilinear(self.attention(maps, tags), *size), self.attention(maps_t, tags)
        logits = [each.mean((2, 3)) for each in (maps, maps_t)]
        margins = [np.mean(np.logaddexp(0, x) - tags * x) for x in logits]
        pairs = [(bilinear(refined, *size), self.scores(found_t)), (refined_t, self.scores(found))]
        return {
            "classification": float(np.mean(margins)),
            "equivariance": float(np.abs(found - found_t).mean()),
            "cross": sum(self.hardest(np.abs(one - other)) for one, other in pairs),
            "minimum": float(np.mean([self.weakest(each) for each in (refined, refined_t)])),
        }

    def hardest(self, losses: Array) -> float:
        each = losses.mean(1) if self.settings.mining == "cells" else losses
        each = np.sort(each.reshape(len(each), -1), 1)[:, ::-1]
        return float(each[:, : max(1, int(self.settings.hard * each.shape[1]))].mean())

    def weakest(self, refined: Array) -> float:
        each = np.sort(refined[:, :K].max(1).reshape(len(refined), -1), 1)
        return float(each[:, : max(1, each.shape[1] // 4)].mean())


class SeamContract(MethodContract):
    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        maps, _ = Formula(self.block.method.settings, weights).maps(images)
        return maps.mean((2, 3)), maps

    def formula(self, method: Method) -> Formula:
        """Of the network in evaluation mode; its cells' colours weigh more, so that their weights differ."""
        assert isinstance(method.eval(), Seam)
        with torch.no_grad():
            method.correlation.embedding.weight[:, :3] *= 30
        weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
        return Formula(self.block.method.settings, weights)

    def test_localization_is_refined(self, method: Method, images: Tensor) -> None:
        _, refined = self.formula(method).branch(images.double().numpy(), np.ones((4, K)))
        with torch.no_grad():
            found, output = method.localize(images), method(images)
        assert np.abs(found.numpy() - refined[:, :K]).max() < 1e-4
        assert np.abs(output.refined.numpy() - refined).max() < 1e-4
        assert np.ptp(refined[:, :K], (2, 3)).max() > 0.02

    def test_loss_is_its_formula(self, method: Method, images: Tensor) -> None:
        settings = self.block.method.settings
        terms = self.formula(method).loss(images.double().numpy(), TAGS.double().numpy())
        with torch.no_grad():
            step = method.training_step(images, TAGS, 0)
            plain = method(images)
        expected = terms["classification"] + settings.cross * terms["cross"]
        expected += settings.equivariance * terms["equivariance"] + settings.minimum * terms["minimum"]
        assert float(step.loss) == pytest.approx(expected, rel=1e-4)
        assert min(terms.values()) > 1e-3
        assert torch.equal(step.output.maps, plain.maps)  # OAA accumulates the maps of the images themselves
        assert torch.equal(step.output.logits, plain.logits)


class TestSeam(SeamContract):
    block = seam(scale=0.5)


class TestSeamAsItsCode(SeamContract):
    block = seam(strongest=True, mining="values", minimum=1.0)
    steps = 50  # the minimum pooling delays the classes


class TestSeamByOtherSettings(SeamContract):
    block = seam(
        scale=0.7, levels=("conv2", "conv6"), channels=(8, 12), equivariance=0.5, cross=2.0, hard=0.5, minimum=0.1
    )


class TestGradients:
    @pytest.fixture
    def images(self) -> Tensor:
        return torch.randn(4, 3, 40, 56, generator=torch.Generator().manual_seed(3))

    def gradients(self, method: Seam, loss: Tensor) -> dict[str, float]:
        """By part of the network, the largest gradient."""
        method.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found: dict[str, float] = {}
        for name, parameter in method.named_parameters():
            part = name.split(".")[0]
            largest = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
            found[part] = max(found.get(part, 0.0), largest)
        return found

    def test_the_module_alone_learns_from_refined_maps(self, images: Tensor) -> None:
        method = built(seam())
        output = method(images)
        assert isinstance(output, SeamOutput)
        found = self.gradients(method, output.refined.square().sum())
        assert found["backbone"] == found["head"] == 0
        assert found["correlation"] > 0

    def test_cross_regularization_teaches_the_module_alone(self, images: Tensor) -> None:
        """L_ECR's targets are constants: what the backbone learns does not change with its weight."""
        found = []
        for cross in (1.0, 50.0):
            method = built(seam(cross=cross))
            found.append(self.gradients(method, method.training_step(images, TAGS, 0).loss))
        assert found[0]["backbone"] == pytest.approx(found[1]["backbone"], rel=1e-4)
        assert found[0]["head"] == pytest.approx(found[1]["head"], rel=1e-4)
        assert found[1]["correlation"] == pytest.approx(50 * found[0]["correlation"], rel=1e-3)

    def test_equivariance_teaches_the_classifier(self, images: Tensor) -> None:
        found = []
        for weight in (0.0, 50.0):
            method = built(seam(equivariance=weight))
            found.append(self.gradients(method, method.training_step(images, TAGS, 0).loss))
        assert found[1]["backbone"] > 2 * found[0]["backbone"]
        assert found[1]["correlation"] == pytest.approx(found[0]["correlation"], rel=1e-4)


class TestFeatures:
    def test_the_head_reads_no_negative_features(self) -> None:
        """As where a backbone ends in a batch norm (ResNet-38)."""
        method = built(seam()).eval()
        method.backbone.stages["conv6"].register_forward_hook(lambda _module, _inputs, output: output - 0.5)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            features = method.backbone(images)
            assert features.min() < 0
            torch.testing.assert_close(method(images).maps, method.head(features.relu()))


class TestPixelCorrelation:
    def test_cells_of_one_colour_share_their_mean(self) -> None:
        """Two colours at a right angle: a cell's weights are 1 within its colour and 0 outside."""
        correlation = PixelCorrelation([1, 1], [1, 2])
        with torch.no_grad():
            correlation.embedding.weight.zero_()
            correlation.embedding.weight[:3, :3, 0, 0] = torch.eye(3)
        images = torch.zeros(1, 3, 4, 8)
        images[:, 0, :, :4], images[:, 1, :, 4:] = 2.0, 0.5
        maps = torch.tensor([[[[1.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.2, 0.6]]]])
        levels = [torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 2, 4)]
        expected = torch.tensor([0.5, 0.5, 0.3, 0.3]).expand(1, 1, 2, 4)
        torch.testing.assert_close(correlation(maps, images, levels), expected)

    def test_cells_that_point_apart_do_not_weigh(self) -> None:
        """A cosine of -1 counts as 0."""
        correlation = PixelCorrelation([1, 1], [1, 2])
        images = torch.ones(1, 3, 1, 2)
        images[..., 1] = -1
        maps = torch.tensor([1.0, 0.25]).view(1, 1, 1, 2)
        levels = [torch.zeros(1, 1, 1, 2)] * 2
        torch.testing.assert_close(correlation(maps, images, levels), maps)

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        correlation = PixelCorrelation([4, 5], [6, 7])
        inputs = torch.rand(2, 3, 5, 7), torch.randn(2, 3, 40, 56), [torch.rand(2, 4, 20, 28), torch.rand(2, 5, 5, 7)]
        whole = correlation(*inputs)
        monkeypatch.setattr(module, "BLOCK", 8)
        torch.testing.assert_close(correlation(*inputs), whole)


class TestSettings:
    def test_a_level_that_is_no_tap_is_refused(self) -> None:
        with pytest.raises(
            PipelineError, match=r"method\.seam\.levels: no tap conv5; the taps are conv2, conv4, conv6"
        ):
            built(seam(levels=("conv4", "conv5")))

    @pytest.mark.parametrize(
        "wrong", [{"scale": 0.0}, {"scale": 1.5}, {"cross": 0.0}, {"hard": 0.0}, {"channels": [0, 8]}], ids=str
    )
    def test_what_makes_no_sense_is_refused(self, wrong: dict[str, Any]) -> None:
        faults: list[str] = []
        build_block(Settings, wrong, "method.seam", faults)
        assert len(faults) == 1
        assert faults[0].startswith(f"method.seam.{next(iter(wrong))}")

    def test_the_report_tells_the_code_from_the_paper(self) -> None:
        assert built(seam()).describe() == "SEAM (scale 0.3, L_ER 1, L_ECR 1 of the hardest 20 % of cells)"
        assert built(seam(strongest=True, mining="values", minimum=1.0)).describe() == (
            "SEAM (scale 0.3, L_ER 1, L_ECR 1 of the hardest 20 % of values, the strongest class alone refined,"
            " minimum pooling 1)"
        )

    def test_occluded_places_are_those_of_both_copies(self) -> None:
        """All of an image occluded, both copies' maps are even and equal: the classification of the biases is left."""
        method = built(seam(scale=0.5)).eval()
        torch.nn.init.normal_(method.head.classifier.bias)
        images, occluded = torch.randn(1, 3, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)
        with torch.no_grad():
            loss, output = method.training_step(images, TAGS[:1], 0, occluded)
        torch.testing.assert_close(output.logits[0], method.head.classifier.bias.detach())
        torch.testing.assert_close(loss, method.loss(output, TAGS[:1]))

    def test_blank_and_single_images_in_bf16_stay_finite(self) -> None:
        method = built(seam()).train()
        for images in (torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 2.0), torch.randn(1, 3, 48, 48)):
            method.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss, output = method.training_step(images, TAGS[: len(images)], 0)
            loss.backward()  # type: ignore[no-untyped-call]
            assert loss.isfinite()
            assert method.localization(output).isfinite().all()
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_a_frozen_backbone_stays_as_it_is(self) -> None:
        block = seam()
        method = built(replace(block, backbone=replace(block.backbone, frozen_batch_norm=True))).train()
        before = {name: value.clone() for name, value in method.named_buffers()}
        method.training_step(torch.randn(2, 3, 32, 32), TAGS[:2], 0)
        assert before
        assert all(torch.equal(value, before[name]) for name, value in method.named_buffers())
