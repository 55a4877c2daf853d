"""What tests of networks share: building them, looking into them, and batch norms that show."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config import schema
from pipeline.networks.backbones import Backbone, build_backbone


def build(name: str, output_stride: int = 8, **settings: Any) -> Backbone:
    return build_backbone(schema.Backbone(name, output_stride, **settings))  # type: ignore[arg-type]


def on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


def convs(module: nn.Module, kernel: int = 3) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d) and part.kernel_size[0] == kernel]


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomise_batch_norms(module: nn.Module) -> None:
    """Statistics and affine parameters that a wrong order or a forgotten batch norm would show in."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            norm.bias.data.normal_(std=0.1)
            assert norm.running_mean is not None
            norm.running_mean.normal_(std=0.1)


def resize(x: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """... x H x W by bilinear weights between pixel centres, in NumPy (what torch calls ``align_corners=False``)."""
    for axis, after in ((-2, height), (-1, width)):
        before = x.shape[axis]
        at = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
        low = np.floor(at).astype(int)
        share = (at - low)[:, None] if axis == -2 else at - low
        lower, upper = x.take(low, axis), x.take(np.minimum(low + 1, before - 1), axis)
        x = lower * (1 - share) + upper * share
    return x
