"""What no single key of params.yaml can tell: references that lead nowhere, and values that contradict each other."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import references
from pipeline.errors import PipelineError
from pipeline.registry import Choice
from pipeline.schema import (
    Affinity,
    Classifier,
    Dataset,
    Edam,
    Localization,
    OneStep,
    Params,
    Walk,
)

SECTIONS = (  # of blocks that ``defaults`` can complete
    "classifiers",
    "refinements",
    "localizations",
    "affinities",
    "walks",
    "pseudo_labels",
    "segmentations",
    "one_step",
)
TRAINED = ("classifiers", "refinements", "affinities", "segmentations", "one_step")


def contradictions(params: Params) -> Iterator[str]:
    """A line for each, which begins with the key that is at fault."""
    yield from _dangling(params)
    yield from (f"dataset.{fault}" for fault in _dataset_faults(params.dataset))
    if params.saliency.kind in ("folder", "store") and params.saliency.path is None:
        yield f"saliency.path: is missing; saliency.kind {params.saliency.kind} needs it"
    for section, faults in _FAULTS.items():
        for name, block in getattr(params, section).items():
            yield from (f"{section}.{name}{fault}" for fault in _dotted(faults(block)))
    for section in TRAINED:
        for name, block in getattr(params, section).items():
            yield from (f"{section}.{name}.{fault}" for fault in _training_faults(block))
    for name, labels in params.pseudo_labels.items():
        yield from _rule_faults(f"pseudo_labels.{name}.rule", labels.rule, params.saliency.kind != "none")
    for name in params.one_step:
        if name in params.segmentations:
            yield f"one_step.{name}: segmentations has the same name, and both would be predictions/{name}"
    rows = references.rows(params)
    yield from (f"rows: {row} is none of {', '.join(rows)}" for row in params.rows or () if row not in rows)
    if params.method not in (chosen := rows if params.rows is None else params.rows):
        yield f"method: {params.method} is none of the rows {', '.join(chosen)}"
    if circle := references.circle(params):
        yield f"goes round in a circle: {' <- '.join(circle)}"


def _dangling(params: Params) -> Iterator[str]:
    """References to blocks that are not there, or not of a kind that is wanted there."""
    known = {section: {f"{section}/{name}" for name in getattr(params, section)} for section in (*SECTIONS, "mixtures")}
    maps = known["classifiers"] | known["localizations"] | known["walks"]
    wanted: dict[tuple[str, str], set[str]] = {
        ("localizations", "model"): known["classifiers"] | known["refinements"] | known["one_step"],
        ("refinements", "source"): maps,
        ("affinities", "labels"): known["pseudo_labels"],
        ("walks", "affinity"): known["affinities"],
        ("walks", "maps"): maps,
        ("pseudo_labels", "source"): maps,
        ("mixtures", "labels"): known["pseudo_labels"],
        ("segmentations", "labels"): known["pseudo_labels"] | known["mixtures"] | {"ground_truth"},
    }
    for (section, key), choices in wanted.items():
        for name, block in getattr(params, section).items():
            if (reference := getattr(block, key)) not in choices:
                yield f"{section}.{name}.{key}: refers to {reference}, which is none of {', '.join(sorted(choices))}"


def _dotted(faults: Iterator[str]) -> Iterator[str]:
    """With a dot before a key; a fault of the whole block begins with ': '."""
    return (fault if fault.startswith(":") else f".{fault}" for fault in faults)


def _training_faults(block: Any) -> Iterator[str]:
    training = block.training
    if (training.epochs is None) == (training.iterations is None):
        yield "training: give either epochs or iterations"
    for key in ("batch_size", "accumulation", "epochs", "iterations", "hold"):
        value = getattr(training, key)
        if value is not None and value < 1:
            yield f"training.{key}: {value} is below 1"
    if not 0 <= training.warmup_start <= 1:
        yield f"training.warmup_start: {training.warmup_start} is not within 0 and 1"
    if block.augmentation.side != "none" and block.augmentation.length is None:
        yield f"augmentation.length: is missing; side {block.augmentation.side} needs it"


def _localization_faults(localization: Localization) -> Iterator[str]:
    if (climbing := localization.climbing) is not None:
        if not localization.model.startswith("classifiers/"):
            yield f"climbing: {localization.model} is no classifier; set climbing to null"
        if climbing.iterations < 0 or climbing.step <= 0:
            yield "climbing: iterations must be 0 or more, and step above 0"


def _affinity_faults(affinity: Affinity) -> Iterator[str]:
    if affinity.radius < 2:
        yield f"radius: {affinity.radius} is below 2, and no two cells are nearer"
    if affinity.channels < 4 or affinity.channels % 4:
        yield f"channels: {affinity.channels} is no multiple of 4, its norm's groups"


def _walk_faults(walk: Walk) -> Iterator[str]:
    if walk.radius < 2:
        yield f"radius: {walk.radius} is below 2, and no two cells are nearer"
    if walk.times < 0:
        yield f"times: {walk.times} is below 0"
    yield from (f"{key}: {getattr(walk, key)} is not above 0" for key in ("beta", "power") if getattr(walk, key) <= 0)


def _rule_faults(where: str, rule: Choice, saliency: bool) -> Iterator[str]:
    """Of a label rule, whose settings are read here: that imports no torch."""
    try:
        settings = rule.settings
    except PipelineError as error:
        yield from error.lines
        return
    if settings.needs_saliency and not saliency:
        yield (
            f"{where}: {rule.name} reads saliency maps, but saliency.kind is none; choose saliency maps, or a rule or "
            "settings without them"
        )


def _dataset_faults(dataset: Dataset) -> Iterator[str]:
    if len(dataset.makers) > 1:
        one, other = dataset.makers[:2]
        yield f"{one}: makes the dataset, and so does {other}; set one of the two to null"
    if dataset.coco_stuff and Path(dataset.root).is_relative_to(dataset.coco_stuff):
        yield f"root: lies in {dataset.coco_stuff}, of which it is made (coco_stuff); choose a folder outside of it"


def _classifier_faults(classifier: Classifier) -> Iterator[str]:
    if classifier.suppression is not None and not 0 <= classifier.suppression.delta < 1:
        yield f"suppression.delta: {classifier.suppression.delta} is not within 0 and 1"
    for method in ("amr", "edam"):
        if getattr(classifier, method) is not None and classifier.method != method:
            yield f"{method}: is given, but method is {classifier.method}; remove it, or set method: {method}"
    if (amr := classifier.amr) is not None:
        if not 0 <= amr.xi <= 1:
            yield f"amr.xi: {amr.xi} is not within 0 and 1"
        if amr.reduction < 1 or amr.consistency < 0:
            yield "amr: reduction must be 1 or more, and consistency 0 or more"
    if classifier.method == "edam":
        edam = classifier.edam or Edam()
        if not 1 <= edam.group <= 4:
            yield f"edam.group: {edam.group} is not within 1 and 4"
        elif classifier.training.batch_size % edam.group:
            yield f"training.batch_size: {classifier.training.batch_size} is no multiple of edam.group, {edam.group}"
        if edam.channels % edam.heads:
            yield f"edam.channels: {edam.channels} is no multiple of edam.heads, {edam.heads}"


def _one_step_faults(settings: OneStep) -> Iterator[str]:
    for key, choices in (("agm", (3, 4, 5)), ("coam", settings.agm)):
        for stage in getattr(settings, key):
            if stage not in choices:
                yield f"{key}: stage {stage} is none of {', '.join(map(str, choices)) or 'agm, which is empty'}"
    yield from (f"delta: {value} is not within 0 and 1" for value in settings.delta if not 0 < value < 1)
    least = {"background_power": 1, "classification_weight": 0, "boundary_weight": 0, "grid": 1, "rate": 1, "delay": 0}
    for key, bound in least.items():
        if getattr(settings, key) < bound:
            yield f"{key}: {getattr(settings, key)} is below {bound}"


_FAULTS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "classifiers": _classifier_faults,
    "localizations": _localization_faults,
    "affinities": _affinity_faults,
    "walks": _walk_faults,
    "one_step": _one_step_faults,
}
