"""Builds the backbone that a block of params.yaml describes."""

import functools
from dataclasses import replace

import torch

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.errors import PipelineError
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.convolutions import replace_slow
from pipeline.networks.weights import load_weights

__all__ = ["Backbone", "Tap", "backbone_faults", "build_backbone"]


def build_backbone(settings: schema.Backbone) -> Backbone:
    """Build the backbone of ``settings`` and load its initial weights.

    Raises:
        PipelineError: the backbone does not support its settings, or its weights cannot be loaded.
    """
    backbone: Backbone = BACKBONES[settings.name](settings)
    replace_slow(backbone)
    backbone.freeze(settings.frozen)
    if settings.weights is not None:
        load_weights(backbone, settings.weights)
    return backbone


def backbone_faults(settings: schema.Backbone) -> tuple[str, ...]:
    """The settings that the backbone does not support, one line each. Weights are not loaded, nor is memory allocated.

    A network that is not installed is a fault as well.
    """
    return _faults(replace(settings, weights=None))


@functools.cache
def _faults(settings: schema.Backbone) -> tuple[str, ...]:
    try:
        with torch.device("meta"):
            build_backbone(settings)
    except PipelineError as error:
        return error.lines
    return ()
