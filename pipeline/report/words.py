"""Blocks of params.yaml in words: what a number was made with."""

from pathlib import Path

from pipeline.schema import (
    Amr,
    Backbone,
    Classifier,
    Climbing,
    Edam,
    OneStep,
    Params,
    PseudoLabels,
    Suppression,
    Walk,
)


def classifier(settings: Classifier) -> str:
    """As 'AMR (Gaussian modulation of channels and positions, ...), small from random weights, DRS, learnable'."""
    method = {"cam": "CAM", "amr": _amr(settings.amr or Amr()), "edam": _edam(settings.edam or Edam())}[settings.method]
    parts = [method, backbone(settings.backbone)]
    if settings.suppression is not None:
        parts.append(suppression(settings.suppression))
    if settings.attention_drop is not None:
        parts.append("attention drop layer")
    return ", ".join(parts)


def suppression(settings: Suppression) -> str:
    """As 'DRS, delta 0.55, in conv6, head'."""
    kind = f"DRS, delta {settings.delta:g}" if settings.delta else "DRS, learnable"
    return kind if settings.layers is None else f"{kind}, in {', '.join(settings.layers) or 'no layer'}"


def _amr(settings: Amr) -> str:
    places = [place for place, on in (("channels", settings.channel), ("positions", settings.spatial)) if on]
    function = {"gaussian": "Gaussian", "density": "Gaussian density", "threshold": "threshold"}[settings.function]
    over = " over the batch" if settings.statistics == "batch" else ""
    parts = [
        f"{function} modulation of {' and '.join(places)}{over}" if places else "no modulation",
        f"consistency {settings.consistency:g}",
        f"xi {settings.xi:g}",
        f"branches share {settings.shared if settings.shared == 'nothing' else f'the {settings.shared}'}",
    ]
    return f"AMR ({', '.join(parts)})"


def _edam(settings: Edam) -> str:
    if not settings.collaborative:
        return "EDAM without collaborative attention"
    pairing = {"shared_class": "that share a class", "random": "drawn at random"}[settings.pairing]
    images = f"{settings.group} images {pairing}" if settings.group > 1 else "single images"
    return f"EDAM, collaborative attention over {images}"


def one_step(settings: OneStep) -> str:
    """The network and its two backbones."""
    return f"AGEN, {backbone(settings.classification)}, {backbone(settings.segmentation)}"


def on_the_fly(settings: OneStep) -> str:
    """Which maps label the training images of a one-step network, and how."""
    modules = f"branch A and AGM {_listed(settings.agm)}" if settings.agm else "branch A alone"
    context = f", CoAM {_listed(settings.coam)}" if settings.coam else ""
    boundary = ", boundary loss with dense CRF" if settings.boundary_weight > 0 else ""
    return f"on the fly, by {modules}{context}, background (1 - strongest)^{settings.background_power:g}{boundary}"


def climbing(settings: Climbing | None) -> str:
    """As 'AdvCAM's climbing (27 iterations of 0.08)'; '' where there is none."""
    return "" if settings is None else f"AdvCAM's climbing ({settings.iterations} iterations of {settings.step:g})"


def walk(params: Params, settings: Walk) -> str:
    """The walk, the affinities that it follows, and the labels that these were learned from."""
    affinity = params.affinities[settings.affinity.split("/")[1]]
    rule = params.pseudo_labels[affinity.labels.split("/")[1]]
    power = "" if settings.power == 1 else f" of maps^{settings.power:g}"
    edges = "" if settings.edge_weighting else ", maps not weighted by edges"
    frozen = ", frozen" if affinity.frozen_backbone else ""
    return (
        f"walk{power} of 2^{settings.times} steps (radius {settings.radius}, beta {settings.beta:g}{edges}) along "
        f"affinities of {backbone(affinity.backbone)}{frozen}, learned from {affinity.labels} "
        f"({rule.source}, {labels(rule)})"
    )


def labels(settings: PseudoLabels) -> str:
    """As 'rule oaa, background 1 - saliency, dense CRF off'."""
    return f"rule {settings.rule.name}, {settings.rule.settings.describe()}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def backbone(settings: Backbone) -> str:
    """As 'vgg16 from ImageNet weights'."""
    weights = settings.weights
    start = "random" if weights is None else "ImageNet" if weights == "imagenet" else Path(weights).name
    return f"{settings.name} from {start} weights"
