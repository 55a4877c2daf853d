"""ResNet-50 and ResNet-101 (He et al. 2016): torchvision's models without global pooling and classifier."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.networks.base import Backbone, Tap, limit_stride
from pipeline.networks.published import TorchvisionWeights
from pipeline.networks.vision import import_torchvision


@BACKBONES.register("resnet50")
def resnet50(settings: schema.Backbone) -> Backbone:
    """Build ResNet-50 with taps layer1 to layer4 of 256, 512, 1024 and 2048 channels."""
    return _resnet(settings, import_torchvision().models.resnet50, "ResNet50_Weights")


@BACKBONES.register("resnet101")
def resnet101(settings: schema.Backbone) -> Backbone:
    """Build ResNet-101 with taps layer1 to layer4 of 256, 512, 1024 and 2048 channels."""
    return _resnet(settings, import_torchvision().models.resnet101, "ResNet101_Weights")


def _resnet(settings: schema.Backbone, build: Callable[..., nn.Module], weights: str) -> Backbone:
    modules: dict[str, nn.Module] = dict(build(weights=None).named_children())
    layers = ["layer1", "layer2", "layer3", "layer4"]
    blocks = [block for name in layers for block in modules[name].children()]
    strides = dict(zip(blocks, limit_stride(blocks, 4, settings.output_stride, settings.dilated), strict=True))

    stages: dict[str, nn.Module] = {}
    taps: dict[str, Tap] = {}
    for name, width in zip(layers, (256, 512, 1024, 2048), strict=True):
        parts = ["conv1", "bn1", "relu", "maxpool", name] if name == "layer1" else [name]
        stages[name] = nn.Sequential(OrderedDict((part, modules[part]) for part in parts))
        taps[name] = Tap(width, strides[list(modules[name].children())[-1]])
    block = type(blocks[0])
    published = TorchvisionWeights(weights)
    return Backbone(stages, taps, settings.frozen_batch_norm, (nn.ReLU, block), {block: "bn3"}, published)
