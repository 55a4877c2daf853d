"""Every method under the one contract, and what is a method's own."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from pipeline.config.registry import METHODS
from pipeline.config.schema import Suppression
from pipeline.methods.base import Method, Output
from tests.method_contract import Arithmetic, Array, K, MethodContract, small_classifier


def test_each_method_has_its_test() -> None:
    for file in Path(__file__).parent.glob("test_*.py"):
        if "MethodContract" in file.read_text():
            import_module(f"tests.{file.stem}")
    tested = {contract.block.method.name for contract in contracts(MethodContract) if hasattr(contract, "block")}
    registered = {name for name in METHODS.names() if METHODS.file(name)}
    assert registered == tested


def contracts(kind: type[MethodContract]) -> Iterator[type[MethodContract]]:
    """The classes that inherit it, and those that inherit these."""
    for contract in kind.__subclasses__():
        yield contract
        yield from contracts(contract)


class TestCam(MethodContract):
    block = small_classifier(method="cam")

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        """Backbone, one 3x3 convolution, the class-aware 1x1 convolution; the logit is a map's mean (OAA Eq. 1)."""
        features = Arithmetic.small_backbone(weights, images)
        head = Arithmetic.conv(features, weights["head.convs.0.weight"], weights["head.convs.0.bias"], padding=1)
        maps = Arithmetic.conv(np.maximum(head, 0), weights["head.classifier.weight"], weights["head.classifier.bias"])
        return maps.mean((2, 3)), maps

    def test_localization_is_the_maps_positive_part(self, method: Method, images: torch.Tensor) -> None:
        method.eval()
        with torch.no_grad():
            assert torch.equal(method.localize(images), method(images).maps.clamp(min=0))

    def test_new_layers_are_all_but_the_backbone(self, method: Method) -> None:
        new = {id(parameter) for layer in method.new_layers() for parameter in layer.parameters()}
        others = {id(value) for name, value in method.named_parameters() if not name.startswith("backbone.")}
        assert new == others


class Suppressed(MethodContract):
    """DRS in every layer: the six of the backbone and the head's convolution (DRS Alg. 1), element by element."""

    def gate(self, weights: dict[str, Array], number: int, features: Array) -> Array:
        """B x K control values."""
        raise NotImplementedError

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        def suppressed(number: int, features: Array) -> Array:
            gate = self.gate(weights, number, features)
            out = features.copy()
            for sample, channel in np.ndindex(*features.shape[:2]):
                bound = features[sample, channel].max() * gate[sample, channel]
                above = features[sample, channel] > bound
                out[sample, channel][above] = bound
            return out

        features = Arithmetic.small_backbone(weights, images, suppressed)
        head = Arithmetic.conv(features, weights["head.convs.0.weight"], weights["head.convs.0.bias"], padding=1)
        last = suppressed(6, np.maximum(head, 0))
        maps = Arithmetic.conv(last, weights["head.classifier.weight"], weights["head.classifier.bias"])
        return maps.mean((2, 3)), maps


class TestLearnableSuppression(Suppressed):
    block = small_classifier(method="cam", suppression=Suppression())

    @pytest.fixture
    def method(self) -> Method:
        """Control values far from one another."""
        method = cast(Method, MethodContract.method.__wrapped__(self))  # type: ignore[attr-defined]
        for suppressor in method.suppressors:
            suppressor.controller.weight.data.normal_()  # type: ignore[union-attr]
        return method

    def gate(self, weights: dict[str, Array], number: int, features: Array) -> Array:
        controls = np.zeros(features.shape[:2])
        for sample, channel in np.ndindex(*features.shape[:2]):
            means = [features[sample, other].mean() for other in range(features.shape[1])]
            controls[sample, channel] = np.dot(weights[f"suppressors.{number}.controller.weight"][channel], means)
        gate: Array = 1 / (1 + np.exp(-controls))
        return gate


class TestFixedSuppression(Suppressed):
    block = small_classifier(method="cam", suppression=Suppression(delta=0.55))

    def gate(self, weights: dict[str, Array], number: int, features: Array) -> Array:
        return np.full(features.shape[:2], 0.55)


def test_loss_by_hand() -> None:
    """Two of five classes tagged, logits 0 but for one of 2: the mean of five binary cross entropies."""
    method = METHODS["cam"](small_classifier(), K)
    output = Output(torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]]), torch.zeros(1, K, 2, 2))
    tags = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    expected = (4 * np.log(2) + np.log1p(np.exp(-2))) / 5
    assert float(method.loss(output, tags)) == pytest.approx(expected)
