"""Depthwise convolutions that learn fast on a CPU: with gradients of their own, or in fp32 under bf16 autocast."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.schema import Backbone as Settings
from pipeline.networks.backbones import build_backbone
from pipeline.networks.convolutions import Conv2d, SameConv, is_slow, rebuilt, replace_slow


def depthwise(kernel: int = 3, **options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8, **options)


def gradients(conv: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *conv.parameters()])]


def test_with_a_stride_it_is_the_fp32_convolution_rounded_once() -> None:
    conv = depthwise(stride=2)
    x = torch.randn(2, 8, 17, 19)
    equal = rebuilt(conv, Conv2d, padding=conv.padding)
    y = conv(x)
    assert torch.equal(equal(x), y)
    ours, grad_x, grad_weight, _ = gradients(equal, x)
    assert torch.equal(ours, y.bfloat16())
    # The gradients are those of fp32 for the rounded outputs.
    x.requires_grad_()
    expected = torch.autograd.grad(conv(x), [x, conv.weight], 2 * y.bfloat16().float())
    torch.testing.assert_close(grad_x, expected[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad_weight, expected[1], rtol=1e-2, atol=1e-2 * float(expected[1].abs().max()))


# kernel, padding, dilation; rows and columns may differ
SHAPES: list[tuple[Any, Any, Any]] = [
    (3, 2, 2),
    (5, 2, 1),
    (5, 4, 2),
    (5, 0, 2),
    (7, 3, 1),
    (4, 1, 3),
    ((3, 5), (1, 4), (1, 2)),
    ((1, 7), (0, 2), (2, 1)),
]


@pytest.mark.parametrize(("kernel", "padding", "dilation"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_stride_its_gradients_are_torchs(
    kernel: Any, padding: Any, dilation: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, padding=padding, dilation=dilation, groups=6).double()
    equal = rebuilt(conv, Conv2d, padding=conv.padding)
    assert is_slow(equal)
    # Values that bf16 holds, so that only its sums differ from those in float64
    conv.weight.data = conv.weight.data.bfloat16().double()
    equal.weight = conv.weight
    x = torch.randn(3, 6, 16, 19).bfloat16().double().requires_grad_()
    y = conv(x)
    outer = torch.randn_like(y).bfloat16().double()
    expected = torch.autograd.grad(y, [x, *conv.parameters()], outer)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = equal(x)
    assert ours.dtype == dtype
    found = torch.autograd.grad(ours, [x, *equal.parameters()], outer.to(dtype))
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    for value, right in zip([ours, *found], [y, *expected], strict=True):
        assert value.shape == right.shape
        assert (value - right).detach().norm() <= limit * right.detach().norm()


@pytest.mark.parametrize("padding", [5, "same"])
def test_padding_that_is_wider_than_the_kernels_reach_or_a_word_is_torchs(padding: Any) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=padding, dilation=2, groups=6)
    equal = rebuilt(conv, Conv2d, padding=padding)
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    y = conv(x)
    assert torch.equal(equal(x), y)
    assert torch.equal(torch.autograd.grad(equal(x).sum(), x)[0], torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_does_not_learn_has_no_gradient(frozen: str) -> None:
    conv = rebuilt(depthwise(dilation=2), Conv2d, padding=2)
    x = torch.randn(2, 8, 9, 9, requires_grad=frozen == "weight")
    conv.weight.requires_grad_(frozen == "input")
    conv(x).sum().backward()
    assert (x.grad is None, conv.weight.grad is None) == (frozen == "input", frozen == "weight")


def test_same_padding_holds_for_depthwise_and_dense_convolutions() -> None:
    for groups in (1, 8):
        conv = rebuilt(nn.Conv2d(8, 8, 3, 2, groups=groups), SameConv)
        for side in (16, 17):
            with torch.autocast("cpu", torch.bfloat16):
                assert conv(torch.randn(1, 8, side, side)).shape[2:] == (-(-side // 2),) * 2
            assert is_slow(conv) == (groups > 1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm:tf_efficientnet_lite0"])
def test_no_slow_convolution_of_a_backbone_is_torchs(name: str) -> None:
    backbone = build_backbone(Settings(name=name, output_stride=16, weights=None))
    kinds = [type(conv) for conv in backbone.modules() if isinstance(conv, nn.Conv2d) and is_slow(conv)]
    assert set(kinds) <= {Conv2d, SameConv}
    assert len(kinds) >= 6


def test_replacing_keeps_names_and_parameters() -> None:
    network = nn.Sequential(depthwise(stride=2), depthwise(), nn.Conv2d(8, 8, 3, 2)).eval()
    before = dict(network.named_parameters())
    replace_slow(network)
    assert [type(conv) for conv in network] == [Conv2d, nn.Conv2d, nn.Conv2d]
    assert {name: id(value) for name, value in network.named_parameters()} == {
        name: id(value) for name, value in before.items()
    }
    assert not network[0].training


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}])
def test_without_gradients_it_is_torchs_in_bf16(options: dict[str, int]) -> None:
    conv = depthwise(**options)
    x = torch.randn(2, 8, 17, 19)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rebuilt(conv, Conv2d, padding=conv.padding)(x), conv(x))
