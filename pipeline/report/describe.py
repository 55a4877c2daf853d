"""Descriptions of blocks of params.yaml: how a number came about. Networks describe themselves in their logs."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Climbing, Params, PseudoLabels, Walk

Logs = Mapping[str, Mapping[str, Any]]  # log.json of each training by SECTION/NAME


def network(logs: Logs, reference: str, key: str = "text") -> str:
    """What a trained network says of itself: 'text', the 'map_name' of its maps, the 'labels' that it learns from."""
    return str(logs[reference]["about"][key])


def climbing(settings: Climbing | None) -> str:
    """As 'AdvCAM's climbing (27 iterations of 0.08)'; '' where there is none."""
    return "" if settings is None else f"AdvCAM's climbing ({settings.iterations} iterations of {settings.step:g})"


def walk(params: Params, settings: Walk, logs: Logs) -> str:
    """The walk, the affinities that it follows, and the labels that these were learned from."""
    affinity = params.affinities[settings.affinity.split("/")[1]]
    rule = params.pseudo_labels[affinity.labels.split("/")[1]]
    power = "" if settings.power == 1 else f" of maps^{settings.power:g}"
    edges = "" if settings.edge_weighting else ", maps not weighted by edges"
    return (
        f"walk{power} of 2^{settings.times} steps (radius {settings.radius}, beta {settings.beta:g}{edges}) along "
        f"affinities of {network(logs, settings.affinity)}, learned from {affinity.labels} "
        f"({rule.source}, {labels(rule)})"
    )


def labels(settings: PseudoLabels) -> str:
    """As 'rule oaa, background 1 - saliency, dense CRF off'."""
    return f"rule {settings.rule.name}, {settings.rule.settings.describe()}"
