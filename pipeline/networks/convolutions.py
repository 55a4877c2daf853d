"""Convolutions that torch lacks: TensorFlow's SAME padding, and depthwise ones that learn fast on a CPU."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Conv2d(nn.Conv2d):
    """A convolution whose backward pass is fast on a CPU where torch's is slow (``is_slow``).

    Without a stride it computes its gradients itself (``_Depthwise``). With a stride it learns in fp32 under bf16
    autocast; its outputs are bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not learns or x.device.type != "cpu" or not is_slow(self):
            return super().forward(x)
        autocast = torch.is_autocast_enabled("cpu")
        if max(self.stride) == 1 and self._is_within():
            x = x.to(torch.get_autocast_dtype("cpu")) if autocast else x
            y: Tensor = _Depthwise.apply(x, self.weight, self.padding, self.dilation)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        if not autocast:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))

    def _is_within(self) -> bool:
        """Whether the padding is of zeros and no wider than the kernel's reach."""
        reach = (d * (side - 1) for d, side in zip(self.dilation, self.kernel_size, strict=True))
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return plain and all(p <= most for p, most in zip(cast(tuple[int, int], self.padding), reach, strict=True))


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution without stride of B x C x H x W features with C x 1 x h x w weights.

    The gradient of the input is a convolution of the output's gradient with the kernels turned by 180 degrees. torch's
    backward pass takes about 20 times as long to compute it if the kernels are dilated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return functional.conv2d(x, weight.to(x.dtype), None, 1, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            reach = (d * (side - 1) for d, side in zip(ctx.dilation, weight.shape[2:], strict=True))
            around = [most - before for most, before in zip(reach, ctx.padding, strict=True)]
            turned = weight.flip(2, 3).to(x.dtype)
            of_x = functional.conv2d(gradient, turned, None, 1, around, ctx.dilation, len(weight))
        if ctx.needs_input_grad[1]:
            weigh = _weigh_parts if x.dtype == torch.bfloat16 else _weigh
            of_weight = weigh(gradient, x, weight, ctx.padding, ctx.dilation)
        return of_x, of_weight, None, None


def _weigh(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1)
) -> Tensor:
    """The gradient of a depthwise convolution's weights, as torch computes it."""
    backward, mask = torch.ops.aten.convolution_backward, [False, True, False]
    return cast(
        Tensor, backward(gradient, x, weight, None, [1, 1], padding, dilation, False, [0, 0], len(weight), mask)[1]
    )


def _weigh_parts(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The gradient of a depthwise convolution's weights in bf16, part by part.

    In bf16 torch computes it fast for undilated kernels of at most 3 x 3 only. Cells whose rows and columns have the
    same remainders modulo the dilation form a grid of their own, on which the convolution is not dilated. A larger
    kernel is covered by small ones, each of which sees the input shifted.
    """
    size = [-(-side // d) for side, d in zip(gradient.shape[2:], dilation, strict=True)]
    cells = _interleaved(gradient, size, (0, 0), dilation)
    inputs = _interleaved(x, [n + k - 1 for n, k in zip(size, weight.shape[2:], strict=True)], padding, dilation)
    whole = torch.empty_like(weight)
    height, width = (min(3, side) for side in weight.shape[2:])
    part = weight.new_empty(len(weight), 1, height, width, dtype=x.dtype)
    for top in _starts(weight.shape[2], height):
        for left in _starts(weight.shape[3], width):
            seen = inputs[:, :, top : top + size[0] + height - 1, left : left + size[1] + width - 1]
            whole[:, :, top : top + height, left : left + width] = _weigh(cells, seen, part)
    return whole


def _starts(side: int, part: int) -> list[int]:
    return sorted({min(start, side - part) for start in range(0, side, part)})


def _interleaved(x: Tensor, size: Sequence[int], before: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Split B x C x H x W values into the grids of every n-th cell, B * n * m x C x ``size``, in channels-last memory.

    Zeros stand for the cells ``before`` the first one and after the last.
    """
    after = [n * step - side - b for n, step, side, b in zip(size, steps, x.shape[2:], before, strict=True)]
    x = functional.pad(x, (before[1], after[1], before[0], after[0])).movedim(1, 3)
    grids = x.reshape(len(x), size[0], steps[0], size[1], steps[1], -1).permute(0, 2, 4, 1, 3, 5)
    return grids.flatten(0, 2).contiguous().movedim(3, 1)


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


def is_slow(conv: nn.Conv2d) -> bool:
    """Whether torch's backward pass is slow on a CPU: that of strided, dilated and 5x5 depthwise convolutions.

    In bf16 it takes 2 to 6 times as long as in fp32 (docs/TRIALS.md). Other depthwise convolutions are faster in bf16.
    """
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    return is_depthwise and (max(conv.stride) > 1 or max(conv.dilation) > 1 or max(conv.kernel_size) > 3)


def replace_slow(network: nn.Module) -> None:
    """Replace torch's convolutions that learn slowly by equal ones. Parameters keep their names."""
    for name, conv in list(network.named_modules()):
        if type(conv) is nn.Conv2d and is_slow(conv):
            network.set_submodule(name, rebuilt(conv, Conv2d, padding=conv.padding))


def rebuilt(conv: nn.Conv2d, kind: type[nn.Conv2d], **options: Any) -> nn.Conv2d:
    """Return a convolution of another type with the parameters and options of ``conv``, except for ``options``."""
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        options.setdefault(name, getattr(conv, name))
    equal = kind(**options, bias=False, device="meta")
    equal.weight, equal.bias = conv.weight, conv.bias
    return equal.train(conv.training)
