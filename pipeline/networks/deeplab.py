"""DeepLab-LargeFOV (Chen et al. 2015): a backbone and one dilated convolution with a large field of view."""

from typing import cast

from torch import Tensor, nn

from pipeline import schema
from pipeline.networks.backbones import Backbone, build_backbone
from pipeline.networks.base import he_normal
from pipeline.networks.heads import normal


class SegmentationNetwork(nn.Module):
    """A backbone and a head that scores background and every class."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """B x 3 x H x W images to B x (K + 1) x h x w logits at the backbone's stride, background first."""
        return cast(Tensor, self.head(self.backbone(x)))


def build_segmentation(settings: schema.Segmentation, num_classes: int) -> SegmentationNetwork:
    """The segmentation network that ``settings`` describe, for ``num_classes`` classes without background.

    Raises:
        PipelineError: the backbone cannot have its settings or weights.
    """
    backbone = build_backbone(settings.backbone)
    return SegmentationNetwork(backbone, _large_fov(backbone.out_channels, settings, num_classes + 1))


def _large_fov(in_channels: int, settings: schema.Segmentation, outputs: int) -> nn.Sequential:
    """fc6 (3x3, dilated), fc7 and fc8 (1x1).

    After VGG-16 come its pool5, here of stride 1, and an average pool, as published; after a ResNet they do not (OAA).
    """
    head = nn.Sequential()
    if settings.backbone.name == "vgg16":
        head.add_module("pool5", nn.MaxPool2d(3, 1, padding=1))
        head.add_module("pool5a", nn.AvgPool2d(3, 1, padding=1))
    layers = {
        "fc6": nn.Conv2d(in_channels, settings.channels, 3, padding=settings.rate, dilation=settings.rate),
        "relu6": nn.ReLU(inplace=True),
        "drop6": nn.Dropout(settings.dropout),
        "fc7": nn.Conv2d(settings.channels, settings.channels, 1),
        "relu7": nn.ReLU(inplace=True),
        "drop7": nn.Dropout(settings.dropout),
    }
    for name, layer in layers.items():
        head.add_module(name, layer)
    he_normal(head)
    scores = nn.Conv2d(settings.channels, outputs, 1)
    normal(scores)
    head.add_module("fc8", scores)
    return head
