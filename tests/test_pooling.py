"""Averages within cells whose gradients are deterministic on CUDA."""

import pytest
import torch
from torch.nn import functional

from pipeline.networks.pooling import coarsened


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(64, 96), (161, 83), (33, 130), (2, 1)])
@pytest.mark.parametrize("stride", [2, 4])
def test_deterministic_averages_are_those_of_pooling(
    size: tuple[int, int], stride: int, layout: torch.memory_format, deterministic: None
) -> None:
    """To 1e-6, as are their gradients. CUDA's pooling has no deterministic gradient."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size).to(memory_format=layout).requires_grad_()
    cells = torch.Size([-(-size[0] // stride), -(-size[1] // stride)])
    expected = functional.adaptive_avg_pool2d(x, (cells[0], cells[1]))
    weights = torch.randn_like(expected)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.delattr(functional, "adaptive_avg_pool2d")
        found = coarsened(x, cells)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (other,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)
    assert coarsened(x.detach().bfloat16().requires_grad_(), cells).dtype == torch.bfloat16
