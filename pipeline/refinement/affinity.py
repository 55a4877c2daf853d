"""The affinity branch of the inter-pixel relation network (IRN: Ahn, Cho and Kwak, CVPR 2019).

It sees edges between classes, learned from where confident labels agree and where they do not. IRN's other branch,
displacement fields, serves to tell the instances of a class apart, which nothing here does; it is left out.
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
from pipeline.refinement.pairs import at_ends, pairs, strongest

GROUPS = 4  # of the group norms


class AffinityNetwork(nn.Module):
    """Edges from all stages of any backbone, which with ``frozen_backbone`` stays as it is (IRN's code).

    Each tap's features go through a 1x1 convolution to ``channels``, group norm and ReLU and are resized to the grid
    of the first tap at stride 4 (or the first beyond, were there none); over all of them a 1x1 convolution gives one
    number a cell. Features finer than the grid are averaged within its cells before they are convolved, so that no
    gradient of the branch is as large as they are.

    Group norm as in IRN's code: its statistics are the image's own, whatever the batch.

    Raises:
        PipelineError: ``channels`` are no multiple of the norm's groups.
    """

    def __init__(self, settings: Affinity) -> None:
        super().__init__()
        if settings.channels % GROUPS or settings.channels < GROUPS:
            raise PipelineError(f"channels {settings.channels}: group norm has {GROUPS} groups; use a multiple of it")
        self.frozen = settings.frozen_backbone
        self.backbone = build_backbone(settings.backbone)
        if self.frozen:
            self.backbone.requires_grad_(False)
        taps = self.backbone.taps
        self.grid_tap = next((name for name, tap in taps.items() if tap.stride >= 4), list(taps)[-1])
        self.levels = nn.ModuleDict({name: _level(tap.channels, settings.channels) for name, tap in taps.items()})
        self.edge = nn.Conv2d(settings.channels * len(taps), 1, 1)
        normal(self.edge)

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers added to the backbone."""
        return [self.levels, self.edge]

    def train(self, mode: bool = True) -> Self:
        """A frozen backbone keeps the statistics of its batch norms, too."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W -> B x 1 x h x w logits of there being an edge, in float32; h is ceil(H / 4)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone.features(images, list(self.levels))
            size = features[self.grid_tap].shape[2:]
            features = {name: _coarsened(found, size) for name, found in features.items()}
        levels = [_refined(level(features[name]), size) for name, level in self.levels.items()]
        return cast(Tensor, self.edge(torch.cat(levels, 1))).float()


def _level(before: int, after: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 1, bias=False)
    he_normal(conv)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, after), nn.ReLU(inplace=True))


def _coarsened(features: Tensor, size: torch.Size) -> Tensor:
    """Features finer than the grid, averaged within its cells."""
    if features.shape[2] > size[0] or features.shape[3] > size[1]:
        return functional.adaptive_avg_pool2d(features, (size[0], size[1]))
    return features


def _refined(features: Tensor, size: torch.Size) -> Tensor:
    """Features coarser than the grid, upsampled (bilinear)."""
    if features.shape[2:] == size:
        return features
    return functional.interpolate(features, size=list(size), mode="bilinear", align_corners=False)


def affinity_loss(logits: Tensor, labels: Tensor, radius: int) -> Tensor:
    """How badly edges tell pairs of one class from pairs of two (IRN; halved as in its public code).

    The affinity of a pair is 1 - the strongest edge on the path between its cells. Its cross entropy is averaged over
    the pairs of the batch within the background, within objects, and of two classes; the first two sets count a
    quarter each, the third a half, and a set without pairs nothing. Taken from the logits, no edge makes it infinite.

    Args:
        logits: B x 1 x h x w of edges.
        labels: B x h x w class ids; pairs with a cell of 255 are not learned from.
        radius: of the pairs (``pairs``).
    """
    near = pairs(radius)
    edges = strongest(logits[:, 0].float(), near)
    first, second = labels.to(torch.uint8)[:, None], at_ends(labels.to(torch.uint8), near, IGNORE)
    known = (first != IGNORE) & (second != IGNORE)
    same = known & (first == second)
    joined, parted = functional.softplus(edges), functional.softplus(-edges)  # -log a, -log(1 - a) of affinity a
    background, objects = _mean(joined, same & (first == 0)), _mean(joined, same & (first > 0))
    return ((background + objects) / 2 + _mean(parted, known & (first != second))) / 2


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp_min(1)
