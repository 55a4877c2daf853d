"""Discriminative region suppression: gradients, where it can be plugged in, and what it costs in parameters."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.registry import BACKBONES
from pipeline.config.schema import Backbone, Classifier, Head, Suppression, Training
from pipeline.errors import PipelineError
from pipeline.methods.amr import Amr
from pipeline.methods.drs import Suppressor
from pipeline.methods.modulation import SpatialModulation
from pipeline.training.settings import parameter_groups
from tests.marks import DEVICES
from tests.method_contract import build_method

TRAINING = Training(5, 0.001, epochs=15, milestones=(5, 10), nesterov=True)


def classifier(name: str = "small", suppression: Suppression | None = None, convs: int = 3) -> Classifier:
    return Classifier(
        Backbone(name),  # type: ignore[arg-type]
        TRAINING,
        head=Head(convs),
        suppression=suppression or Suppression(),
    )


def plain(x: Tensor, gate: Tensor) -> Tensor:
    """Algorithm 1 in torch's own operations."""
    return torch.minimum(x, functional.adaptive_max_pool2d(x, 1) * gate)


def test_by_hand() -> None:
    """0.7 of the maximum: 'until no element exceeds 70 % of the k-th maximum value'."""
    x = torch.tensor([[[[10.0, 7.5], [6.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    expected = torch.tensor([[[[7.0, 7.0], [6.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    torch.testing.assert_close(Suppressor(3, 0.7)(x), expected)


def test_the_learnable_controller_starts_near_one_half() -> None:
    torch.manual_seed(0)
    suppressor = Suppressor(64, 0)
    x = torch.rand(4, 64, 8, 8)
    kept = suppressor(x).amax((2, 3)) / x.amax((2, 3))
    assert kept.min() > 0.4
    assert kept.max() < 0.6
    assert kept.std() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("delta", [0.0, 0.55])
def test_gradients_flow_through_features_maxima_and_controls(delta: float, device: str) -> None:
    """Against torch's own operations on the CPU; of equal maxima the first gets it, as in max pooling."""
    torch.manual_seed(0)
    suppressor = Suppressor(6, delta).double()
    there = copy.deepcopy(suppressor).to(device)
    x = torch.randn(3, 6, 5, 4, dtype=torch.double).relu()
    x[0, 0] = 2.0  # every element is the maximum
    x[1, 1, :2] = x[1, 1].max()
    weights = torch.randn(3, 6, 5, 4, dtype=torch.double)
    leaves = [x.requires_grad_(), *suppressor.parameters()]
    gate = torch.full((3, 6, 1, 1), delta, dtype=torch.double)
    if suppressor.controller is not None:
        gate = torch.sigmoid(x.mean((2, 3)) @ suppressor.controller.weight.T)[:, :, None, None]
    expected = torch.autograd.grad((plain(x, gate) * weights).sum(), leaves)
    moved = x.detach().to(device, memory_format=torch.channels_last).requires_grad_()
    found = torch.autograd.grad((there(moved) * weights.to(device)).sum(), [moved, *there.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)
        assert one.abs().sum() > 0


class Accumulations(TorchDispatchMode):
    """Counts writes at indices that may repeat, which CUDA sorts."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if "index_put" in function.name():
            self.count += bool(arguments[3] if len(arguments) > 3 else (named or {}).get("accumulate"))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("module", [Suppressor(4, 0.5), SpatialModulation(Amr.Settings())])
def test_no_gradient_is_accumulated_at_indices(module: nn.Module) -> None:
    """The positions of maxima are distinct."""
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    y = module(x).square().sum()
    with Accumulations() as counted:
        y.backward()
    assert counted.count == 0
    with counted:
        torch.zeros(3).index_put_((torch.tensor([1, 1]),), torch.ones(2), accumulate=True)
    assert counted.count == 1


def test_gradients_are_their_numeric_limits() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(Suppressor(3, 0).double(), (x,))
    assert torch.autograd.gradcheck(Suppressor(3, 0.4).double(), (x,))


def test_vgg16_with_learnable_controllers_gains_2_60_million_parameters() -> None:
    """DRS: 'from 21.8M to 24.4M'. 13 + 3 modules of K x K without bias."""
    with torch.device("meta"):
        method = build_method(classifier("vgg16"), 20)
        fixed = build_method(classifier("vgg16", Suppression(0.55)), 20)
    added = sum(parameter.numel() for parameter in method.suppressors.parameters())
    assert len(method.suppressors) == len(fixed.suppressors) == 16
    assert added == 2 * 64**2 + 2 * 128**2 + 3 * 256**2 + 9 * 512**2 == 2_596_864
    total = sum(parameter.numel() for parameter in method.parameters())
    assert round(total / 1e6, 1) == 24.4
    assert total - added == sum(parameter.numel() for parameter in fixed.parameters())
    assert round((total - added) / 1e6, 1) == 21.8


@pytest.mark.parametrize(
    ("name", "layers"),
    [("vgg16", 16), ("small", 9), ("resnet50", 1 + 16 + 3), ("resnet101", 1 + 33 + 3), ("resnet38", 17 + 3)],
)
def test_any_backbone_takes_it(name: str, layers: int) -> None:
    """Activations of a plain network, the stem and the blocks of a residual one, the head's convolutions."""
    with torch.device("meta"):
        method = build_method(classifier(name), 20)
    assert len(method.suppressors) == layers


def test_every_backbone_has_layers_in_every_tap() -> None:
    for name in BACKBONES.names():
        with torch.device("meta"):
            layers = build_method(classifier(name), 20).layers()
        assert all(layers.values()), name
        assert list(layers)[-1] == "head"


def test_mobilenet_takes_it_after_its_blocks_and_activations() -> None:
    """Stem, 17 blocks and the last convolution; a head without convolutions has no layer."""
    with torch.device("meta"):
        method = build_method(classifier("mobilenet_v2", convs=0), 20)
    assert len(method.suppressors) == 1 + 17 + 1
    assert "head" not in method.layers()


def test_layers_are_chosen_by_name() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    one = build_method(classifier(suppression=Suppression(0.5, ("conv6", "head"))), 4).eval()
    assert len(one.suppressors) == 2 + 3
    none = build_method(classifier(suppression=Suppression(0.5, ())), 4).eval()
    assert len(none.suppressors) == 0
    none.load_state_dict(one.state_dict())  # the names of the layers do not depend on what is plugged in
    with torch.no_grad():
        suppressed, free = (method.backbone.features(images, ["conv4", "conv6"]) for method in (one, none))  # type: ignore[operator,union-attr]
    assert torch.equal(suppressed["conv4"], free["conv4"])
    assert not torch.equal(suppressed["conv6"], free["conv6"])
    peaks = (suppressed["conv6"] == suppressed["conv6"].amax((2, 3), keepdim=True)) & (suppressed["conv6"] > 0)
    assert peaks.sum() > 1.5 * peaks.any(3).any(2).sum()  # cut at a level, not a single peak a channel


@pytest.mark.parametrize(
    ("layers", "same"),
    [
        (("-2:",), ("conv6", "head")),
        ((":-2",), ("conv2", "conv4")),
        (("1:3",), ("conv4", "conv6")),
        (("-9:",), None),  # a network of fewer layers has them all
        ((":1", "head"), ("conv2", "head")),
    ],
)
def test_layers_are_chosen_by_slice(layers: tuple[str, ...], same: tuple[str, ...] | None) -> None:
    """Of all layers, from shallow to deep (DRS Table 2 on any network)."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sliced, named = (
        build_method(classifier(suppression=Suppression(0.5, names)), 4).eval() for names in (layers, same)
    )
    named.load_state_dict(sliced.state_dict())
    assert len(sliced.suppressors) == len(named.suppressors) > 0
    with torch.no_grad():
        assert torch.equal(sliced(images).maps, named(images).maps)


def test_a_layer_that_is_none_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"no layer conv9; the layers are conv2, conv4, conv6, head"):
        build_method(classifier(suppression=Suppression(0.5, ("conv9",))), 4)


def test_weights_without_suppression_load_into_the_backbone_with_it() -> None:
    torch.manual_seed(0)
    free = build_method(Classifier(Backbone("small"), TRAINING), 4)
    suppressed = build_method(classifier(), 4)
    keys = suppressed.load_state_dict(free.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("suppressors.") for name in keys.missing_keys)


def test_controllers_learn_at_ten_times_the_rate_and_decay() -> None:
    """METHODS: weights 1x, biases 2x, added layers and all controllers 10x, their biases 20x, decay on everything."""
    with torch.device("meta"):
        method = build_method(classifier("vgg16"), 20)
    groups = parameter_groups(method, method.new_layers(), TRAINING)
    found = {id(parameter): group for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    assert set(found) == set(names)
    for parameter, name in names.items():
        new = not name.startswith("backbone.")
        bias = name.endswith("bias")
        assert found[parameter]["multiplier"] == (10 if new else 1) * (2 if bias else 1), name
        assert found[parameter]["weight_decay"] == 5e-4
