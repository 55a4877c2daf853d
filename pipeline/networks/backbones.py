"""Builds the backbone that a block of params.yaml describes."""

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.weights import load_weights

__all__ = ["Backbone", "Tap", "build_backbone"]


def build_backbone(settings: schema.Backbone) -> Backbone:
    """Build the backbone of ``settings`` and load its initial weights.

    Raises:
        PipelineError: the backbone does not support its settings, or its weights cannot be loaded.
    """
    backbone: Backbone = BACKBONES[settings.name](settings)
    backbone.freeze(settings.frozen)
    if settings.weights is not None:
        load_weights(backbone, settings.weights)
    return backbone
