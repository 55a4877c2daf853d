"""Collaborative multi-attention (EDAM Sec. 3.3): per class, self-attention over the positions of several images.

Each of the K classes has a block of its own; blocks share no weights. All K blocks are computed at once: linear layers
as one batched product, and attention without storing the T x T scores (2.9 GB for two images of 46 x 46 positions, 20
classes and 2 heads).
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.methods.attention import attend

if TYPE_CHECKING:
    from pipeline.methods.edam import Edam


class ClassLinear(nn.Module):
    """One linear layer per class, with Xavier uniform weights and zero biases."""

    def __init__(self, classes: int, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, before, after))
        self.bias = nn.Parameter(torch.zeros(classes, 1, after))
        bound = math.sqrt(6 / (before + after))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map K x N x ``before`` to K x N x ``after``."""
        return torch.baddbmm(self.bias, x, self.weight)


class ClassNorm(nn.Module):
    """``nn.LayerNorm`` with one scale and shift per class.

    EDAM's public code instead divides by the unbiased standard deviation plus 1e-6.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes, 1, width))
        self.bias = nn.Parameter(torch.zeros(classes, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise K x N x ``width`` features over their last dimension."""
        return torch.addcmul(self.bias, functional.layer_norm(x, x.shape[-1:]), self.weight)


class CollaborativeAttention(nn.Module):
    """One pre-norm self-attention block per class, over the images of a group.

    A block computes x + attention(norm(x)), then x + feed-forward(norm(x)), with the tanh approximation of GELU.
    Dropout is applied to the embedded positions, to the hidden layer, and to the outputs of both parts. Unlike the
    public code, it is not applied to the attention weights: it would change a sum over thousands of positions by less
    than one percent, and no fused CPU kernel supports it.

    Args:
        num_classes: K.
        settings: width, heads, hidden width, dropout and group size.
    """

    def __init__(self, num_classes: int, settings: "Edam.Settings") -> None:
        super().__init__()
        width = settings.channels
        self.group, self.heads = settings.group, settings.heads
        self.image_position = nn.Parameter(torch.empty(settings.group, width))
        nn.init.xavier_uniform_(self.image_position)
        self.attention_norm = ClassNorm(num_classes, width)
        self.queries = ClassLinear(num_classes, width, width)
        self.keys = ClassLinear(num_classes, width, width)
        self.values = ClassLinear(num_classes, width, width)
        self.merge = ClassLinear(num_classes, width, width)
        self.feed_forward_norm = ClassNorm(num_classes, width)
        self.expand = ClassLinear(num_classes, width, settings.hidden)
        self.contract = ClassLinear(num_classes, settings.hidden, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.dropout.images = 1  # type: ignore[assignment]  # their dimension (``pipeline.training.distributed``)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Attend within each group and average over the positions of each image.

        Args:
            features: B x C x h x w. Consecutive images form a group; the last group may be smaller.
            masks: B x K x h x w; their products with ``features`` are the class-specific activation maps (EDAM Eq. 2).

        Returns:
            B x K x C: A of EDAM Eq. 4, averaged over positions.
        """
        whole = len(features) // self.group * self.group or self.group
        parts = zip(torch.split(features, whole), torch.split(masks, whole), strict=True)
        return torch.cat([self._pooled(*part) for part in parts])

    def _pooled(self, features: Tensor, masks: Tensor) -> Tensor:
        """``forward`` for complete groups, or for a single smaller one."""
        size = min(self.group, len(features))
        pixels = features.flatten(2).transpose(1, 2)
        weights = masks.flatten(2).transpose(0, 1)[..., None]
        count, width = pixels.shape[1:]
        position = sinusoid(count, width, features.device) + self.image_position[:size, None]
        x = (weights * pixels).view(len(weights), -1, size, count, width) + position  # K x groups x images x hw x C
        shape = x.shape
        x = self.dropout(x).flatten(1, 3)
        x = x + self.dropout(self.merge(self._attended(self.attention_norm(x), shape[1])))
        hidden = functional.gelu(self.expand(self.feed_forward_norm(x)), approximate="tanh")
        x = x + self.dropout(self.contract(self.dropout(hidden)))
        return x.view(shape).mean(3).flatten(1, 2).transpose(0, 1)

    def _attended(self, x: Tensor, groups: int) -> Tensor:
        """Self-attention within each group: K x (groups * T) x C to the same shape."""
        classes, tokens, width = x.shape
        heads = (classes * groups, tokens // groups, self.heads, width // self.heads)
        sides = (side(x).view(heads).transpose(1, 2) for side in (self.queries, self.keys, self.values))
        return attend(*sides).transpose(1, 2).reshape(x.shape)


def sinusoid(positions: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position encoding, positions x width: sines in even columns, cosines in odd ones.

    Wavelengths range from 2 pi to 10000 * 2 pi.
    """
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000) / width))
    angle = torch.arange(positions, device=device)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)[:, :width]
