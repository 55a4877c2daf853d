"""MobileNetV2 (Sandler et al. 2018): the feature extractor of torchvision's model."""

from torch import nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.networks.base import Backbone, Tap, limit_stride
from pipeline.networks.published import TorchvisionWeights
from pipeline.networks.vision import import_torchvision

# Index in torchvision's mobilenet_v2().features at which each stage ends (exclusive): just before the stride doubles.
ENDS = {"stage1": 2, "stage2": 4, "stage3": 7, "stage4": 14, "stage5": 19}
CHANNELS = {"stage1": 16, "stage2": 24, "stage3": 32, "stage4": 96, "stage5": 1280}


@BACKBONES.register("mobilenet_v2")
def mobilenet_v2(settings: schema.Backbone) -> Backbone:
    """Build MobileNetV2 with taps stage1 to stage5, at strides 2, 4, 8, 16 and 32 in torchvision."""
    features: nn.Sequential = import_torchvision().models.mobilenet_v2(weights=None).features
    strides = limit_stride(features, 1, settings.output_stride, settings.dilated)
    starts = [0, *ENDS.values()]
    stages = {name: features[start:end] for (name, end), start in zip(ENDS.items(), starts, strict=False)}
    taps = {name: Tap(CHANNELS[name], strides[end - 1]) for name, end in ENDS.items()}
    block = type(features[1])
    published = TorchvisionWeights("MobileNet_V2_Weights", "features.")
    return Backbone(stages, taps, settings.frozen_batch_norm, (nn.ReLU6, block), {block: "conv"}, published)
