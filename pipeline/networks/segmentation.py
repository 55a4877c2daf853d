"""The base of all segmentation networks: a backbone and a head that scores the classes, at one or several scales.

Each head has its own file and is registered there, for example with ``@SEGMENTATIONS.register("deeplab_v2")``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import schema
from pipeline.networks.backbones import Backbone, build_backbone


class SegmentationHead(nn.Module):
    """Base of all heads: scores background and every class.

    ``forward`` takes the features of the backbone's ``taps``, in that order, and returns B x (K + 1) x h x w logits,
    background first. A subclass defines a frozen dataclass ``Settings`` with a method ``describe() -> str`` for the
    report. Its constructor takes the backbone, the settings and the number of outputs, K + 1.

    Attributes:
        taps: names of the taps whose features ``forward`` takes.
        extra_scales: factors by which the input is also resized.
    """

    Settings: Any
    extra_scales: tuple[float, ...] = ()

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.taps = taps


class SegmentationNetwork(nn.Module):
    """A backbone and a head that scores background and every class, at the input's scale and ``extra_scales``.

    Multi-scale input is that of DeepLab-v2 (MSC, Chen et al. 2017). A scaled image has sides of round(side * scale)
    pixels. It is resized bilinearly, with ``align_corners=False`` and without antialiasing.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map B x 3 x H x W images to B x (K + 1) x h x w logits at the head's stride, background first.

        With extra scales the result is the pixel-wise maximum over all scales.
        """
        return self.supervised(x)[-1]

    def supervised(self, x: Tensor) -> list[Tensor]:
        """All logits, in float32, that the training loss compares with the labels.

        The first are the logits of the image itself. With extra scales there follow the logits of each scale, at its
        own size, and the pixel-wise maximum over all scales, at the size of the first.
        """
        logits = [self._logits(x)]
        if not self.head.extra_scales:
            return logits
        for scale in self.head.extra_scales:
            logits.append(self._logits(_resized(x, [max(1, _rounded(side * scale)) for side in x.shape[2:]])))
        first, *others = logits
        aligned = (_resized(other, first.shape[2:]) for other in others)
        return [*logits, functools.reduce(torch.maximum, aligned, first)]

    def _logits(self, x: Tensor) -> Tensor:
        features = self.backbone.features(x, self.head.taps)
        return cast(Tensor, self.head(*features.values())).float()


def build_segmentation(settings: schema.Segmentation, num_classes: int) -> SegmentationNetwork:
    """Build the segmentation network of ``settings`` for ``num_classes`` classes, not counting background.

    Raises:
        PipelineError: the network or the backbone does not support its settings, or weights cannot be loaded.
    """
    backbone = build_backbone(settings.backbone)
    network = settings.network
    return SegmentationNetwork(backbone, network.entry(backbone, network.settings, num_classes + 1))


def _rounded(value: float) -> int:
    """``round``, half to even, in operations that ONNX has for sizes."""
    return math.floor(value / 2 + 0.25) + math.ceil(value / 2 - 0.25)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
