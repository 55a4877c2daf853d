"""Every backbone by its name."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline import schema
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.mobilenet import mobilenet_v2
from pipeline.networks.resnet import resnet50, resnet101
from pipeline.networks.resnet38 import resnet38
from pipeline.networks.small import small
from pipeline.networks.vgg import vgg16
from pipeline.networks.weights import Published, load_weights

__all__ = ["BACKBONES", "Backbone", "Tap", "build_backbone"]


class Entry(NamedTuple):
    build: Callable[[schema.Backbone], Backbone]
    published: Published | None = None


BACKBONES: dict[str, Entry] = {
    "vgg16": Entry(vgg16, Published("VGG16_Weights", "features.")),
    "resnet50": Entry(resnet50, Published("ResNet50_Weights", "")),
    "resnet101": Entry(resnet101, Published("ResNet101_Weights", "")),
    "resnet38": Entry(resnet38),
    "mobilenet_v2": Entry(mobilenet_v2, Published("MobileNet_V2_Weights", "features.")),
    "small": Entry(small),
}


def build_backbone(settings: schema.Backbone) -> Backbone:
    """The backbone that ``settings`` describe, with its initial weights.

    Raises:
        PipelineError: no backbone has that name, or it cannot have these settings or weights.
    """
    if settings.name not in BACKBONES:
        raise PipelineError(f"backbone {settings.name}: unknown; choose from {', '.join(BACKBONES)}")
    build, published = BACKBONES[settings.name]
    backbone = build(settings)
    backbone.freeze(settings.frozen)
    if settings.weights is not None:
        load_weights(backbone, settings.weights, published)
    return backbone
