"""Every method under the one contract, and what is a method's own."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from pipeline.methods import METHODS, Method, Output
from pipeline.schema import Classifier
from tests.method_contract import Arithmetic, Array, K, MethodContract, small_classifier


def test_the_schema_knows_all_methods_and_each_has_its_test() -> None:
    tested = {contract.settings.method for contract in MethodContract.__subclasses__()}
    assert set(get_args(get_type_hints(Classifier)["method"])) == set(METHODS) == tested


class TestCam(MethodContract):
    settings = small_classifier(method="cam")

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


def test_loss_by_hand() -> None:
    """Two of five classes tagged, logits 0 but for one of 2: the mean of five binary cross entropies."""
    method = METHODS["cam"](small_classifier(), K)
    output = Output(torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]]), torch.zeros(1, K, 2, 2))
    tags = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    expected = (4 * np.log(2) + np.log1p(np.exp(-2))) / 5
    assert float(method.loss(output, tags)) == pytest.approx(expected)
