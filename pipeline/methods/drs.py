"""Discriminative region suppression (DRS Alg. 1), for the layers of any classifier."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Suppression
from pipeline.networks.base import attach


class Suppressor(nn.Module):
    """min(X, max(X) * G): bounds each channel by the fraction G of its maximum (DRS Alg. 1).

    The learnable controller is G = sigmoid(f(GAP(X))), where f is one linear layer without bias (DRS Eq. 2; the public
    code). Its weights start at N(0, 0.01), so that G starts near 0.5. The non-learnable controller is G = ``delta``.

    Args:
        channels: K, the channels of the features.
        delta: G of the non-learnable controller, in (0, 1); 0 selects the learnable one.
    """

    def __init__(self, channels: int, delta: float) -> None:
        super().__init__()
        self.delta = delta
        self.controller: nn.Linear | None = None
        if delta == 0:
            self.controller = nn.Linear(channels, channels, bias=False)
            nn.init.normal_(self.controller.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Suppress B x K x H x W features; gradients flow through X, its maxima and G."""
        weight = None if self.controller is None else self.controller.weight
        return cast(Tensor, _Suppress.apply(x, weight, self.delta))  # type: ignore[no-untyped-call]


class _Suppress(torch.autograd.Function):
    """torch.minimum(x, gate * global max pooling of x), including the controller, in few passes over memory.

    As in max pooling, the gradient of a maximum goes to one position. An element equal to its bound receives its own
    gradient. On a CPU, allocating memory costs more than the arithmetic, so backward writes into a single tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, delta: float) -> Tensor:
        peak, place = _peaks(x)
        pooled = gate = None
        if weight is not None:
            with torch.autocast(x.device.type, enabled=False):  # autocast would copy x to float32 for the sum
                pooled = x.sum((2, 3)).to(weight.dtype) / (x.shape[2] * x.shape[3])
                gate = (pooled @ weight.t()).sigmoid()
        bound = peak * (delta if gate is None else gate.to(x.dtype)[:, :, None, None])
        ctx.save_for_backward(x, peak[:, :, 0, 0], place, bound, weight, pooled, gate)
        ctx.delta = delta
        return torch.minimum(x, bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        x, peak, place, bound, weight, pooled, gate = ctx.saved_tensors
        above = x - bound
        torch.ops.aten.threshold_backward(grad, above, 0, grad_input=above)  # grad where x is above its bound, else 0
        to_bound = above.sum((2, 3))
        to_x = torch.sub(grad, above, out=above)
        to_weight = None
        if weight is not None:
            to_control = (to_bound * peak).to(weight.dtype) * gate * (1 - gate)
            to_weight = to_control.t() @ pooled
            to_x += (to_control @ weight / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None]
        to_peak = to_bound * (ctx.delta if gate is None else gate.to(x.dtype))
        samples, channels = (torch.arange(count, device=x.device) for count in x.shape[:2])
        row, column = place // x.shape[3], place % x.shape[3]
        at = samples[:, None], channels, row, column  # distinct, hence no accumulation, for which CUDA would sort them
        to_x.index_put_(at, to_x[at] + to_peak)
        return to_x, to_weight, None


def _peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each plane, B x K x 1 x 1, and the first position that has it, B x K, counted by rows.

    The pooling kernel of CUDA copies channels-last features and searches each plane with a single thread. A reduction
    does neither. On a CPU it is the slower one: up to 20 times, for channels-last features.
    """
    if x.is_cuda:
        peak, place = x.flatten(2).max(2)
        return peak[:, :, None, None], place
    peak, place = functional.adaptive_max_pool2d(x, 1, return_indices=True)
    return peak, place[:, :, 0, 0]


def attach_suppressors(
    method: nn.Module, layers: Mapping[str, list[nn.Module]], settings: Suppression
) -> list[nn.Module]:
    """Suppress the outputs of the layers that ``settings.layers`` names.

    Args:
        layers: modules by layer name, none of which follows the class-aware convolution.

    Returns:
        The suppressors, which are new layers of ``method``.

    Raises:
        PipelineError: the method has no layer of that name.
    """
    return attach(
        method, layers, settings.layers, "suppression.layers", lambda channels: Suppressor(channels, settings.delta)
    )
