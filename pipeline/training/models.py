"""Builds networks from blocks of params.yaml, and saves and loads trained networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from pipeline.config import params
from pipeline.config.registry import plain
from pipeline.config.schema import Affinity, Classifier, OneStep, Refinement, Segmentation, without_weights
from pipeline.errors import PipelineError
from pipeline.networks.finite import listed, not_finite
from pipeline.networks.segmentation import build_segmentation
from pipeline.refinement.affinity import AffinityNetwork
from pipeline.training.checkpoint import load_model, save_model

Block = Classifier | Refinement | Affinity | Segmentation | OneStep
_BLOCKS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Block)}


def build(block: Block, num_classes: int) -> nn.Module:
    """Build the network of a block, with the initial weights of its backbones.

    Raises:
        PipelineError: a backbone does not support its settings or weights.
    """
    if isinstance(block, Classifier):
        return block.method.entry.build(block, num_classes)
    if isinstance(block, Refinement | OneStep):
        return block.network.entry(block, num_classes)
    return AffinityNetwork(block) if isinstance(block, Affinity) else build_segmentation(block, num_classes)


def save(path: Path, network: nn.Module, block: Block, num_classes: int) -> None:
    """Write a trained network and the block that describes it."""
    save_model(path, network, block=type(block).__name__, settings=plain(block), num_classes=num_classes)


def load(path: Path, num_classes: int, device: torch.device) -> nn.Module:
    """Load the network in ``path`` onto ``device``, in evaluation mode.

    Raises:
        PipelineError: the network was trained with another number of classes, or its weights are not finite.
    """
    model = load_model(path)
    if model["num_classes"] != num_classes:
        raise PipelineError(f"{path}: was trained on {model['num_classes']} classes, the dataset has {num_classes}")
    return rebuild(model, str(path), device)


def rebuild(model: Mapping[str, Any], origin: str, device: torch.device) -> nn.Module:
    """Build the network that the fields of ``save`` describe, with its trained weights, in evaluation mode.

    Args:
        origin: the file of the model; it starts each message.

    Raises:
        PipelineError: this version of the code does not know the network or a setting, or builds another network, or
            weights are not finite.
    """
    if bad := not_finite(model["state"]):
        raise PipelineError(f"{origin}: {listed(bad)}; delete it and train the network again with a lower training.lr")
    block: Block = params.read_block(_BLOCKS[model["block"]], model["settings"], origin)
    network = build(without_weights(block), model["num_classes"])
    own, state = network.state_dict(), model["state"]
    differing = [
        name
        for name in {**own, **state}
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if differing:
        raise PipelineError(
            f"{origin}: does not fit the network that this version builds ({len(differing)} names or shapes differ, "
            f"first {differing[0]}); install the versions of torchvision and timm in its manifest, or train it again"
        )
    network.load_state_dict(state)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()
