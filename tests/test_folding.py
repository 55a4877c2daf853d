"""Folding of batch norms, for every registered backbone, method and network, against the network as it was trained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pipeline.config.registry import BACKBONES, METHODS, SEGMENTATIONS, Choice
from pipeline.config.schema import Affinity, Backbone, Classifier, Head, Suppression, Training
from pipeline.inference import folding
from pipeline.inference.folding import fold
from pipeline.methods.base import Output
from pipeline.runtime import Runtime
from pipeline.training import models
from pipeline.workflow import apply
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from tests import test_deeplab
from tests.networks import build, randomise_batch_norms
from tests.test_new_methods import NETWORKS
from tests.voc_tree import make_index

K = 3
SMALL = Backbone("small")
TRAINING = Training(batch_size=2, lr=0.1, epochs=1)
FOLDED = {"resnet38": 20}  # those that read a convolution, not a sum. All batch norms, where not listed
TIMM = ("resnet18", "tf_efficientnet_lite0", "regnetx_002")  # the last two have activations inside of batch norms


def classifier(method: str = "cam", **more: Any) -> Classifier:
    return Classifier(SMALL, TRAINING, Choice(METHODS, method), Head(1, 8, batch_norm=True), **more)


def outputs(network: nn.Module, images: Tensor, precision: torch.dtype = torch.float32) -> list[Tensor]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        results = [network(images)]
        if hasattr(network, "localize"):
            results.append(network.localize(images))
    leaves = pytree.tree_leaves([vars(each) if isinstance(each, Output) else each for each in results])
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor)]


def prepared(network: nn.Module) -> nn.Module:
    randomise_batch_norms(network)
    return network.eval()


def folded(network: nn.Module) -> list[nn.BatchNorm2d]:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [norm for norm in norms if "forward" in vars(norm)]


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not round weights to bf16, so that outputs must be equal."""
    monkeypatch.setattr(folding._Trace, "converted", lambda self: [])


def assert_equal_outputs(network: nn.Module, side: int = 48) -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, side, side + 8)
    expected = outputs(network, images)
    for found, wanted in zip(outputs(fold(network), images), expected, strict=True):
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max() + 1e-7
    assert len(expected) > 0


@pytest.mark.parametrize("name", [*BACKBONES.names(), *(f"timm:{name}" for name in TIMM)])
def test_backbones_compute_the_same(name: str, in_fp32: None) -> None:
    torch.manual_seed(0)
    network = prepared(build(name))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert_equal_outputs(network)
    assert len(folded(network)) == FOLDED.get(name, norms)


@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(lambda method=method: models.build(classifier(method), K), id=method)
            for method in METHODS.names()
            if METHODS.file(method)
        ),
        *(pytest.param(lambda block=block: models.build(block, K), id=name) for name, block in NETWORKS.items()),
        *(
            pytest.param(lambda name=name: test_deeplab.segmentation(name, "small", **test_deeplab.NEAR[name]), id=name)
            for name in SEGMENTATIONS.names()
        ),
        pytest.param(lambda: models.build(Affinity("pseudo_labels/x", SMALL, TRAINING, channels=8), K), id="affinity"),
        pytest.param(lambda: models.build(classifier(suppression=Suppression(delta=0.5)), K), id="suppression"),
    ],
)
def test_networks_compute_the_same(make: Callable[[], nn.Module], in_fp32: None) -> None:
    torch.manual_seed(0)
    network = prepared(make())
    assert_equal_outputs(network)
    assert folded(network)


def test_bf16_changes_no_more_than_bf16_does() -> None:
    """Against fp32, folded bf16 is about as far off as bf16 is; the weights are bf16."""
    torch.manual_seed(0)
    network = prepared(build("mobilenet_v2"))
    images = torch.randn(4, 3, 96, 96)
    (exact,), (rounded,) = outputs(network, images), outputs(network, images, torch.bfloat16)
    (found,) = outputs(fold(copy.deepcopy(network)), images, torch.bfloat16)
    error, usual = ((each - exact).square().mean().sqrt() for each in (found, rounded))
    assert 0 < error < 1.5 * usual
    convs = [module for module in fold(network).modules() if type(module) is nn.Conv2d]
    assert {conv.weight.dtype for conv in convs} == {torch.bfloat16}


def test_gradients_reach_the_images() -> None:
    """Climbing needs them; with gradients, slow depthwise convolutions compute in fp32 (``networks.convolutions``)."""
    torch.manual_seed(0)
    network = fold(prepared(build("mobilenet_v2")))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total = network(images).float().square().sum()
    (gradient,) = torch.autograd.grad(total, images)
    assert gradient.isfinite().all()
    assert gradient.any()


class Odd(nn.Module):
    """Convolutions and batch norms in all arrangements that must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(7))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(7))
        self.norms[5].register_forward_hook(lambda _module, _inputs, output: output + 1)
        self.convs[6].register_forward_hook(lambda _module, _inputs, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.convs, self.norms
        raw = conv[0](x)
        x = norm[0](raw) + raw  # read by another operation as well
        x = norm[1](conv[1](x).relu())  # an operation in between
        x = norm[2](conv[2](x)) + norm[2](x)  # the batch norm reads something else as well
        y = conv[3](x)
        x = norm[3](y) + norm[4](y)  # two batch norms
        x = norm[3](conv[4](x))  # a batch norm of two convolutions
        x = norm[5](conv[5](x))
        x = norm[6](conv[6](x))
        with torch.autocast("cpu", enabled=False):
            return functional.relu(conv[6](x.float()))


def test_what_cannot_be_folded_stays() -> None:
    torch.manual_seed(0)
    network = prepared(Odd())
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    assert not folded(fold(network))
    assert network.convs[6].weight.dtype == torch.float32  # autocast was off in one of its calls
    assert network.convs[5].weight.dtype == torch.bfloat16
    for conv in network.convs:
        conv.float()
    torch.testing.assert_close(network(images), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_folds_in_bf16_only(tmp_path: Path, precision: Any) -> None:
    block = Classifier(SMALL, Training(2, 0.1, epochs=1, precision=precision), head=Head(1, 8))
    models.save(tmp_path / "model.pt", models.build(block, K), block, K)
    inputs = {"index": make_index(tmp_path / "tree", train=3, evaluation=1), "model": tmp_path / "model.pt"}
    job = Job("test", "x", inputs, {}, {}, None, used_blocks=(block,))
    applied = apply.Application(Work(job, inputs, {}, Runtime(device="cpu"), "", tmp_path), job.precision)
    assert bool(folded(applied.network)) == (precision == "bf16")
    weights = {module.weight.dtype for module in applied.network.modules() if isinstance(module, nn.Conv2d)}
    assert weights == {torch.bfloat16 if precision == "bf16" else torch.float32}
