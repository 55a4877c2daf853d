"""What every segmentation network is: a backbone and a head that scores the classes, at one scale or several.

A head registers itself in its own file (``@SEGMENTATIONS.register("deeplab_v2")``) with its ``Settings``.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import schema
from pipeline.networks.backbones import Backbone, build_backbone


class SegmentationHead(nn.Module):
    """Scores background and every class.

    ``forward`` takes the features of the backbone's ``taps``, in that order, and returns B x (K + 1) x h x w logits,
    background first. A subclass has a frozen dataclass ``Settings`` with a method ``describe() -> str`` for the report,
    and is called with the backbone, its settings and the number of outputs, K + 1.

    Attributes:
        extra_scales: factors of further sizes at which the network sees each image.
    """

    Settings: Any
    extra_scales: tuple[float, ...] = ()

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.taps = taps


class SegmentationNetwork(nn.Module):
    """A backbone and a head that scores background and every class, on the image and on the head's ``extra_scales``.

    The input at several scales is DeepLab-v2's (MSC, Chen et al. 2017). A scaled image has the sides
    round(side * scale) and is resized to exactly these, bilinear with ``align_corners=False`` and without antialiasing.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """B x 3 x H x W images to B x (K + 1) x h x w logits at the head's stride, background first.

        With extra scales, the pixel-wise maximum over all of them.
        """
        return self.supervised(x)[-1]

    def supervised(self, x: Tensor) -> list[Tensor]:
        """The logits, in float32, that a training compares with the labels.

        Those of the image itself; with extra scales also each one's own, at its own size, and then the pixel-wise
        maximum of all, resized to the size of the first.
        """
        found = [self._logits(x)]
        if not self.head.extra_scales:
            return found
        for scale in self.head.extra_scales:
            found.append(self._logits(_resized(x, [max(1, round(side * scale)) for side in x.shape[2:]])))
        first, *others = found
        same = (_resized(logits, first.shape[2:]) for logits in others)
        return [*found, functools.reduce(torch.maximum, same, first)]

    def _logits(self, x: Tensor) -> Tensor:
        features = self.backbone.features(x, self.head.taps)
        return cast(Tensor, self.head(*features.values())).float()


def build_segmentation(settings: schema.Segmentation, num_classes: int) -> SegmentationNetwork:
    """The segmentation network that ``settings`` describe, for ``num_classes`` classes without background.

    Raises:
        PipelineError: the network or the backbone cannot have its settings or weights.
    """
    backbone = build_backbone(settings.backbone)
    network = settings.network
    return SegmentationNetwork(backbone, network.entry(backbone, network.settings, num_classes + 1))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
