"""Averages within cells, whose gradients are deterministic on CUDA where ``--deterministic`` asks for it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def coarsened(features: Tensor, size: Sequence[int]) -> Tensor:
    """Average features finer than ``size`` within its cells; return others unchanged."""
    if features.shape[2] <= size[0] and features.shape[3] <= size[1]:
        return features
    if features.requires_grad and torch.are_deterministic_algorithms_enabled():  # only on CUDA
        return _averaged(features, size)
    return functional.adaptive_avg_pool2d(features, (size[0], size[1]))


def _averaged(features: Tensor, size: Sequence[int]) -> Tensor:
    """``adaptive_avg_pool2d`` as two matrix products, whose gradients add in a fixed order on CUDA; in float32."""
    rows, columns = (
        _cells(before, after, features.device) for before, after in zip(features.shape[2:], size, strict=True)
    )
    with torch.autocast(features.device.type, enabled=False):
        return (rows @ features.float() @ columns.t()).to(features.dtype)


def _cells(before: int, after: int, device: torch.device) -> Tensor:
    """The weights of ``before`` values in the means of ``after`` cells, after x before."""
    cell, value = torch.arange(after, device=device)[:, None], torch.arange(before, device=device)
    first, end = cell * before // after, -(-(cell + 1) * before // after)
    return ((value >= first) & (value < end)) / (end - first)
