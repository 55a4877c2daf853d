"""Text descriptions of blocks of params.yaml for the report. Networks describe themselves in their logs."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Params, PseudoLabels, Walk
from pipeline.config.views import Climbing

Logs = Mapping[str, Mapping[str, Any]]  # log.json of each training by SECTION/NAME


def network(logs: Logs, reference: str, key: str = "text") -> str:
    """A trained network's description of itself: its 'text', 'map_name' or 'labels'."""
    return str(logs[reference]["about"][key])


def climbing(settings: Climbing | None) -> str:
    """Describe climbing, such as 'AdvCAM's climbing (27 iterations of 0.08)'; '' for None."""
    return "" if settings is None else f"AdvCAM's climbing ({settings.iterations} iterations of {settings.step:g})"


def walk(params: Params, settings: Walk, logs: Logs) -> str:
    """Describe a walk, the affinities that it uses, and the labels that the affinities were learned from."""
    affinity = params.affinities[settings.affinity.split("/")[1]]
    rule = params.pseudo_labels[affinity.labels.split("/")[1]]
    power = "" if settings.power == 1 else f" of maps^{settings.power:g}"
    edges = "" if settings.edge_weighting else ", maps not weighted by edges"
    edges += ", scaled at the image's pixels" if settings.grid == "pixels" else ""
    return (
        f"walk{power} of 2^{settings.times} steps (radius {settings.radius}, beta {settings.beta:g}{edges}) along "
        f"affinities of {network(logs, settings.affinity)}, learned from {affinity.labels} "
        f"({rule.source}, {labels(rule)})"
    )


def labels(settings: PseudoLabels) -> str:
    """Describe a label rule, such as 'rule oaa, background 1 - saliency, dense CRF off'."""
    return f"rule {settings.rule.name}, {settings.rule.settings.describe()}"
