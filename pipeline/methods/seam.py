"""The self-supervised equivariant attention mechanism (SEAM): maps of an image and of its rescaled copy shall agree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.reader import Count, NonNegative, Positive, Range
from pipeline.config.registry import METHODS
from pipeline.config.schema import Classifier
from pipeline.errors import PipelineError
from pipeline.methods.base import Method, Output, Step, occlude
from pipeline.networks.backbones import build_backbone
from pipeline.networks.base import he_normal
from pipeline.networks.heads import ClassAwareHead

BLOCK = 1024  # cells whose correlations with all others are held at once


@dataclass(frozen=True, eq=False)
class SeamOutput(Output):
    """``refined``: B x (K + 1) x h x w maps after the pixel correlation module, in [0, 1]; the last is background."""

    refined: Tensor


class PixelCorrelation(nn.Module):
    """The pixel correlation module (SEAM Eq. 8 and 9): each cell becomes the weighted mean of all cells.

    A weight is the cosine of two cells' embeddings, without its negative part, over the sum of a cell's weights (ReLU
    and L1 normalisation in place of softmax, and no residual connection). The embedding is a 1x1 convolution of the
    image, shrunk to the map's cells, and of two levels of the backbone, each reduced by a 1x1 convolution with ReLU.
    Neither the maps nor the backbone receive gradients from here.

    Args:
        levels: channels of the two levels.
        channels: to which they are reduced; the embedding has their sum.
    """

    def __init__(self, levels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.reductions = nn.ModuleList(
            nn.Conv2d(before, after, 1, bias=False) for before, after in zip(levels, channels, strict=True)
        )
        self.embedding = nn.Conv2d(3 + sum(channels), sum(channels), 1, bias=False)
        he_normal(self)

    def forward(self, maps: Tensor, images: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """The refined maps, B x C x h x w, float32.

        Args:
            maps: B x C x h x w.
            images: B x 3 x H x W.
            levels: B x C' x h' x w' features; h' is at least h, and w' at least w.
        """
        size = maps.shape[2], maps.shape[3]
        parts = [functional.adaptive_avg_pool2d(images, size)]
        for reduction, level in zip(self.reductions, levels, strict=True):
            parts.append(reduction(functional.adaptive_avg_pool2d(level.detach(), size)).relu())
        cells = functional.normalize(self.embedding(torch.cat(parts, 1)).float().flatten(2), dim=1)
        values = maps.detach().float().flatten(2)
        values = torch.cat([values, torch.ones_like(values[:, :1])], 1)  # the last row sums the weights
        blocks = torch.split(cells, BLOCK, dim=2)
        sums = torch.cat([values @ (cells.transpose(1, 2) @ block).relu() for block in blocks], 2).float()
        return (sums[:, :-1] / sums[:, -1:].clamp_min(1e-5)).view(maps.shape)


@METHODS.register("seam")
class Seam(Method):
    """A classifier that sees an image and its rescaled copy with the same weights (Wang et al., CVPR 2020).

    The class activation maps, without negative parts and divided by their maximum, with 1 - their maximum over the
    classes as the background's, go through a pixel correlation module. The loss is L_cls + L_ER + L_ECR: the
    classification of both copies, the difference between the maps of one and of the other, and the difference between
    either copy's refined maps and the other's maps.

    The defaults are the paper's. The public code departs from it as follows; settings that reproduce it are named:

    * Before the module, and as the target of L_ECR, it keeps only a cell's strongest class (``strongest``).
    * L_ECR mines the hardest fifth of all values, not of all cells (``mining: values``), which weighs L_ECR higher.
    * It pulls the quarter of the cells whose refined maps are weakest towards zero (``minimum: 1``).
    * It divides the refined maps by their maximum once more before it compares them; this implementation does not.
    * It compares maps at the pixels of the rescaled copy; this implementation compares them at the copy's cells.

    L_cls is the multi-label soft margin loss of the maps' means, which equals ``Method.loss``.
    """

    map_name = "Equivariant CAM"

    @dataclass(frozen=True)
    class Settings:
        """The transform, the pixel correlation module and the loss."""

        scale: Annotated[float, Range(above=0, most=1)] = 0.3  # of the copy's sides, over the image's
        levels: tuple[str, str] | None = None  # taps that the module reads; null: the two before the last
        channels: tuple[Count, Count] = (64, 128)  # to which it reduces them
        equivariance: NonNegative = 1.0  # weight of L_ER
        cross: Positive = 1.0  # weight of L_ECR, from which alone the module learns
        hard: Annotated[float, Range(above=0, most=1)] = 0.2  # hardest share of L_ECR, of which it is the mean
        mining: Literal["cells", "values"] = "cells"  # what the share is of: cells, or their classes' single values
        strongest: bool = False  # keep only a cell's strongest class before the module and in L_ECR's target
        minimum: NonNegative = 0.0  # weight of the mean of the weakest quarter of the refined maps' cells

    settings: Settings

    def __init__(self, block: Classifier, num_classes: int) -> None:
        """
        Raises:
            PipelineError: the settings name a level that the backbone does not have.
        """
        super().__init__(block, num_classes)
        self.backbone = build_backbone(block.backbone)
        self.head = ClassAwareHead(self.backbone.out_channels, block.head, num_classes)
        taps = self.backbone.taps
        self.levels = self.settings.levels or tuple(taps)[-3:-1]
        if unknown := [name for name in self.levels if name not in taps]:
            raise PipelineError(f"method.seam.levels: no tap {', '.join(unknown)}; the taps are {', '.join(taps)}")
        self.correlation = PixelCorrelation([taps[name].channels for name in self.levels], self.settings.channels)

    def describe(self) -> str:
        """Such as 'SEAM (scale 0.3, L_ER 1, L_ECR 1 of the hardest 20 % of cells)'."""
        settings = self.settings
        parts = [
            f"scale {settings.scale:g}",
            f"L_ER {settings.equivariance:g}",
            f"L_ECR {settings.cross:g} of the hardest {settings.hard * 100:g} % of {settings.mining}",
        ]
        if settings.strongest:
            parts.append("the strongest class alone refined")
        if settings.minimum > 0:
            parts.append(f"minimum pooling {settings.minimum:g}")
        return f"SEAM ({', '.join(parts)})"

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.head, self.correlation, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's, and 'head', the 3x3 convolutions', where there are any."""
        activations: list[nn.Module] = [module for module in self.head.convs if isinstance(module, nn.ReLU)]
        return self.backbone.layers() | ({"head": activations} if activations else {})

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> SeamOutput:
        return self._branch(images, occluded, None)

    def training_step(self, images: Tensor, tags: Tensor, epoch: int, occluded: Tensor | None = None) -> Step:
        """L_cls + L_ER + L_ECR, maps of absent classes set to 0; the output is that of ``images``.

        L_ER and L_ECR are means over classes and cells of the rescaled copy's maps, to which the other maps are resized
        bilinearly. L_ECR counts the background as a class, its targets receive no gradients, and it is the mean of each
        image's hardest losses alone.
        """
        settings = self.settings
        size = [max(1, round(settings.scale * extent)) for extent in images.shape[2:]]
        one, other = self._branch(images, occluded, tags), self._branch(_resized(images, size), occluded, tags)
        cells = other.maps.shape[2:]
        found, expected = _resized(_normalised(one.maps, tags), cells), _normalised(other.maps, tags)
        cross = self._cross(_resized(one.refined, cells), expected) + self._cross(other.refined, found)
        loss = (self.loss(one, tags) + self.loss(other, tags)) / 2 + settings.cross * cross
        if settings.equivariance > 0:
            loss = loss + settings.equivariance * (found - expected).abs().mean()
        if settings.minimum > 0:
            loss = loss + settings.minimum * (_weakest(one.refined) + _weakest(other.refined)) / 2
        return Step(loss, one)

    def localization(self, output: Output) -> Tensor:
        """The refined maps (the paper's, whose scales are averaged before the division by the maximum)."""
        assert isinstance(output, SeamOutput)
        return output.refined[:, : self.num_classes]

    def _branch(self, images: Tensor, occluded: Tensor | None, tags: Tensor | None) -> SeamOutput:
        """Logits, maps and refined maps; refined maps of absent classes are 0 where ``tags`` (B x K) are known.

        The head reads features without negative parts, which only ResNet-38's last tap has.
        """
        last = list(self.backbone.taps)[-1]
        features = self.backbone.features(images, [*self.levels, last])
        maps = self.head.classify(occlude(self.head.penultimate(features[last].relu()), occluded))
        source = self._scores(_normalised(maps, tags))
        refined = self.correlation(source, images, [features[name] for name in self.levels])
        return SeamOutput(maps.float().mean((2, 3)), maps, refined)

    def _scores(self, found: Tensor) -> Tensor:
        """B x K x h x w normalised maps with the background's, B x (K + 1) x h x w."""
        most = found.amax(1, keepdim=True)
        if self.settings.strongest:
            found = found * (found == most)
        return torch.cat([found, 1 - most], 1)

    def _cross(self, refined: Tensor, found: Tensor) -> Tensor:
        """One of the two terms of L_ECR.

        Args:
            refined: B x (K + 1) x h x w, of one copy.
            found: B x K x h x w, the other's normalised maps.
        """
        losses = (refined - self._scores(found.detach())).abs()
        each = losses.mean(1) if self.settings.mining == "cells" else losses
        each = each.flatten(1)
        return each.topk(max(1, int(self.settings.hard * each.shape[1])), dim=1).values.mean()


def _normalised(maps: Tensor, tags: Tensor | None) -> Tensor:
    """B x K x h x w in [0, 1], each map's maximum 1; 0 where it has no positive value or its class is absent."""
    positive = maps.float().relu()
    found = positive / positive.amax((2, 3), keepdim=True).clamp_min(1e-5)
    return found if tags is None else found * tags[:, :, None, None]


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(maps, list(size), mode="bilinear", align_corners=False)


def _weakest(refined: Tensor) -> Tensor:
    """The mean over the quarter of each image's cells whose strongest class, of B x (K + 1) x h x w, is weakest."""
    strongest = refined[:, :-1].amax(1).flatten(1)
    return strongest.topk(max(1, strongest.shape[1] // 4), dim=1, largest=False).values.mean()
