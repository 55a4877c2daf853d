"""Checks that tensors contain neither NaN nor infinity."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import PipelineError


class Identified(Protocol):
    @property
    def id(self) -> str: ...


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that contain NaN or infinity; a GPU is waited for only once."""
    named = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if not named:
        return []
    bounds = [bound.double() for value in named.values() for bound in torch.aminmax(value.detach())]  # NaN propagates
    finite = torch.stack(bounds).isfinite().view(-1, 2).all(1).tolist()
    return [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]


def listed(names: Sequence[str]) -> str:
    """Format names of tensors that are not finite for an error message."""
    more = f" and {len(names) - 1} more tensors contain" if len(names) > 1 else " contains"
    return f"{names[0]}{more} NaN or infinity"


def check_outputs(outputs: Tensor, images: Sequence[Identified]) -> None:
    """Check the outputs of a network before they become integers, which have no NaN.

    Args:
        outputs: B x ..., one for each of the images.

    Raises:
        PipelineError: outputs are not finite; it names the first such image.
    """
    numbers = map(str, range(len(images)))  # ids need not be unique: arrays have no names
    if bad := not_finite(dict(zip(numbers, outputs, strict=True))):
        name = images[int(bad[0])].id
        raise PipelineError(
            f"the network's output contains NaN or infinity for image {name}; train it again with a lower training.lr"
        )
