"""The attention modulation module of AMR (AMM): reweights the channels, then the positions of features."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.methods.amr import Amr

EPSILON = 1e-5  # added to variances, as in batch norm; it dominates below a deviation of 0.003
MAX_SQUARED_Z = 40.0  # products of two weights exp(-z^2 / 2) then stay above denormal numbers


def modulate(values: Tensor, function: str = "gaussian", statistics: str = "sample") -> Tensor:
    """Compute weights that favour values of medium sensitivity (AMR Eq. 7 and 8), in float32.

    With z = (value - mu) / sigma, the functions are:

    * 'gaussian': exp(-z^2 / 2), divided by its mean. Eq. 7 leaves the height open. The height of the normal density,
      1 / (sqrt(2 pi) sigma), is the same for all values, so it does not redistribute weight, but it is unbounded for
      nearly equal values and accumulates over layers. Division by the mean bounds the weights to [0, 5.5] with average
      1. Features thus keep their scale in any number of layers, and equal values all have weight 1.
    * 'density': exp(-z^2 / 2) / (sqrt(2 pi) sigma), as in the public code; at most 126.2 because sigma has a floor.
    * 'threshold': 1 at or above the mean, 0 below (Table 4, which states no threshold). The gradient of the step is
      replaced by that of the logistic function.

    mu and sigma are constants for the gradient, as in the public code. sigma is the biased deviation (Eq. 8; the public
    code uses the unbiased one), so that it is 0 and not NaN for a single value. ``EPSILON`` is added to its square.

    Args:
        values: B x ..., in any precision.
        function: 'gaussian', 'density' or 'threshold'.
        statistics: 'sample': mu, sigma and the mean weight are those of each sample; 'batch': those of the whole batch,
            as in the public code. A sample's weights then depend on the rest of the batch, even in evaluation mode.

    Returns:
        Weights of the shape of ``values``.
    """
    values = values.float()
    dims = tuple(range(0 if statistics == "batch" else 1, values.dim()))
    fixed = values.detach()
    variance, mean = torch.var_mean(fixed, dims, correction=0, keepdim=True)
    deviation = (variance + EPSILON).sqrt()
    z = (values - mean) / deviation
    if function == "threshold":
        soft = z.sigmoid()
        return (z > -1e-3).float() + (soft - soft.detach())  # the tolerance lets equal values pass despite rounding
    bell = (z.square().clamp_max(MAX_SQUARED_Z) / -2).exp()
    if function == "density":
        return bell / (math.sqrt(2 * math.pi) * deviation)
    return bell / bell.detach().mean(dims, keepdim=True)


class ChannelModulation(nn.Module):
    """Channel weights: spatial mean, two linear layers with a ReLU between, modulation (AMR Eq. 3 and 4).

    The paper has one convolution H. The two layers, with 1 / ``reduction`` of the channels between them, follow the
    public code.
    """

    def __init__(self, channels: int, settings: "Amr.Settings") -> None:
        super().__init__()
        self.settings = settings
        middle = max(1, channels // settings.reduction)
        self.sensitivity = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Reweight B x C x H x W features."""
        pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])  # sum, since its gradient is not expanded per pixel
        weights = modulate(self.sensitivity(pooled), self.settings.function, self.settings.statistics)
        return x * weights[:, :, None, None].to(x.dtype)


class SpatialModulation(nn.Module):
    """Spatial weights: maximum and mean over the channels, 7x7 convolution, modulation (AMR Eq. 5 and 6).

    The paper pools only the mean. The maximum and the batch norm follow the public code, where the batch norm also
    updates its statistics in evaluation mode; here it does not.
    """

    def __init__(self, settings: "Amr.Settings") -> None:
        super().__init__()
        self.settings = settings
        self.sensitivity = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01))

    def forward(self, x: Tensor) -> Tensor:
        """Reweight B x C x H x W features."""
        x, pooled = _Pool.apply(x)  # type: ignore[no-untyped-call]
        weights = modulate(self.sensitivity(pooled), self.settings.function, self.settings.statistics)
        return x * weights.to(x.dtype)


class _Pool(torch.autograd.Function):
    """Return B x C x H x W features unchanged, and their maximum and mean over channels, B x 2 x H x W.

    On a CPU, allocating memory is the main cost. Because the features pass through this function, backward receives
    their gradient and adds that of the pooled values, without allocating a second tensor of full size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        peak, place = x.max(1, keepdim=True)
        ctx.save_for_backward(place)
        return x.view_as(x), torch.cat([peak, x.mean(1, keepdim=True)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad, to_pooled = grads
        (place,) = ctx.saved_tensors
        total = torch.add(grad, to_pooled[:, 1:], alpha=1 / grad.shape[1])
        sample, row, column = (torch.arange(grad.shape[dim], device=grad.device) for dim in (0, 2, 3))
        at = sample[:, None, None], place[:, 0], row[:, None], column
        return total.index_put_(at, total[at] + to_pooled[:, 0])  # distinct: CUDA would sort them to accumulate


def attention_modulation(channels: int, settings: "Amr.Settings") -> nn.Sequential:
    """Build the AMM for features of ``channels`` channels, with the parts that ``settings`` enables (Table 3)."""
    parts: list[nn.Module] = []
    if settings.channel:
        parts.append(ChannelModulation(channels, settings))
    if settings.spatial:
        parts.append(SpatialModulation(settings))
    return nn.Sequential(*parts)
