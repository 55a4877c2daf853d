"""params.yaml -> ``schema.Params``: merged, checked whole, every fault a line of its own."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import references
from pipeline.errors import PipelineError
from pipeline.schema import Classifier, Dataset, Edam, OneStep, Params, Segmentation

DEFAULTS = (
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
RATES = {"deeplab_largefov": 1, "deeplab_v3plus": 3}  # dilations that a network takes; deeplab_v2: any number
_T = typing.TypeVar("_T")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mapping by mapping; a null removes what it names."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The raw mapping of params.yaml with profiles and overrides laid on it, in order.

    Raises:
        PipelineError: a file is missing or no YAML mapping.
    """
    raw: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(file.read_text())
        except FileNotFoundError:
            raise PipelineError(f"{file}: no such file; name a params file that exists") from None
        except yaml.YAMLError as error:
            raise PipelineError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise PipelineError(f"{file}: holds no mapping of parameters")
        raw = merge(raw, found)
    return merge(raw, overrides or {})


def load(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> Params:
    """Read, merge, check.

    Raises:
        PipelineError: with every fault found, a line each.
    """
    return validate(read(files, overrides), " + ".join(map(str, files)))


def validate(raw: Mapping[str, Any], origin: str = "params.yaml") -> Params:
    """Check a raw mapping against ``schema.Params``; each block gets its section's entry of ``defaults`` first."""
    raw = dict(raw)
    faults: list[str] = []
    defaults = _defaults(raw.pop("defaults", None), faults)
    for section in DEFAULTS:
        blocks = raw.get(section)
        if isinstance(blocks, Mapping):
            raw[section] = {
                name: merge(defaults.get(section, {}), block) if isinstance(block, Mapping) else block
                for name, block in blocks.items()
                if block is not None
            }
    params = _build(Params, raw, "", faults)
    if not faults:
        _check(params, faults)
    if faults:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    checked = typing.cast(Params, params)
    return checked if checked.rows is None else references.only(checked, checked.rows)


def block(kind: type[_T], raw: Mapping[str, Any], origin: str) -> _T:
    """One block from its mapping, as a model file keeps it.

    Raises:
        PipelineError: it does not fit the schema.
    """
    faults: list[str] = []
    built = _build_block(kind, raw, "", faults)
    if faults or built is None:
        raise PipelineError(*(f"{origin}: {fault}" for fault in faults))
    return built


def _defaults(value: Any, faults: list[str]) -> dict[str, Mapping[str, Any]]:
    """What ``defaults`` holds for each section; what is no mapping is added to ``faults``."""
    if not isinstance(value, Mapping | None):
        faults.append(f"defaults: must be a mapping of sections to blocks, not {_said(value)}")
        return {}
    found = {}
    for section, block in (value or {}).items():
        if section not in DEFAULTS:
            faults.append(f"defaults.{section}: unknown section{_near(str(section), DEFAULTS)}")
        elif isinstance(block, Mapping):
            found[section] = block
        elif block is not None:
            faults.append(f"defaults.{section}: must be a mapping, not {_said(block)}")
    return found


def _build(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    """``value`` as an instance of the annotation ``kind``; what does not fit is added to ``faults``."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_block(typing.cast(type, kind), value, where, faults)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _build(next(a for a in arguments if a is not types.NoneType), value, where, faults)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool):
            choices = ", ".join(map(str, arguments))
            faults.append(f"{where}: {value!r} is none of {choices}{_near(str(value), map(str, arguments))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{where}: must be a mapping of names to blocks, not {_said(value)}")
            return {}
        for name in value:
            if not (isinstance(name, str) and name.replace("_", "").isalnum()):
                faults.append(f"{where}.{name}: a block's name is made of letters, digits and '_'")
        return {name: _build(arguments[1], block, f"{where}.{name}", faults) for name, block in value.items()}
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, Sequence) or isinstance(value, str) or (size and len(value) != size):
            faults.append(f"{where}: must be a list{f' of {size} numbers' if size else ''}, not {_said(value)}")
            return ()
        return tuple(_build(arguments[0], item, f"{where}[{i}]", faults) for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        faults.append(f"{where}: must be {_word(kind)}, not {_said(value)}")
    return value


def _build_block(kind: type[_T], value: Any, where: str, faults: list[str]) -> _T | None:
    if not isinstance(value, Mapping):
        faults.append(f"{where}: must be a mapping, not {_said(value)}")
        return None
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            faults.append(f"{dot}{key}: unknown key{_near(str(key), hints)}")
    arguments = {key: _build(hints[key], value[key], f"{dot}{key}", faults) for key in hints if key in value}
    for member in dataclasses.fields(typing.cast(Any, kind)):
        if member.name not in arguments and _required(member):
            faults.append(f"{dot}{member.name}: is missing")
            return None
    return kind(**arguments)


def _required(member: "dataclasses.Field[Any]") -> bool:
    return member.default is dataclasses.MISSING and member.default_factory is dataclasses.MISSING


def _near(word: str, choices: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _word(kind: type) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)


def _said(value: Any) -> str:
    return "null" if value is None else repr(value)


def _check(params: Params, faults: list[str]) -> None:
    """What no single key can tell: references between blocks, and values that contradict each other."""
    known = {section: {f"{section}/{name}" for name in getattr(params, section)} for section in (*DEFAULTS, "mixtures")}
    maps = known["classifiers"] | known["localizations"] | known["walks"]
    models = known["classifiers"] | known["refinements"] | known["one_step"]
    labels = known["pseudo_labels"] | known["mixtures"] | {"ground_truth"}

    def refers(where: str, name: str, choices: set[str]) -> None:
        if name not in choices:
            faults.append(f"{where}: refers to {name}, which is none of {', '.join(sorted(choices))}")

    for name, localization in params.localizations.items():
        refers(f"localizations.{name}.model", localization.model, models)
        if localization.climbing is not None:
            if localization.model not in known["classifiers"]:
                faults.append(
                    f"localizations.{name}.climbing: {localization.model} is no classifier; set climbing to null"
                )
            if localization.climbing.iterations < 0 or localization.climbing.step <= 0:
                faults.append(f"localizations.{name}.climbing: iterations must be 0 or more, and step above 0")
    for name, refinement in params.refinements.items():
        refers(f"refinements.{name}.source", refinement.source, maps)
    for name, affinity in params.affinities.items():
        refers(f"affinities.{name}.labels", affinity.labels, known["pseudo_labels"])
        if affinity.radius < 2:
            faults.append(f"affinities.{name}.radius: {affinity.radius} is below 2, and no two cells are nearer")
        if affinity.channels < 4 or affinity.channels % 4:
            faults.append(f"affinities.{name}.channels: {affinity.channels} is no multiple of 4, its norm's groups")
    for name, walk in params.walks.items():
        refers(f"walks.{name}.affinity", walk.affinity, known["affinities"])
        refers(f"walks.{name}.maps", walk.maps, maps)
        if walk.radius < 2:
            faults.append(f"walks.{name}.radius: {walk.radius} is below 2, and no two cells are nearer")
        if walk.times < 0:
            faults.append(f"walks.{name}.times: {walk.times} is below 0")
        for key in ("beta", "power"):
            if getattr(walk, key) <= 0:
                faults.append(f"walks.{name}.{key}: {getattr(walk, key)} is not above 0")
    for name, rule in params.pseudo_labels.items():
        refers(f"pseudo_labels.{name}.source", rule.source, maps)
        if rule.saliency and params.saliency.kind == "none":
            faults.append(f"pseudo_labels.{name}.saliency: is true, but saliency.kind is none; set it to false")
        if rule.rule in ("drs", "edam") and not rule.saliency:
            faults.append(f"pseudo_labels.{name}.saliency: is false, but rule {rule.rule} needs saliency")
        if rule.rule == "confident" and (rule.crf is None or rule.saliency):
            faults.append(f"pseudo_labels.{name}: rule confident needs crf, and saliency: false")
        if rule.rule == "confident" and rule.background_power is not None:
            faults.append(f"pseudo_labels.{name}.background_power: rule confident has two constants; set it to null")
        if rule.rule == "confident" and not 0 < rule.certainty < 1:
            faults.append(f"pseudo_labels.{name}.certainty: {rule.certainty} is not between 0 and 1")
        if rule.confidence > 0 and rule.crf is None:
            faults.append(f"pseudo_labels.{name}.confidence: is of the CRF's marginals; set crf, or confidence to 0")
    for name, mixture in params.mixtures.items():
        refers(f"mixtures.{name}.labels", mixture.labels, known["pseudo_labels"])
        if not 0 <= mixture.share <= 1:
            faults.append(f"mixtures.{name}.share: {mixture.share} is not within 0 and 1")
    for name, segmentation in params.segmentations.items():
        refers(f"segmentations.{name}.labels", segmentation.labels, labels)
        faults.extend(f"segmentations.{name}.{fault}" for fault in _network_faults(segmentation))
    for name, network in params.one_step.items():
        faults.extend(f"one_step.{name}.{fault}" for fault in _one_step_faults(network))
        if name in params.segmentations:
            faults.append(f"one_step.{name}: segmentations has the same name, and both would be predictions/{name}")
    rows = references.rows(params)
    faults.extend(f"rows: {row} is none of {', '.join(rows)}" for row in params.rows or () if row not in rows)
    if params.method not in (chosen := rows if params.rows is None else params.rows):
        faults.append(f"method: {params.method} is none of the rows {', '.join(chosen)}")
    faults.extend(f"dataset.{fault}" for fault in _dataset_faults(params.dataset))
    if params.saliency.kind in ("folder", "store") and params.saliency.path is None:
        faults.append(f"saliency.path: is missing; saliency.kind {params.saliency.kind} needs it")
    for name, classifier in params.classifiers.items():
        if classifier.suppression is not None and not 0 <= classifier.suppression.delta < 1:
            faults.append(f"classifiers.{name}.suppression.delta: {classifier.suppression.delta} is not within 0 and 1")
        faults.extend(f"classifiers.{name}.{fault}" for fault in _method_faults(classifier))
    for section in TRAINED:
        for name, block in getattr(params, section).items():
            training = block.training
            if (training.epochs is None) == (training.iterations is None):
                faults.append(f"{section}.{name}.training: give either epochs or iterations")
            for key in ("batch_size", "accumulation", "epochs", "iterations", "hold"):
                value = getattr(training, key)
                if value is not None and value < 1:
                    faults.append(f"{section}.{name}.training.{key}: {value} is below 1")
            if not 0 <= training.warmup_start <= 1:
                faults.append(f"{section}.{name}.training.warmup_start: {training.warmup_start} is not within 0 and 1")
            if block.augmentation.side != "none" and block.augmentation.length is None:
                faults.append(
                    f"{section}.{name}.augmentation.length: is missing; side {block.augmentation.side} needs it"
                )
    if circle := references.circle(params):
        faults.append(f"goes round in a circle: {' <- '.join(circle)}")


def _dataset_faults(dataset: Dataset) -> typing.Iterator[str]:
    makers = [key for key in ("demo", "download", "coco_stuff") if getattr(dataset, key)]
    if len(makers) > 1:
        yield f"{makers[0]}: makes the dataset, and so does {makers[1]}; set one of the two to null"
    if dataset.coco_stuff and Path(dataset.root).is_relative_to(dataset.coco_stuff):
        yield f"root: lies in {dataset.coco_stuff}, of which it is made (coco_stuff); choose a folder outside of it"


def _method_faults(classifier: Classifier) -> typing.Iterator[str]:
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


def _network_faults(settings: Segmentation) -> typing.Iterator[str]:
    held, count = len(settings.rates), RATES.get(settings.network)
    if count is not None and held != count:
        yield f"rates: holds {held} dilations, {settings.network} takes {count}"
    elif not held:
        yield f"rates: is empty; {settings.network} takes one dilation for each parallel convolution"
    yield from (f"rates: {rate} is below 1" for rate in settings.rates if rate < 1)
    yield from (f"extra_scales: {scale} is not above 0" for scale in settings.extra_scales if scale <= 0)


def _one_step_faults(settings: OneStep) -> typing.Iterator[str]:
    for key, choices in (("agm", (3, 4, 5)), ("coam", settings.agm)):
        for stage in getattr(settings, key):
            if stage not in choices:
                yield f"{key}: stage {stage} is none of {', '.join(map(str, choices)) or 'agm, which is empty'}"
    yield from (f"delta: {value} is not within 0 and 1" for value in settings.delta if not 0 < value < 1)
    least = {"background_power": 1, "classification_weight": 0, "boundary_weight": 0, "grid": 1, "rate": 1, "delay": 0}
    for key, bound in least.items():
        if getattr(settings, key) < bound:
            yield f"{key}: {getattr(settings, key)} is below {bound}"
