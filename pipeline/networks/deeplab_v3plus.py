"""DeepLab-v3+ (Chen et al. 2018): ASPP with batch norm, and a decoder that adds stride-4 features."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.reader import Count, Share
from pipeline.config.registry import SEGMENTATIONS
from pipeline.networks.base import Backbone, he_normal
from pipeline.networks.heads import normal
from pipeline.networks.segmentation import SegmentationHead
from pipeline.networks.vision import import_torchvision
from pipeline.training.distributed import images

LOW_LEVEL = 48  # channels that the low-level features are reduced to, so that they do not outweigh the pyramid


@SEGMENTATIONS.register("deeplab_v3plus")
class DeepLabV3Plus(SegmentationHead):
    """torchvision's ASPP, upsampled and concatenated with low-level features, then two 3x3 convolutions.

    The low-level features come from the backbone's first tap with a stride of 4 or more: layer1 of a ResNet, as
    published ('Conv2 before striding'), or conv3_3 of VGG-16. Choosing the first such tap selects the same layer at
    ``output_stride`` 4. The logits have the stride of that tap.
    """

    @dataclass(frozen=True)
    class Settings:
        """The defaults are the published values at output stride 16; the rates at stride 8 are 12, 24 and 36."""

        channels: Count = 256  # of the pyramid and the decoder
        rates: tuple[Count, Count, Count] = (6, 12, 18)  # dilations of the pyramid
        dropout: Share = 0.5  # after the pyramid

        def describe(self) -> str:
            return f"DeepLab-v3+ (rates {', '.join(map(str, self.rates))}, {self.channels} channels)"

    def __init__(self, backbone: Backbone, settings: Settings, outputs: int) -> None:
        low_level = next(name for name, tap in backbone.taps.items() if tap.stride >= 4)
        super().__init__(low_level, list(backbone.taps)[-1])
        channels = settings.channels
        pyramid = import_torchvision().models.segmentation.deeplabv3.ASPP
        self.aspp = pyramid(backbone.out_channels, settings.rates, channels)
        self.aspp.convs[-1][2] = PooledBatchNorm(channels)
        self.aspp.project[-1].p = settings.dropout
        self.reduce = _conv_norm_relu(backbone.taps[low_level].channels, LOW_LEVEL, 1)
        self.fuse = nn.Sequential(
            _conv_norm_relu(LOW_LEVEL + channels, channels, 3), _conv_norm_relu(channels, channels, 3)
        )
        self.classifier = nn.Conv2d(channels, outputs, 1)
        he_normal(self)
        normal(self.classifier)

    def forward(self, low_level: Tensor, x: Tensor) -> Tensor:
        context = functional.interpolate(self.aspp(x), size=low_level.shape[2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.classifier(self.fuse(torch.cat([self.reduce(low_level), context], 1)))
        return logits


class PooledBatchNorm(nn.BatchNorm2d):
    """A batch norm for features that were pooled to one pixel.

    A training batch of one image has no variance at that point, and torch raises an error. The last batch of an epoch
    may have one image. Such a batch is normalised by the running statistics and does not update them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and images(len(x)) == 1 and x.numel() == self.num_features:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def _conv_norm_relu(before: int, after: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))
