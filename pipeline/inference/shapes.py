"""Few shapes for convolutions on CUDA, whatever the sizes of the images.

cuDNN needs an execution plan for each new shape of a convolution. ``torch.backends.cudnn.benchmark`` times all plans.
Without it, PyTorch asks cuDNN's heuristics, builds the first plan that runs and keeps it for this shape alone
(``run_single_conv`` in PyTorch's Conv_v8.cpp). With images of many sizes, a network builds plans in nearly every batch.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

STEPS = 8  # sides between two powers of two
MOST = 8  # number of sizes of images up to which nothing is padded
LOOK = 1000  # images whose sizes are compared


class FewShapes(TorchFunctionMode):
    """While it is active, inputs of convolutions are padded to few shapes by zeros, and outputs are cropped.

    A convolution pads by zeros itself, hence the outputs are equal up to the order of sums. Each convolution is cropped
    by itself, so that no other operation sees the padding. Sides of more than 16 are padded by at most an eighth,
    batches to a power of two.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), named: Any = None
    ) -> Any:
        return (_convolve if function is torch.conv2d else function)(*arguments, **(named or {}))


def differ(sizes: Iterable[tuple[int, int]]) -> bool:
    """Whether the first ``LOOK`` sizes differ so much that padding them to few shapes saves time."""
    found: set[tuple[int, int]] = set()
    for size in islice(sizes, LOOK):
        found.add(size)
        if len(found) > MOST:
            return True
    return False


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d`` of B x C x H x W on a padded input."""
    more = [_rounded(side) - side for side in x.shape[2:]]
    images = (1 << (len(x) - 1).bit_length()) - len(x)
    if x.ndim != 4 or isinstance(padding, str) or not (images or any(more)):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    steps, margins, rates = (_pair(value) for value in (stride, padding, dilation))
    height, width = (
        (x.shape[2 + axis] + 2 * margins[axis] - rates[axis] * (weight.shape[2 + axis] - 1) - 1) // steps[axis] + 1
        for axis in (0, 1)
    )
    padded = functional.pad(x, (0, more[1], 0, more[0], 0, 0, 0, images))
    return torch.conv2d(padded, weight, bias, stride, padding, dilation, groups)[: len(x), :, :height, :width]


def _rounded(side: int) -> int:
    """Round up to one of ``STEPS`` sides between two powers of two; small sides stay."""
    step = max(1, (1 << (side - 1).bit_length()) // (2 * STEPS))
    return -(-side // step) * step


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
