"""EDAM under the methods' contract, and its collaborative attention against plain blocks, class by class."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import Backbone, Suppression
from pipeline.methods.base import Method
from pipeline.methods.collaboration import CollaborativeAttention, sinusoid
from pipeline.methods.edam import Edam
from pipeline.training.settings import parameter_groups
from tests.method_contract import Arithmetic, Array, K, MethodContract, build_method, small_classifier

Settings = Edam.Settings
SMALL = Settings(channels=16, heads=2, hidden=24)


class TestEdam(MethodContract):
    block = small_classifier("edam", SMALL)

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        """K + 1 scores over their norm, without sign (EDAM Eq. 1); these times features, averaged, weighed."""
        features = Arithmetic.small_backbone(weights, images)
        scores = Arithmetic.conv(features, weights["activation.weight"], padding=1)
        reduced = Arithmetic.conv(features, weights["reduction.weight"])
        masks = np.zeros((len(images), K, *scores.shape[2:]))
        for sample, row, column in np.ndindex(len(images), *scores.shape[2:]):
            vector = scores[sample, :, row, column]
            masks[sample, :, row, column] = np.abs(vector / np.sqrt((vector**2).sum()))[:K]
        logits = np.zeros((len(images), K))
        for sample, number in np.ndindex(len(images), K):
            activation = reduced[sample] * masks[sample, number]
            logits[sample, number] = weights["classifier.weight"][number, :, 0] @ activation.mean((1, 2))
        return logits, masks

    def test_localization_maps_are_the_masks(self, method: Method, images: Tensor) -> None:
        method.eval()
        with torch.no_grad():
            found = method.localize(images)
            assert torch.equal(found, method(images).maps)
        assert found.max() <= 1
        background = 1 - found.square().sum(1)  # what is left of the unit vector
        assert background.min() > -1e-6
        assert background.max() > 1e-3

    def test_localization_maps_may_be_the_scores(self, method: Method, images: Tensor) -> None:
        """The masks are these scores, with that of the background, over their norm."""
        scored = build_method(small_classifier("edam", replace(method.settings, maps="scores")), K).eval()
        scored.load_state_dict(method.state_dict())
        with torch.no_grad():
            scores = scored.localize(images)
            every = scored.activation(scored.backbone(images))  # type: ignore[operator]
            torch.testing.assert_close(scores / every.norm(dim=1, keepdim=True), method.eval().localize(images))
            assert torch.equal(scored(images).maps, method(images).maps)  # the training is the same
        assert scores.shape == (4, K, *every.shape[2:])
        assert "maps of scores" in scored.describe()
        assert "scores" not in method.describe()

    def test_in_training_the_images_of_a_group_see_each_other(self, images: Tensor) -> None:
        method = build_method(small_classifier("edam", replace(SMALL, dropout=0.0)), K)
        for norm in (module for module in method.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.eval()
        other = images.clone()
        other[1] = images[1].flip(0)
        with torch.no_grad():
            one, changed = method(images), method(other)
        assert not torch.equal(one.logits[:2], changed.logits[:2])
        torch.testing.assert_close(one.logits[2:], changed.logits[2:])
        torch.testing.assert_close(one.maps[[0, 2, 3]], changed.maps[[0, 2, 3]])

    def test_an_occluded_place_belongs_to_no_class(self, method: Method, images: Tensor) -> None:
        occluded = torch.ones(4, 1, 40, 56, dtype=torch.bool)
        output = method(images, occluded)
        assert not output.maps.any()
        method.loss(output, torch.eye(K)[:4]).backward()  # type: ignore[no-untyped-call]
        assert all(value.grad is None or value.grad.isfinite().all() for value in method.parameters())

    def test_new_convolutions_learn_faster_and_the_attention_at_the_base_rate(self, method: Method) -> None:
        groups = parameter_groups(method, method.new_layers(), replace(self.block.training, lr_new=10, lr_bias=1))
        rate = {id(value): group["multiplier"] for group in groups for value in group["params"]}  # type: ignore[attr-defined]
        for name, parameter in method.named_parameters():
            new = name.split(".")[0] in ("activation", "reduction", "classifier")
            assert rate[id(parameter)] == (10 if new else 1), name


class TestWithoutCollaboration(TestEdam):
    """The discriminative activation layer alone (EDAM Table 5): what it does in training, too."""

    block = small_classifier("edam", replace(SMALL, collaborative=False))

    def test_in_training_the_images_of_a_group_see_each_other(self, images: Tensor) -> None:
        """Here they do not: the logits are those of evaluation."""
        method = build_method(replace(self.block, backbone=Backbone("small", frozen_batch_norm=True)), K)
        with torch.no_grad():
            assert torch.equal(method(images).logits, method.eval()(images).logits)


class TestSuppressedEdam(MethodContract):
    """DRS in the backbone's layers, and groups of three."""

    block = small_classifier("edam", replace(SMALL, group=3), suppression=Suppression(0.55))

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        def suppressed(number: int, features: Array) -> Array:
            return np.minimum(features, 0.55 * features.max((2, 3), keepdims=True))

        original = Arithmetic.small_backbone
        plain = TestEdam()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Arithmetic, "small_backbone", lambda weights, x: original(weights, x, suppressed))
            return plain.expected(weights, images)


