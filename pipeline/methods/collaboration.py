"""Collaborative multi-attention (EDAM Sec. 3.3): for each class, self-attention over the places of several images.

The K classes have a block each, none of whose weights are shared. Here all K are computed at once: linear layers as one
batched product, attention without ever holding the T x T scores (2.9 GB for a pair of images of 46 x 46 places, 20
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
    """A linear layer of its own for each class: Xavier's uniform weights, biases 0."""

    def __init__(self, classes: int, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, before, after))
        self.bias = nn.Parameter(torch.zeros(classes, 1, after))
        reach = math.sqrt(6 / (before + after))
        nn.init.uniform_(self.weight, -reach, reach)

    def forward(self, x: Tensor) -> Tensor:
        """K x N x ``before`` to K x N x ``after``."""
        return torch.baddbmm(self.bias, x, self.weight)


class ClassNorm(nn.Module):
    """Layer normalisation with a scale and shift of its own for each class; otherwise ``nn.LayerNorm``.

    EDAM's public code divides by the unbiased standard deviation plus 1e-6; this is the standard layer.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(classes, 1, width))
        self.bias = nn.Parameter(torch.zeros(classes, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """K x N x ``width`` to the same."""
        return torch.addcmul(self.bias, functional.layer_norm(x, x.shape[-1:]), self.weight)


class CollaborativeAttention(nn.Module):
    """Each class's pre-norm self-attention block over the images of a group.

    A block is x + attention(norm(x)), then x + feed-forward(norm(x)), with GELU in its tanh form. Dropout acts on the
    embedded places, the hidden layer, and what both parts add; not on the attention's weights, as in the public code:
    it would change a sum over thousands of places by less than a percent, and no processor's fused kernel has it.

    Args:
        num_classes: K.
        settings: width, heads, hidden width, dropout, and the images of a group.
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

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Attend, and pool over the places of each image.

        Args:
            features: B x C x h x w. Images that follow each other form a group; the last one may be smaller.
            masks: B x K x h x w; times ``features``, they are the class-specific activation maps (EDAM Eq. 2).

        Returns:
            B x K x C: A of EDAM Eq. 4, averaged over its places.
        """
        whole = len(features) // self.group * self.group or self.group
        parts = zip(torch.split(features, whole), torch.split(masks, whole), strict=True)
        return torch.cat([self._pooled(*part) for part in parts])

    def _pooled(self, features: Tensor, masks: Tensor) -> Tensor:
        """Of whole groups, or of one that is smaller."""
        size = min(self.group, len(features))
        places = features.flatten(2).transpose(1, 2)
        shares = masks.flatten(2).transpose(0, 1)[..., None]
        count, width = places.shape[1:]
        position = sinusoid(count, width, features.device) + self.image_position[:size, None]
        x = (shares * places).view(len(shares), -1, size, count, width) + position  # K x groups x images x places x C
        shape = x.shape
        x = self.dropout(x).flatten(1, 3)
        x = x + self.dropout(self.merge(self._attended(self.attention_norm(x), shape[1])))
        hidden = functional.gelu(self.expand(self.feed_forward_norm(x)), approximate="tanh")
        x = x + self.dropout(self.contract(self.dropout(hidden)))
        return x.view(shape).mean(3).flatten(1, 2).transpose(0, 1)

    def _attended(self, x: Tensor, groups: int) -> Tensor:
        """K x (groups * T) x C to the same: of each place the mean of its group's values, weighed by attention."""
        classes, tokens, width = x.shape
        heads = (classes * groups, tokens // groups, self.heads, width // self.heads)
        sides = (side(x).view(heads).transpose(1, 2) for side in (self.queries, self.keys, self.values))
        return attend(*sides).transpose(1, 2).reshape(x.shape)


def sinusoid(places: int, width: int, device: torch.device) -> Tensor:
    """Places x width: sines (even columns) and cosines (odd) of a place's number, wavelengths 2 pi to 10000 * 2 pi."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000) / width))
    angle = torch.arange(places, device=device)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)[:, :width]
