"""DeepLab-LargeFOV (Chen et al. 2015): one dilated convolution with a large field of view."""

from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.config.reader import Count, Share
from pipeline.config.registry import SEGMENTATIONS
from pipeline.networks.base import Backbone, he_normal
from pipeline.networks.heads import normal
from pipeline.networks.segmentation import SegmentationHead


@SEGMENTATIONS.register("deeplab_largefov")
class LargeFov(SegmentationHead):
    """fc6 (3x3, dilated), fc7 and fc8 (1x1), with ReLU and dropout between them, and optionally batch norm.

    After VGG-16, pool5 with stride 1 and an average pool come first, as published. After a ResNet there are none (OAA).
    """

    @dataclass(frozen=True)
    class Settings:
        """The defaults are the published values for VGG-16."""

        channels: Count = 1024  # of fc6 and fc7
        rate: Count = 12  # dilation of fc6
        dropout: Share = 0.5  # after fc6 and after fc7
        batch_norm: bool = False  # before their ReLUs; a network that trains from scratch learns in half of the steps

        def describe(self) -> str:
            norm = ", batch norm" if self.batch_norm else ""
            return f"DeepLab-LargeFOV (rate {self.rate}, {self.channels} channels{norm})"

    def __init__(self, backbone: Backbone, settings: Settings, outputs: int) -> None:
        super().__init__(list(backbone.taps)[-1])
        rate = settings.rate
        pools = [nn.MaxPool2d(3, 1, padding=1), nn.AvgPool2d(3, 1, padding=1)]
        self.pool5 = nn.Sequential(*pools if backbone.ends_before_pool else [])
        self.fc6 = nn.Conv2d(backbone.out_channels, settings.channels, 3, padding=rate, dilation=rate)
        self.fc7 = nn.Conv2d(settings.channels, settings.channels, 1)
        self.norm6, self.norm7 = (
            nn.BatchNorm2d(settings.channels) if settings.batch_norm else nn.Identity() for _ in range(2)
        )
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(settings.dropout)
        he_normal(self)
        self.fc8 = nn.Conv2d(settings.channels, outputs, 1)
        normal(self.fc8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.relu(self.norm6(self.fc6(self.pool5(x)))))
        x = self.dropout(self.relu(self.norm7(self.fc7(x))))
        logits: Tensor = self.fc8(x)
        return logits
