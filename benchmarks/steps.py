"""One training step of a network on fixed images, for the benchmarks that time it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Training
from pipeline.training.settings import autocast, build_optimizer, parameter_groups


def stepper(
    network: Any,
    training: Training,
    side: int,
    classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Callable[[], None]:
    """A function that runs forward, backward and optimizer step on ``training.batch_size`` random images, one tag each.

    Args:
        network: is moved to ``device``.
        side: of the square images in pixels.
        loss: from B x 3 x ``side`` x ``side`` images and B x ``classes`` tags to a scalar.
    """
    network.to(device=device, memory_format=torch.channels_last)
    optimizer = build_optimizer(parameter_groups(network, network.new_layers(), training), training)
    images = torch.randn(training.batch_size, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    tags = functional.one_hot(torch.arange(training.batch_size, device=device) % classes, classes).float()

    def step() -> None:
        with autocast(device, training.precision):
            value = loss(images, tags)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
