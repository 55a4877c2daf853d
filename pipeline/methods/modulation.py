"""The attention modulation module of AMR (AMM): features reweighted in their channels, then in their positions."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.methods.amr import Amr

EPSILON = 1e-5  # added to a variance, as in batch norm: below a deviation of 0.003 values count as more and more equal
FARTHEST = 40.0  # squared deviations; exp(-FARTHEST / 2) is no denormal number in any product of two weights


def modulate(values: Tensor, function: str = "gaussian", statistics: str = "sample") -> Tensor:
    """Weights that favour what is neither the most nor the least sensitive (AMR Eq. 7 and 8), in float32.

    With z = (value - mu) / sigma, all over one tensor's values:

    * 'gaussian': exp(-z^2 / 2), divided by its own mean. Eq. 7 leaves the height open. The density's, 1 / (sqrt(2 pi)
      sigma), is one number for all values, so it redistributes nothing, but has no bound where values are nearly equal
      and multiplies up from layer to layer. Divided by the mean, weights lie between 0 and 5.5 and average 1: features
      keep their scale in any number of layers, and values that are all equal get 1 each.
    * 'density': exp(-z^2 / 2) / (sqrt(2 pi) sigma), the public code's; at most 126.2 by the floor under sigma.
    * 'threshold': 1 from the mean on, 0 below (Table 4, which names no threshold). A step has no gradient: the logistic
      function's takes its place.

    mu and sigma are constants for the gradient, as in the public code. sigma is the biased deviation (Eq. 8, where the
    code divides by one less): that of a single value is 0, not NaN; ``EPSILON`` is added to its square.

    Args:
        values: B x ..., in any precision.
        statistics: 'sample': mu and sigma (and the mean weight) of each sample's values; 'batch': of the whole tensor,
            the batch included, as in the public code: then a sample's weights depend on its neighbours, in evaluation
            mode, too.
    """
    values = values.float()
    dims = tuple(range(0 if statistics == "batch" else 1, values.dim()))
    fixed = values.detach()
    variance, mean = torch.var_mean(fixed, dims, correction=0, keepdim=True)
    deviation = (variance + EPSILON).sqrt()
    z = (values - mean) / deviation
    if function == "threshold":
        soft = z.sigmoid()
        return (z > -1e-3).float() + (soft - soft.detach())  # values that are all equal pass, rounding aside
    bell = (z.square().clamp_max(FARTHEST) / -2).exp()
    if function == "density":
        return bell / (math.sqrt(2 * math.pi) * deviation)
    return bell / bell.detach().mean(dims, keepdim=True)


class ChannelModulation(nn.Module):
    """Weights of the channels: spatial mean, two linear layers with ReLU between, modulation (AMR Eq. 3 and 4).

    The paper has one convolution H; two layers with 1 / ``reduction`` of the channels between are the public code's.
    """

    def __init__(self, channels: int, settings: "Amr.Settings") -> None:
        super().__init__()
        self.settings = settings
        middle = max(1, channels // settings.reduction)
        self.sensitivity = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels))

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to the same."""
        pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])  # of a sum, the gradient is not written out pixel by pixel
        weights = modulate(self.sensitivity(pooled), self.settings.function, self.settings.statistics)
        return x * weights[:, :, None, None].to(x.dtype)


class SpatialModulation(nn.Module):
    """Weights of the positions: maximum and mean over the channels, 7x7 convolution, modulation (AMR Eq. 5 and 6).

    The paper pools the mean alone; the maximum beside it, and the batch norm, are the public code's. There the batch
    norm also learns in evaluation mode; here it follows ``train`` and ``eval``.
    """

    def __init__(self, settings: "Amr.Settings") -> None:
        super().__init__()
        self.settings = settings
        self.sensitivity = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01))

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to the same."""
        x, pooled = _Pool.apply(x)  # type: ignore[no-untyped-call]
        weights = modulate(self.sensitivity(pooled), self.settings.function, self.settings.statistics)
        return x * weights.to(x.dtype)


class _Pool(torch.autograd.Function):
    """B x C x H x W features as they are, and B x 2 x H x W their maximum and mean over the channels.

    On a processor it is fresh memory that costs: as the features pass through, their gradient comes back here, and the
    pooled values' is added to it where it lies, not gathered in tensors of its own.
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
        return total.index_put_(at, to_pooled[:, 0], accumulate=True)


def attention_modulation(channels: int, settings: "Amr.Settings") -> nn.Sequential:
    """The AMM for features of so many channels: both parts in a row, or those that ``settings`` ask for (Table 3)."""
    parts: list[nn.Module] = []
    if settings.channel:
        parts.append(ChannelModulation(channels, settings))
    if settings.spatial:
        parts.append(SpatialModulation(settings))
    return nn.Sequential(*parts)
