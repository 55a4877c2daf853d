"""The backbone that a block of params.yaml names."""

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.weights import load_weights

__all__ = ["Backbone", "Tap", "build_backbone"]


def build_backbone(settings: schema.Backbone) -> Backbone:
    """The backbone that ``settings`` describe, with its initial weights.

    Raises:
        PipelineError: no backbone has that name, or it cannot have these settings or weights.
    """
    backbone: Backbone = BACKBONES[settings.name](settings)
    backbone.freeze(settings.frozen)
    if settings.weights is not None:
        load_weights(backbone, settings.weights)
    return backbone