# --- collaborative multi-attention ----------------------------------------------------------------------------------


def attention(classes: int, **settings: Any) -> CollaborativeAttention:
    """Without dropout; all parameters random, so that none can be forgotten."""
    torch.manual_seed(1)
    found = CollaborativeAttention(classes, replace(SMALL, dropout=0.0, **settings))
    for name, parameter in found.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return found


def inputs(images: int, classes: int, height: int = 4, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(images, SMALL.channels, height, width, generator=generator)
    return features, torch.rand(images, classes, height, width, generator=generator)


def layer_norm(x: Array, scale: Array, shift: Array) -> Array:
    centred = x - x.mean(1, keepdims=True)
    found: Array = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scale + shift
    return found


def plain_block(module: CollaborativeAttention, number: int, x: Array) -> Array:
    """Class ``number``'s pre-norm block on T x C places of one group, with its T x T attention written out."""
    weights = {name: value[number].numpy() for name, value in module.state_dict().items() if value.dim() == 3}
    weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def linear(name: str, x: Array) -> Array:
        found: Array = x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return found

    normed = layer_norm(x, weights["attention_norm.weight"], weights["attention_norm.bias"])
    queries, keys, values = (linear(name, normed) for name in ("queries", "keys", "values"))
    width = x.shape[1] // module.heads
    heads = []
    for head in range(module.heads):
        at = slice(head * width, (head + 1) * width)
        scores = queries[:, at] @ keys[:, at].T / np.sqrt(width)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(chances / chances.sum(1, keepdims=True) @ values[:, at])
    x = x + linear("merge", np.concatenate(heads, 1))
    hidden = linear("expand", layer_norm(x, weights["feed_forward_norm.weight"], weights["feed_forward_norm.bias"]))
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return x + linear("contract", gelu)


def plain_attention(module: CollaborativeAttention, features: Tensor, masks: Tensor) -> Array:
    """B x K x C, group by group and class by class."""
    (images, channels, height, width), classes = features.shape, masks.shape[1]
    places = np.arange(height * width)[:, None] / 10000 ** (np.arange(0, channels, 2) / channels)
    position = np.zeros((height * width, channels))
    position[:, 0::2], position[:, 1::2] = np.sin(places), np.cos(places)
    which = module.image_position.detach().double().numpy()
    out = np.zeros((images, classes, channels))
    for start in range(0, images, module.group):
        members = range(start, min(start + module.group, images))
        for number in range(classes):
            maps = [(features[n] * masks[n, number]).double().numpy().reshape(channels, -1).T for n in members]
            tokens = np.concatenate([found + position + which[i] for i, found in enumerate(maps)])
            out[start : members.stop, number] = (
                plain_block(module, number, tokens).reshape(len(maps), -1, channels).mean(1)
            )
    return out


@pytest.mark.parametrize(
    ("images", "classes", "group", "heads"),
    [
        (4, K, 2, 2),  # two whole groups
        (5, K, 2, 2),  # the last has one image
        (7, 3, 4, 4),  # the last has three
        (2, K, 3, 1),  # there is only a smaller one
        (3, 2, 1, 2),  # each image for itself
        (2, 1, 2, 2),  # one class
    ],
)
def test_all_blocks_at_once_are_the_blocks_one_by_one(images: int, classes: int, group: int, heads: int) -> None:
    module, (features, masks) = attention(classes, group=group, heads=heads), inputs(images, classes)
    with torch.no_grad():
        found = module(features, masks).numpy()
    expected = plain_attention(module, features, masks)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_gradients_are_those_of_the_formula() -> None:
    module, (features, masks) = attention(2, heads=1).double(), inputs(3, 2, 2, 3)
    given = (features.double().requires_grad_(), masks.double().requires_grad_())
    assert torch.autograd.gradcheck(module, given)
    module(*given).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in module.parameters())


