"""The self-supervised equivariant attention mechanism (SEAM): maps of an image and its rescaled copy must agree."""

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
from pipeline.networks.pooling import coarsened

BLOCK = 1024  # cells whose correlations with all cells are computed at once


@dataclass(frozen=True, eq=False)
class SeamOutput(Output):
    """``refined``: B x (K + 1) x h x w maps from the pixel correlation module, in [0, 1]; background is last."""

    refined: Tensor


class PixelCorrelation(nn.Module):
    """The pixel correlation module (SEAM Eq. 8 and 9): each cell becomes the weighted mean of all cells.

    A weight is the positive part of the cosine of two cells' embeddings, divided by the sum of a cell's weights: ReLU
    and L1 normalisation instead of softmax, and no residual connection. The embedding is a 1x1 convolution of the
    image, reduced to the size of the maps, and of two levels of backbone features, each reduced by a 1x1 convolution
    with ReLU. No gradients flow from this module to the maps or the backbone.

    Args:
        levels: channels of the two levels.
        channels: channels to which each level is reduced; the embedding has their sum.
    """

    def __init__(self, levels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.reductions = nn.ModuleList(
            nn.Conv2d(before, after, 1, bias=False) for before, after in zip(levels, channels, strict=True)
        )
        self.embedding = nn.Conv2d(3 + sum(channels), sum(channels), 1, bias=False)
        he_normal(self)

    def forward(self, maps: Tensor, images: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Compute the refined maps, B x C x h x w in float32.

        Args:
            maps: B x C x h x w.
            images: B x 3 x H x W.
            levels: B x C' x h' x w' features, with h' >= h and w' >= w.
        """
        size = maps.shape[2], maps.shape[3]
        parts = [coarsened(images, size)]
        for reduction, level in zip(self.reductions, levels, strict=True):
            parts.append(reduction(coarsened(level.detach(), size)).relu())
        cells = functional.normalize(self.embedding(torch.cat(parts, 1)).float().flatten(2), dim=1)
        values = maps.detach().float().flatten(2)
        values = torch.cat([values, torch.ones_like(values[:, :1])], 1)  # the row of ones yields the sum of the weights
        blocks = torch.split(cells, BLOCK, dim=2)
        sums = torch.cat([values @ (cells.transpose(1, 2) @ block).relu() for block in blocks], 2).float()
        return (sums[:, :-1] / sums[:, -1:].clamp_min(1e-5)).view(maps.shape)


@METHODS.register("seam")
class Seam(Method):
    """A classifier that sees an image and its rescaled copy with the same weights (Wang et al., CVPR 2020).

    The positive parts of the class activation maps, divided by their maxima, are refined by a pixel correlation module.
    The background map is 1 - the maximum over the classes. The loss is L_cls + L_ER + L_ECR. L_cls classifies both
    copies. L_ER is the difference between the copies' maps. L_ECR is the difference between the refined maps of one
    copy and the maps of the other, in both directions.

    The defaults follow the paper. The public code differs as follows (with the settings that reproduce it):

    * Before the module, and as the target of L_ECR, it keeps only a cell's strongest class (``strongest``).
    * L_ECR mines the hardest fifth of all values, not of all cells (``mining: values``), which weighs L_ECR higher.
    * It pulls the quarter of the cells whose refined maps are weakest towards zero (``minimum: 1``).
    * It divides the refined maps by their maximum again before the comparison; this implementation does not.
    * It compares maps at the pixels of the rescaled copy; this implementation compares them at the copy's cells.

    L_cls is the multi-label soft margin loss of the maps' spatial means, which equals ``Method.loss``.
    """

    map_name = "Equivariant CAM"

    @dataclass(frozen=True)
    class Settings:
        """Settings of the transform, the pixel correlation module and the loss."""

        scale: Annotated[float, Range(above=0, most=1)] = 0.3  # side of the copy, relative to the image
        levels: tuple[str, str] | None = None  # input taps of the module; null: the two before the last
        channels: tuple[Count, Count] = (64, 128)  # to which the module reduces the levels
        equivariance: NonNegative = 1.0  # weight of L_ER
        cross: Positive = 1.0  # weight of L_ECR, the only loss that trains the module
        hard: Annotated[float, Range(above=0, most=1)] = 0.2  # hardest share of losses, over which L_ECR is the mean
        mining: Literal["cells", "values"] = "cells"  # unit of ``hard``: cells, or single values of classes
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

    @property
    def is_mean(self) -> bool:
        return True

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.head, self.correlation, self.suppressors]

    def layers(self) -> dict[str, list[nn.Module]]:
        """The backbone's layers, and 'head' for the 3x3 convolutions if there are any."""
        activations: list[nn.Module] = [module for module in self.head.convs if isinstance(module, nn.ReLU)]
        return self.backbone.layers() | ({"head": activations} if activations else {})

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> SeamOutput:
        return self._branch(images, occluded, None)

    def training_step(self, images: Tensor, tags: Tensor, epoch: int, occluded: Tensor | None = None) -> Step:
        """Compute L_cls + L_ER + L_ECR, with maps of absent classes set to 0; return the output for ``images``.

        L_ER and L_ECR are means over classes and cells at the size of the rescaled copy's maps, to which the other maps
        are resized bilinearly. L_ECR includes the background, its targets receive no gradients, and it averages only
        the hardest losses of each image.
        """
        settings = self.settings
        size = [max(1, round(settings.scale * extent)) for extent in images.shape[2:]]
        full, small = self._branch(images, occluded, tags), self._branch(_resized(images, size), occluded, tags)
        cells = small.maps.shape[2:]
        full_maps, small_maps = _resized(_normalised(full.maps, tags), cells), _normalised(small.maps, tags)
        cross = self._cross(_resized(full.refined, cells), small_maps) + self._cross(small.refined, full_maps)
        loss = (self.loss(full, tags) + self.loss(small, tags)) / 2 + settings.cross * cross
        if settings.equivariance > 0:
            loss = loss + settings.equivariance * (full_maps - small_maps).abs().mean()
        if settings.minimum > 0:
            loss = loss + settings.minimum * (_weakest(full.refined) + _weakest(small.refined)) / 2
        return Step(loss, full)

    def localization(self, output: Output) -> Tensor:
        """The refined maps. As in the paper, scales are averaged before the division by the maximum."""
        assert isinstance(output, SeamOutput)
        return output.refined[:, : self.num_classes]

    def _branch(self, images: Tensor, occluded: Tensor | None, tags: Tensor | None) -> SeamOutput:
        """Compute logits, maps and refined maps; with ``tags`` (B x K), refined maps of absent classes are 0.

        A ReLU precedes the head. It matters only for ResNet-38, whose last tap has negative values.
        """
        last = list(self.backbone.taps)[-1]
        features = self.backbone.features(images, [*self.levels, last])
        maps = self.head.classify(occlude(self.head.penultimate(features[last].relu()), occluded))
        source = self._scores(_normalised(maps, tags))
        refined = self.correlation(source, images, [features[name] for name in self.levels])
        return SeamOutput(maps.float().mean((2, 3)), maps, refined)

    def _scores(self, maps: Tensor) -> Tensor:
        """Append the background map to B x K x h x w normalised maps: B x (K + 1) x h x w."""
        maximum = maps.amax(1, keepdim=True)
        if self.settings.strongest:
            maps = maps * (maps == maximum)
        return torch.cat([maps, 1 - maximum], 1)

    def _cross(self, refined: Tensor, maps: Tensor) -> Tensor:
        """One of the two terms of L_ECR.

        Args:
            refined: refined maps of one copy, B x (K + 1) x h x w.
            maps: normalised maps of the other copy, B x K x h x w.
        """
        losses = (refined - self._scores(maps.detach())).abs()
        if self.settings.mining == "cells":
            losses = losses.mean(1)
        losses = losses.flatten(1)
        return losses.topk(max(1, int(self.settings.hard * losses.shape[1])), dim=1).values.mean()


def _normalised(maps: Tensor, tags: Tensor | None) -> Tensor:
    """Scale B x K x h x w maps to a maximum of 1, with negative values and the maps of absent classes set to 0."""
    positive = maps.float().relu()
    scaled = positive / positive.amax((2, 3), keepdim=True).clamp_min(1e-5)
    return scaled if tags is None else scaled * tags[:, :, None, None]


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(maps, list(size), mode="bilinear", align_corners=False)


def _weakest(refined: Tensor) -> Tensor:
    """Mean maximum over object classes of B x (K + 1) x h x w maps, over the quarter of cells where it is lowest."""
    strongest = refined[:, :-1].amax(1).flatten(1)
    return strongest.topk(max(1, strongest.shape[1] // 4), dim=1, largest=False).values.mean()
