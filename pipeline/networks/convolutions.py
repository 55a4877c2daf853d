"""Convolutions that torch lacks: TensorFlow's SAME padding, and depthwise ones that are fast under a CPU's autocast."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv2d(nn.Conv2d):
    """A convolution that learns in fp32 under a CPU's bf16 autocast where bf16 is slow; its outputs are bf16."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not learns or x.device.type != "cpu" or not is_slow_in_bf16(self) or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


class SameConv(Conv2d):
    """A strided convolution with TensorFlow's SAME padding, whose output has ceil(side / stride) cells a side.

    timm computes the padding in floating point, which torch.export cannot trace for images of any size.
    """

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for axis in (1, 0):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            total = 0
            if reach > self.stride[axis]:
                total = reach - self.stride[axis] + -x.shape[2 + axis] % self.stride[axis]
            padding += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, padding))


def is_slow_in_bf16(conv: nn.Conv2d) -> bool:
    """Whether a CPU's backward pass is slower in bf16 than in fp32: strided, dilated and 5x5 depthwise convolutions.

    It takes 2 to 6 times as long (docs/TRIALS.md). Forward passes and other depthwise convolutions are faster in bf16.
    """
    is_depthwise = conv.groups == conv.in_channels > 1
    return is_depthwise and (max(conv.stride) > 1 or max(conv.dilation) > 1 or max(conv.kernel_size) > 3)


def replace_slow(network: nn.Module) -> None:
    """Replace torch's convolutions that are slow in bf16 by equal ones. Parameters keep their names."""
    for name, conv in list(network.named_modules()):
        if type(conv) is nn.Conv2d and is_slow_in_bf16(conv):
            network.set_submodule(name, rebuilt(conv, Conv2d, padding=conv.padding))


def rebuilt(conv: nn.Conv2d, kind: type[nn.Conv2d], **options: Any) -> nn.Conv2d:
    """Return a convolution of another type with the parameters and options of ``conv``, except for ``options``."""
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        options.setdefault(name, getattr(conv, name))
    equal = kind(**options, bias=False, device="meta")
    equal.weight, equal.bias = conv.weight, conv.bias
    return equal.train(conv.training)