def test_the_classes_are_apart() -> None:
    """A class's output hangs on its own mask and block alone, and no two blocks start alike."""
    module, (features, masks) = attention(3), inputs(2, 3)
    with torch.no_grad():
        before = module(features, masks)
        masks[:, 1] = 0  # an image without it
        after = module(features, masks)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert after.isfinite().all()
    for layer in (module.queries, module.keys, module.values, module.merge, module.expand, module.contract):
        assert not torch.allclose(layer.weight[0], layer.weight[1])


def test_one_class_may_be_all_that_a_mask_shows() -> None:
    module, (features, masks) = attention(3), inputs(2, 3)
    masks[:, :2] = 0
    masks[0, 2] = 1
    with torch.no_grad():
        found = module(features, masks).numpy()
    np.testing.assert_allclose(found, plain_attention(module, features, masks), atol=1e-5)


def test_images_are_told_apart_by_their_place_in_the_group() -> None:
    module, (features, masks) = attention(2), inputs(2, 2)
    with torch.no_grad():
        found, swapped = module(features, masks), module(features.flip(0), masks.flip(0)).flip(0)
        assert not torch.allclose(found, swapped)
        module.image_position.data[1] = module.image_position.data[0]
        torch.testing.assert_close(module(features, masks), module(features.flip(0), masks.flip(0)).flip(0))


@pytest.mark.parametrize(("places", "width"), [(6, 4), (1, 8), (2116, 128), (3, 5)])
def test_places_have_sines_and_cosines(places: int, width: int) -> None:
    found = sinusoid(places, width, torch.device("cpu"))
    assert found.shape == (places, width)
    for place in {0, places // 2, places - 1}:
        for column in {0, 1, width // 2, width - 1}:
            angle = place / 10000 ** (column // 2 * 2 / width)
            expected = np.cos(angle) if column % 2 else np.sin(angle)
            assert float(found[place, column]) == pytest.approx(expected, abs=2e-4)


def test_dropout_is_of_the_training_alone() -> None:
    module, (features, masks) = attention(2), inputs(2, 2)
    module.dropout.p = 0.5
    with torch.no_grad():
        assert not torch.equal(module(features, masks), module(features, masks))
        module.eval()
        assert torch.equal(module(features, masks), module(features, masks))


def test_the_trained_method_is_collaborative() -> None:
    """In training mode the logits are each class's classifier on what the plain blocks give."""
    torch.manual_seed(0)
    method = build_method(small_classifier("edam", replace(SMALL, dropout=0.0)), K)
    assert isinstance(method, Edam)
    assert method.collaboration is not None
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        output, features = method(images), method.backbone(images)
        pooled = plain_attention(method.collaboration, method.reduction(features), output.maps)
    expected = np.einsum("bkc,kc->bk", pooled, method.classifier.weight[:, :, 0].detach().double().numpy())
    np.testing.assert_allclose(output.logits.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), 2),
        (Settings(group=4), 4),
        (Settings(group=1), 1),
        (Settings(pairing="random"), 1),
        (Settings(collaborative=False), 1),
    ],
)
def test_how_many_images_of_a_batch_share_a_class(settings: Edam.Settings, expected: int) -> None:
    assert build_method(small_classifier("edam", settings), K).companions == expected
    assert build_method(small_classifier(), K).companions == 1
