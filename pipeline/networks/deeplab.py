"""The DeepLab networks: a backbone, the head of a published version, and one scale of the image or several."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import schema
from pipeline.errors import PipelineError
from pipeline.networks.aspp import Aspp
from pipeline.networks.backbones import Backbone, build_backbone
from pipeline.networks.decoder import Decoder
from pipeline.networks.large_fov import LargeFov
from pipeline.networks.segmentation_head import SegmentationHead

# By name, what makes the head from the backbone, the settings and the number of outputs, K + 1.
HEADS: dict[str, Callable[[Backbone, schema.Segmentation, int], SegmentationHead]] = {
    "deeplab_largefov": LargeFov,
    "deeplab_v2": Aspp,
    "deeplab_v3plus": Decoder,
}


class SegmentationNetwork(nn.Module):
    """A backbone and a head that scores background and every class, on the image and on ``extra_scales`` of it.

    DeepLab-v2's multi-scale input (MSC, Chen et al. 2017) fits any head. A scaled image has the sides
    round(side * scale) and is resized to exactly these, bilinear with ``align_corners=False`` and without antialiasing.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead, extra_scales: Sequence[float] = ()) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.extra_scales = tuple(extra_scales)

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
        if not self.extra_scales:
            return found
        for scale in self.extra_scales:
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
        PipelineError: no network has that name, it does not take so many rates, or the backbone cannot have its
            settings or weights.
    """
    if settings.network not in HEADS:
        raise PipelineError(f"network {settings.network}: unknown; choose from {', '.join(HEADS)}")
    backbone = build_backbone(settings.backbone)
    head = HEADS[settings.network](backbone, settings, num_classes + 1)
    return SegmentationNetwork(backbone, head, settings.extra_scales)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
