"""The profile that ``wsss new`` writes: rows and settings that suit the photos, the weights and the machine.

The rows are those that were best on real photos in docs/RESULTS.md: OAA where there are saliency maps, else class
activation maps that a random walk spreads (IRN). The settings are those of profiles/voc12_mini.yaml, except that the
segmentation network has the classifier's backbone, with as many epochs as the number of photos calls for. Only its
last stage and its head are trained: trained as a whole on few photos, it misses most objects in new ones.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

TEMPLATES = Path(__file__).parent / "templates"
WITHOUT_SALIENCY, WITH_SALIENCY = "cam_irn", "oaa"
LITE2 = "timm:tf_efficientnet_lite2"
BACKBONES = (LITE2, "mobilenet_v2", "resnet50", "resnet101", "vgg16", "resnet38", "timm:tf_efficientnet_lite0")


@dataclass(frozen=True)
class Machine:
    """What the settings depend on."""

    cards: int  # GPUs
    cores: int

    def __str__(self) -> str:
        if self.cards:
            return f"{self.cards} GPU{'s' if self.cards > 1 else ''}"
        return f"no GPU, {self.cores} processor core{'s' if self.cores > 1 else ''}"


@dataclass(frozen=True)
class Source:
    """The dataset that a profile describes. Paths are as params files hold them."""

    name: str
    root: str
    images: str
    masks: str | None
    saliency: str | None  # a folder, 'rembg', or None
    weights: str | None  # a file, 'imagenet', or None: random
    backbone: str  # that the weights fit
    seed: int
    training: int  # number of photos
    evaluation: int
    command: str  # that wrote the profile


def row(source: Source) -> str:
    """The name of the row that makes the masks."""
    return WITH_SALIENCY if source.saliency else WITHOUT_SALIENCY


@dataclass(frozen=True)
class Size:
    """Settings that follow from the machine.

    Attributes:
        megapixels: at which the networks see the photos.
        side: pixels of the square inputs of the classifier and of the crops of the segmentation network.
        steps: fewest and most optimizer steps of a training.
        epochs: fewest and most.
    """

    megapixels: float
    side: int
    batch: int
    steps: tuple[int, int]
    epochs: tuple[int, int]

    def count_epochs(self, photos: int, share: float = 1.0) -> int:
        """Epochs that give few photos enough steps and many photos no more than the machine can do.

        Args:
            share: of the fewest steps, for a training that needs fewer.
        """
        per_epoch = math.ceil(photos / self.batch)
        fewest, most = math.ceil(share * self.steps[0] / per_epoch), math.ceil(self.steps[1] / per_epoch)
        return max(1, min(max(self.epochs[0], fewest), self.epochs[1], most))


# On 150 photos the classifier's loss is 0.02 after 220 steps; that of the segmentation network falls little after 400.
CLASSIFIER = 0.7  # of the segmentation network's fewest steps
SIZES = {
    "cpu": Size(0.1, 257, 8, steps=(400, 6_000), epochs=(6, 40)),
    "gpu": Size(0.25, 321, 16, steps=(1_000, 60_000), epochs=(10, 100)),
    "scratch": Size(0.02, 97, 8, steps=(900, 6_000), epochs=(12, 40)),  # without pretrained weights, on a small network
}


def size(source: Source, machine: Machine) -> Size:
    return SIZES["scratch" if source.weights is None else "gpu" if machine.cards else "cpu"]


def backbone(weights: str | None, machine: Machine) -> str:
    """The backbone for ImageNet weights, or for none."""
    if weights is None:
        return "small"
    if machine.cards:
        return "resnet50"
    return LITE2


def frozen(name: str) -> list[str]:
    """The stages of a backbone that the segmentation network does not train."""
    import torch

    from pipeline.config.schema import Backbone
    from pipeline.networks.backbones import build_backbone

    with torch.device("meta"):
        return list(build_backbone(Backbone(name, output_stride=16)).taps)[:-1]


def duration(source: Source, machine: Machine) -> str:
    """A rough estimate of the time that the row takes, measured on two cores with AVX-512 (docs/RESULTS.md)."""
    if machine.cards:
        return "not measured on a GPU"
    own = size(source, machine)
    steps = own.count_epochs(source.training) * math.ceil(source.training / own.batch)
    per_step, per_photo = (0.1, 0.3) if source.weights is None else (2.2, 1.6)  # processor seconds
    seconds = (per_step * steps + per_photo * (source.training + source.evaluation)) / min(machine.cores, 8)
    minutes = max(2, math.ceil(seconds / 60))
    return f"about {minutes} minutes" if minutes < 120 else f"about {round(minutes / 60)} hours"


def write(source: Source, machine: Machine) -> str:
    """The text of the profile."""
    own = size(source, machine)
    epochs = own.count_epochs(source.training)
    values: dict[str, Any] = {
        "photos": source.training + source.evaluation,
        "machine": machine,
        "command": source.command,
        "name": source.name,
        "seed": source.seed,
        "row": row(source),
        "rows": "\n".join(_rows(source)),
        "root": _quoted(source.root),
        "images": _quoted(source.images),
        "masks": _quoted(source.masks),
        "megapixels": f"{own.megapixels:g}",
        "saliency": _saliency(source),
        "backbone": source.backbone,
        "why": _why(source, machine),
        "weights": _quoted(source.weights),
        "epochs": epochs,
        "classifier_epochs": (learned := own.count_epochs(source.training, CLASSIFIER)),
        "steps": learned * math.ceil(source.training / own.batch),
        "batch": own.batch,
        "side": own.side,
        "cells": math.ceil(own.side / 16),
        "skip": min(learned - 1, max(1, learned // 6)),
        "milestone": max(1, learned * 5 // 6),
        "affinity_epochs": max(1, math.ceil(epochs / 3)),
        "frozen": "" if source.weights is None else ", ".join(frozen(source.backbone)),
        "scales": "[1.0]" if source.weights is None else "[1.0, 1.5]",
    }
    names = ("header", "scratch" if source.weights is None else "pretrained")
    texts = ((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8") for name in names)
    return "".join(Template(text).substitute(values) for text in texts)


def _rows(source: Source) -> list[str]:
    """The lines of ``rows``: the best one, and others to try as comments."""
    saliency = {
        "oaa": "attention accumulated over the training, weighed against saliency: best with saliency maps",
        "oaa_drop": "as oaa, under the attention drop layer: as good, with one more training",
    }
    plain = {
        "cam_irn": "class activation maps, spread along learned edges: best without saliency maps",
        "oaa_irn": "the attention of oaa, spread likewise: larger areas, more of them wrong",
    }
    choices = {**saliency, **plain} if source.saliency else plain
    if source.masks:
        choices["supervised"] = "trains on the masks of those training photos that have one: the upper bound"
    best = row(source)
    return [f"  {'' if name == best else '# '}- {name}  # {text}" for name, text in choices.items()]


def _saliency(source: Source) -> str:
    if source.saliency is None:
        return (
            "saliency: {kind: none, path: null}  # or {kind: folder, path: FOLDER}: a grey map of each photo; then add "
            "the row oaa"
        )
    if source.saliency == "rembg":
        return "saliency: {kind: rembg, path: null}  # U2-Net's maps of what stands out (pip install 'rembg[cpu]')"
    return f"saliency: {{kind: folder, path: {_quoted(source.saliency)}}}  # a grey map of each photo: what stands out"


def _why(source: Source, machine: Machine) -> str:
    if source.weights not in (None, "imagenet"):
        return "the network that fits the file of weights"
    if machine.cards:
        return "for a GPU; resnet101 is slower and often better. These settings were measured on CPUs only"
    return "small enough for a machine without a GPU; resnet50 takes several times as long"


def _quoted(value: str | None) -> str:
    """A YAML scalar."""
    return yaml.safe_dump(value, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")
