"""The wide ResNet-38 (Wu et al. 2019, model A) at stride 8, as AffinityNet, SEAM and EDAM use it."""

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Tap, he_normal


class WideBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; a projection shortcut starts after the first ReLU."""

    def __init__(self, before: int, middle: int, after: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        first, second = dilations
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, middle, 3, stride, padding=first, dilation=first, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, after, 3, padding=second, dilation=second, bias=False)
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.relu(self.bn2(self.conv1(y)))
        return x + cast(Tensor, self.conv2(y))


class BottleneckBlock(nn.Module):
    """Pre-activation block of 1x1, 3x3 and 1x1 convolutions with 1/4, 1/2 and all of ``after`` output channels."""

    def __init__(self, before: int, after: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after // 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after // 4)
        self.conv2 = nn.Conv2d(after // 4, after // 2, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn3 = nn.BatchNorm2d(after // 2)
        self.conv3 = nn.Conv2d(after // 2, after, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        x = self.shortcut(y)
        y = self.dropout(self.relu(self.bn2(self.conv1(y))))
        y = self.dropout(self.relu(self.bn3(self.conv2(y))))
        return x + cast(Tensor, self.conv3(y))


@BACKBONES.register("resnet38")
def resnet38(settings: schema.Backbone) -> Backbone:
    """Build ResNet-38 with taps b2 to b7 of 128, 256, 512, 1024, 2048 and 4096 channels.

    The features of b2 to b6 are residual sums. Those of b7 include the final batch norm but no ReLU, as in EDAM.

    Raises:
        PipelineError: the output stride is not 8, the only one supported.
    """
    if settings.output_stride != 8:
        raise PipelineError(f"resnet38: output_stride {settings.output_stride} is not supported; use 8")
    two, four = (2, 4) if settings.dilated else (1, 1)
    stages: dict[str, nn.Module] = {
        "b2": nn.Sequential(
            OrderedDict(conv1a=nn.Conv2d(3, 64, 3, padding=1, bias=False), b2=_stage(3, 64, 128, 128, 2))
        ),
        "b3": _stage(3, 128, 256, 256, 2),
        "b4": _stage(6, 256, 512, 512, 2),
        "b5": _stage(3, 512, 512, 1024, 1, two),
        "b6": BottleneckBlock(1024, 2048, four, 0.3),
        "b7": nn.Sequential(OrderedDict(b7=BottleneckBlock(2048, 4096, four, 0.5), bn=nn.BatchNorm2d(4096))),
    }
    widths, strides = (128, 256, 512, 1024, 2048, 4096), (2, 4, 8, 8, 8, 8)
    taps = {name: Tap(width, stride) for name, width, stride in zip(stages, widths, strides, strict=True)}
    residuals = {WideBlock: "conv2", BottleneckBlock: "conv3"}
    backbone = Backbone(stages, taps, settings.frozen_batch_norm, tuple(residuals), residuals)
    he_normal(backbone)
    return backbone


def _stage(blocks: int, before: int, middle: int, after: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """A stage of blocks. The first convolution keeps dilation 1, because it takes the place of a strided one."""
    first = WideBlock(before, middle, after, stride, (1, dilation))
    rest = [WideBlock(after, middle, after, 1, (dilation, dilation)) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
