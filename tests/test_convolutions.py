"""Depthwise convolutions that stay in fp32 under a CPU's bf16 autocast."""

import pytest
import torch
from torch import nn

from pipeline.config.schema import Backbone as Settings
from pipeline.networks.backbones import build_backbone
from pipeline.networks.convolutions import Conv2d, SameConv, is_slow_in_bf16, rebuilt, replace_slow


def depthwise(kernel: int = 3, **options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8, **options)


def gradients(conv: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"kernel": 5}])
def test_under_autocast_it_is_the_fp32_convolution_rounded_once(options: dict[str, int]) -> None:
    conv = depthwise(**options)
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


def test_same_padding_holds_for_depthwise_and_dense_convolutions() -> None:
    for groups in (1, 8):
        conv = rebuilt(nn.Conv2d(8, 8, 3, 2, groups=groups), SameConv)
        for side in (16, 17):
            with torch.autocast("cpu", torch.bfloat16):
                assert conv(torch.randn(1, 8, side, side)).shape[2:] == (-(-side // 2),) * 2
            assert is_slow_in_bf16(conv) == (groups > 1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm:tf_efficientnet_lite0"])
def test_no_slow_convolution_of_a_backbone_is_torchs(name: str) -> None:
    backbone = build_backbone(Settings(name=name, output_stride=16, weights=None))
    kinds = [type(conv) for conv in backbone.modules() if isinstance(conv, nn.Conv2d) and is_slow_in_bf16(conv)]
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


def test_without_gradients_it_is_torchs_in_bf16() -> None:
    conv = depthwise(stride=2)
    x = torch.randn(2, 8, 17, 19)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rebuilt(conv, Conv2d, padding=conv.padding)(x), conv(x))
