"""The affinity branch of the inter-pixel relation network (IRN: Ahn, Cho and Kwak, CVPR 2019).

The network predicts edges between classes. It learns from pairs of nearby cells whose confident labels agree or differ.
IRN's other branch, the displacement field, separates instances of a class; semantic segmentation does not need it.
"""

from collections.abc import Iterable
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Affinity
from pipeline.data.loading import IGNORE
from pipeline.errors import PipelineError
from pipeline.networks.backbones import build_backbone
from pipeline.networks.base import he_normal
from pipeline.networks.heads import normal
from pipeline.networks.pooling import coarsened
from pipeline.refinement.pairs import at_ends, pairs, strongest
from pipeline.training.distributed import ratio

GROUPS = 4  # groups of every group norm


class AffinityNetwork(nn.Module):
    """Predicts edges from the features of all stages of a backbone.

    The features of each tap pass a 1x1 convolution to ``channels``, group norm and ReLU, and are resized to the grid of
    the first tap with a stride of 4 or more. A 1x1 convolution of their concatenation outputs one logit per cell.
    Features finer than the grid are averaged within its cells before the convolution, which saves memory: no gradient
    of the branch has their resolution.

    With ``frozen_backbone`` the backbone is not trained, as in IRN's code. Group norm also follows IRN's code: its
    statistics do not depend on the batch.

    Raises:
        PipelineError: ``channels`` is not a multiple of the number of groups.
    """

    def __init__(self, settings: Affinity) -> None:
        super().__init__()
        if settings.channels % GROUPS or settings.channels < GROUPS:
            raise PipelineError(f"channels {settings.channels}: group norm has {GROUPS} groups; use a multiple")
        self.frozen = settings.frozen_backbone
        self.backbone = build_backbone(settings.backbone)
        if self.frozen:
            self.backbone.requires_grad_(False)
        taps = self.backbone.taps
        self.grid_tap = next((name for name, tap in taps.items() if tap.stride >= 4), list(taps)[-1])
        self.levels = nn.ModuleDict({name: _level(tap.channels, settings.channels) for name, tap in taps.items()})
        self.edge = nn.Conv2d(settings.channels * len(taps), 1, 1)
        normal(self.edge)

    @property
    def stride(self) -> int:
        """Pixels of the image per cell of the edges."""
        return self.backbone.taps[self.grid_tap].stride

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        return [self.levels, self.edge]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen backbone stays in evaluation mode, so its batch norms keep their statistics."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map B x 3 x H x W images to B x 1 x h x w edge logits in float32; h is ceil(H / 4) at stride 4."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone.features(images, list(self.levels))
            size = features[self.grid_tap].shape[2:]
            features = {name: coarsened(value, size) for name, value in features.items()}
        levels = [_refined(level(features[name]), size) for name, level in self.levels.items()]
        return cast(Tensor, self.edge(torch.cat(levels, 1))).float()


def _level(before: int, after: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 1, bias=False)
    he_normal(conv)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, after), nn.ReLU(inplace=True))


def _refined(features: Tensor, size: torch.Size) -> Tensor:
    """Upsample features coarser than ``size`` bilinearly; return others unchanged."""
    if features.shape[2:] == size:
        return features
    return functional.interpolate(features, size=list(size), mode="bilinear", align_corners=False)


def affinity_loss(logits: Tensor, labels: Tensor, radius: int, inner: bool = False) -> Tensor:
    """Cross entropy of pair affinities (IRN; halved as in its public code).

    The affinity of a pair is 1 - the strongest edge on the path between its cells. The loss is averaged over three sets
    of pairs of the batch: both cells background, both of the same object class, and cells of two classes. The sets
    weigh 1/4, 1/4 and 1/2; a set without pairs contributes 0. The loss is computed from logits, so it stays finite.

    All pairs of the grid count. IRN's code compares only cells whose pairs all end within the grid (``inner``), which
    changes the loss by about 2 %.

    Args:
        logits: B x 1 x h x w edge logits.
        labels: B x h x w class ids; pairs with a cell labelled 255 are ignored.
        radius: radius of the pairs (see ``pairs``).
        inner: leave out the pairs that begin in the last radius - 1 rows, or in the first or last radius - 1 columns.
    """
    near = pairs(radius)
    edges = strongest(logits[:, 0].float(), near)
    first, second = labels.to(torch.uint8)[:, None], at_ends(labels.to(torch.uint8), near, IGNORE)
    known = (first != IGNORE) & (second != IGNORE)
    if inner:
        height, width = labels.shape[1:]
        within = torch.zeros_like(known[:1, :1])
        within[..., : max(0, height - near.reach), near.reach : max(near.reach, width - near.reach)] = True
        known = known & within
    same = known & (first == second)
    joined, parted = functional.softplus(edges), functional.softplus(-edges)  # -log a, -log(1 - a) of affinity a
    background, objects = _mean(joined, same & (first == 0)), _mean(joined, same & (first > 0))
    return ((background + objects) / 2 + _mean(parted, known & (first != second))) / 2


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return ratio((values * chosen).sum(), chosen.sum())
