"""params.yaml: what is read, merged, and refused."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.params import load, merge, validate
from pipeline.errors import PipelineError
from pipeline.labels.drs import Drs

ROOT = Path(__file__).parent.parent
PROFILES = {
    "voc2012": ["voc2012.yaml"],
    "voc2012_small": ["voc2012.yaml", "voc2012_small.yaml"],
    "coco_stuff": ["voc2012.yaml", "coco_stuff.yaml"],
    "cub": ["voc2012.yaml", "cub.yaml"],
    "voc12_mini": ["voc12_mini.yaml"],
    "voc12_mini_boxes": ["voc12_mini.yaml", "voc12_mini_boxes.yaml"],
    "demo_boxes": ["demo_boxes.yaml"],
}
NETWORK = {"backbone": {"name": "small"}, "training": {"epochs": 1, "batch_size": 2, "lr": 0.1}}
SMALL: dict[str, Any] = {
    "experiment": "small",
    "seed": 1,
    "method": "row",
    "dataset": {"root": "data/small", "demo": {}},
    "saliency": {"kind": "fine_grained"},
    "classifiers": {"base": {**NETWORK}},
    "refinements": {"finer": {**NETWORK, "source": "localizations/plain"}},
    "localizations": {"plain": {"model": "classifiers/base"}, "fine": {"model": "refinements/finer"}},
    "pseudo_labels": {"rule": {"source": "localizations/fine", "rule": "oaa"}},
    "segmentations": {"row": {**NETWORK, "labels": "pseudo_labels/rule", "network": "deeplab_largefov"}},
}


def over(**changes: Any) -> dict[str, Any]:
    """SMALL with ``changes`` laid on it."""
    return merge(copy.deepcopy(SMALL), changes)


def faults(raw: dict[str, Any]) -> list[str]:
    """What ``validate`` says of params that are wrong, the settings of their choices included."""
    with pytest.raises(PipelineError) as caught:
        validate(raw, "p.yaml", resolve=True)
    return list(caught.value.lines)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_valid(name: str) -> None:
    params = load([ROOT / "params.yaml", *(ROOT / "profiles" / file for file in PROFILES[name])])
    assert params.experiment == name
    assert params.rows is not None
    assert sorted(params.rows) == sorted(references.rows(params))


@dataclass(frozen=True)
class Borrowed:
    """A value of params.yaml's, to be found again behind a profile."""

    value: float | str


def borrowed(node: Any, key: str = "") -> Any:
    """The same with every number marked, and the optimizer, of whose rate numbers speak."""
    if isinstance(node, dict):
        return {key: borrowed(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [borrowed(value) for value in node]
    number = isinstance(node, int | float) and not isinstance(node, bool)
    return Borrowed(node) if number or key == "optimizer" else node


def left(node: Any, where: str) -> Iterator[str]:
    """Where marked values are left."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from left(value, f"{where}.{key}")
    elif isinstance(node, Borrowed):
        yield where


def without_heads(node: Any) -> Any:
    """The same without the channels of heads that have no convolution."""
    if not isinstance(node, dict):
        return node
    kept = {key: without_heads(value) for key, value in node.items()}
    return kept | ({"head": None} if (kept.get("head") or {}).get("convs") == 0 else {})


@pytest.mark.parametrize("name", ["voc2012", "voc12_mini"])
def test_a_profile_on_real_images_leaves_no_number_of_the_demo(name: str) -> None:
    """Learning rates from scratch on small images, say. What params.yaml names, by other words, may stay."""
    profile = ROOT / "profiles" / f"{name}.yaml"
    params = load([ROOT / "params.yaml", profile])
    raw = merge(borrowed(yaml.safe_load((ROOT / "params.yaml").read_text())), yaml.safe_load(profile.read_text()))
    for section in parameters.SECTIONS:
        for block in getattr(params, section):
            settings = merge(raw["defaults"].get(section, {}), raw[section][block], 2)
            settings = without_heads(settings)
            assert list(left(settings, f"{section}.{block}")) == []


def test_params_of_the_demo_are_valid() -> None:
    params = load([ROOT / "params.yaml"])
    assert params.method in params.segmentations


def test_numbers_and_names_arrive_in_their_types() -> None:
    params = validate(over(localizations={"plain": {"scales": [1, 0.5]}}))
    assert params.localizations["plain"].scales == (1.0, 0.5)
    assert isinstance(params.classifiers["base"].training.lr, float)
    assert params.pseudo_labels["rule"].rule.settings.crf is None
    params = validate(over(pseudo_labels={"rule": {"rule": {"oaa": {"crf": {}, "background": 1}}}}))
    assert params.pseudo_labels["rule"].rule.settings.crf is not None
    assert isinstance(params.pseudo_labels["rule"].rule.settings.background, float)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sede": 2}, "p.yaml: sede: unknown key; did you mean seed?"),
        (
            {"pseudo_labels": {"rule": {"normalize": "max"}}},
            "p.yaml: pseudo_labels.rule.normalize: unknown key; did you mean normalise?",
        ),
        (
            {"pseudo_labels": {"rule": {"rule": {"oaa": {"atention": 0.5}}}}},
            "p.yaml: pseudo_labels.rule.rule.oaa.atention: unknown key; did you mean attention?",
        ),
        (
            {"pseudo_labels": {"rule": {"rule": {"oaa": {"crf": {"confidense": 0.5}}}}}},
            "p.yaml: pseudo_labels.rule.rule.oaa.crf.confidense: unknown key; did you mean confidence?",
        ),
        (
            {"pseudo_labels": {"rule": {"rule": "ooa"}}},
            "p.yaml: pseudo_labels.rule.rule: 'ooa' is none of confident, drs, edam, oaa, threshold; did you mean oaa?",
        ),
        (
            {"segmentations": {"row": {"backbone": {"name": "resnet500"}}}},
            "p.yaml: segmentations.row.backbone.name: 'resnet500' is none of mobilenet_v2, resnet101, resnet38, "
            "resnet50, small, vgg16, timm:NAME; did you mean resnet50?",
        ),
        (
            {"segmentations": {"row": {"backbone": {"name": 16}}}},
            "p.yaml: segmentations.row.backbone.name: must be text, not 16",
        ),
        ({"seed": "one"}, "p.yaml: seed: must be a whole number, not 'one'"),
        ({"seed": True}, "p.yaml: seed: must be a whole number, not True"),
        ({"gallery": 1.5}, "p.yaml: gallery: must be a whole number, not 1.5"),
        ({"localizations": {"plain": {"flip": 1}}}, "p.yaml: localizations.plain.flip: must be true or false, not 1"),
        (
            {"localizations": {"plain": {"scales": 1.0}}},
            "p.yaml: localizations.plain.scales: must be a list, not 1.0",
        ),
        (
            {"classifiers": {"base": {"augmentation": {"length": [1]}}}},
            "p.yaml: classifiers.base.augmentation.length: must be a list of 2 values, not [1]",
        ),
        ({"classifiers": ["base"]}, "p.yaml: classifiers: must be a mapping of names to blocks, not ['base']"),
        ({"saliency": {"kind": "store"}}, "p.yaml: saliency.path: is missing; saliency.kind store needs it"),
        (
            {"segmentations": {"row": {"training": {"iterations": 5}}}},
            "p.yaml: segmentations.row.training: set either epochs or iterations, not both",
        ),
        (
            {"segmentations": {"row": {"training": {"batch_size": 0}}}},
            "p.yaml: segmentations.row.training.batch_size: 0 must be at least 1",
        ),
        (
            {"segmentations": {"row": {"training": {"warmup_start": 1.5}}}},
            "p.yaml: segmentations.row.training.warmup_start: 1.5 must be at least 0 and at most 1",
        ),
        (
            {"segmentations": {"row": {"backbone": {"frozen": "conv2"}}}},
            "p.yaml: segmentations.row.backbone.frozen: must be a list, not 'conv2'",
        ),
        (
            {"segmentations": {"row": {"backbone": {"frozen": ["conv1"]}}}},
            "p.yaml: segmentations.row.backbone.frozen: would freeze random weights; set weights, or freeze nothing",
        ),
        (
            {"mixtures": {"half": {"labels": "pseudo_labels/rule", "share": 1.5}}},
            "p.yaml: mixtures.half.share: 1.5 must be at least 0 and at most 1",
        ),
        (
            {"classifiers": {"base": {"augmentation": {"side": "short", "length": [100, 50]}}}},
            "p.yaml: classifiers.base.augmentation.length: [100, 50] must be [low, high]",
        ),
        (
            {"classifiers": {"base": {"augmentation": {"scale": [2, 1]}}}},
            "p.yaml: classifiers.base.augmentation.scale: [2.0, 1.0] must be [low, high]",
        ),
        (
            {"classifiers": {"base": {"augmentation": {"side": "long"}}}},
            "p.yaml: classifiers.base.augmentation.length: is missing; side long needs it",
        ),
        (
            {"localizations": {"plain": {"side": "short"}}},
            "p.yaml: localizations.plain.length: is missing; side short needs it",
        ),
        (
            {"localizations": {"plain": {"scales": []}}},
            "p.yaml: localizations.plain.scales: is empty; add at least one",
        ),
        ({"test": {"scales": []}}, "p.yaml: test.scales: is empty; add at least one"),
        ({"test": {"scales": [-1.0]}}, "p.yaml: test.scales[0]: -1.0 must be at least 0.05 and at most 10"),
        (
            {"localizations": {"fine": {"climbing": {}}}},
            "p.yaml: localizations.fine.climbing: refinements/finer is not a classifier; set climbing to null",
        ),
        (
            {"classifiers": {"base": {"training": {"nesterov": True, "momentum": 0}}}},
            "p.yaml: classifiers.base.training.nesterov: needs a momentum; set momentum above 0, or nesterov to false",
        ),
        ({"method": "other"}, "p.yaml: method: other is none of the rows row"),
        (
            {"dataset": {"coco_stuff": "data/coco"}},
            "p.yaml: dataset.demo: creates the dataset, but coco_stuff does too; set one of them to null",
        ),
        (
            {"dataset": {"download": "voc2012_aug"}},
            "p.yaml: dataset.demo: creates the dataset, but download does too; set one of them to null",
        ),
        (
            {"dataset": {"demo": None, "coco_stuff": "data", "root": "data/small"}},
            "p.yaml: dataset.root: lies inside dataset.coco_stuff, data; choose a folder outside of it",
        ),
        ({"defaults": {"saliency": {}}}, "p.yaml: defaults.saliency: unknown section"),
        ({"defaults": ["a"]}, "p.yaml: defaults: must be a mapping of sections to blocks, not ['a']"),
        ({"defaults": {"classifiers": 1}}, "p.yaml: defaults.classifiers: must be a mapping, not 1"),
    ],
)
def test_a_fault_is_one_line_that_names_the_key(changes: dict[str, Any], fault: str) -> None:
    assert faults(over(**changes)) == [fault]


def test_a_wrong_choice_is_answered_with_the_choices() -> None:
    (line,) = faults(over(saliency={"kind": "fine_graned"}))
    assert line.startswith("p.yaml: saliency.kind: 'fine_graned' is none of folder, store")
    assert line.endswith("did you mean fine_grained?")


@pytest.mark.parametrize("key", ["experiment", "seed", "dataset", "segmentations"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = over()
    del raw[key]
    assert f"p.yaml: {key}: is missing" in faults(raw)


def test_a_missing_key_of_a_block_is_named() -> None:
    raw = over()
    del raw["segmentations"]["row"]["labels"]
    assert "p.yaml: segmentations.row.labels: is missing" in faults(raw)


@pytest.mark.parametrize(
    ("section", "name", "key", "choices"),
    [
        ("refinements", "finer", "source", "classifiers/base, localizations/fine, localizations/plain"),
        ("localizations", "plain", "model", "classifiers/base, refinements/finer"),
        ("pseudo_labels", "rule", "source", "classifiers/base, localizations/fine, localizations/plain"),
        ("segmentations", "row", "labels", "ground_truth, pseudo_labels/rule"),
    ],
)
@pytest.mark.parametrize("reference", ["localizations/nowhere", "classifiers/nowhere", "nowhere"])
def test_a_reference_to_nothing_is_answered_with_what_there_is(
    section: str, name: str, key: str, choices: str, reference: str
) -> None:
    (line,) = faults(over(**{section: {name: {key: reference}}}))
    assert line == f"p.yaml: {section}.{name}.{key}: refers to {reference}, which is none of {choices}"


def test_a_cycle_of_references_is_refused() -> None:
    (line,) = faults(over(refinements={"finer": {"source": "localizations/fine"}}))
    assert line == "p.yaml: references form a cycle: refinements/finer <- localizations/fine <- refinements/finer"


def test_all_faults_are_reported_at_once() -> None:
    lines = faults(over(seed="x", sede=1, saliency={"kind": "folder", "pth": "a"}))
    assert len(lines) == 3
    assert all(line.startswith("p.yaml: ") for line in lines)


def test_saliency_that_is_not_there_cannot_be_used() -> None:
    (line,) = faults(over(saliency={"kind": "none"}))
    assert line.startswith("p.yaml: rows left out, since they need saliency maps, but saliency.kind is none: ")
    fix = "set saliency.kind to folder or store, or to a detector"
    assert line.endswith(f"; no row is left: {fix}, or choose other rows")
    without = {"rule": {"rule": {"oaa": {"background": 0.3, "saliency": None}}}}
    assert (
        not validate(over(saliency={"kind": "none"}, pseudo_labels=without))
        .pseudo_labels["rule"]
        .rule.settings.needs_saliency
    )


def test_defaults_lie_under_every_block_of_their_section() -> None:
    rule = {"oaa": {"background": 0.7, "crf": {"iterations": 3, "bilateral_rgb": 9.0}}}
    raw = over(defaults={"pseudo_labels": {"rule": rule}})
    raw["pseudo_labels"]["other"] = {
        "source": "classifiers/base",
        "rule": {"oaa": {"background": 0.1, "crf": {"iterations": 4}}},
    }
    raw["pseudo_labels"]["another"] = {"source": "classifiers/base", "rule": "drs"}
    labels = {name: block.rule.settings for name, block in validate(raw).pseudo_labels.items()}
    assert labels["rule"].background == 0.7
    assert labels["other"].background == 0.1
    assert (labels["other"].crf.iterations, labels["other"].crf.bilateral_rgb) == (4, 9.0)
    assert labels["another"] == Drs()


def test_null_removes_a_block_and_what_a_default_gave() -> None:
    defaults = {"pseudo_labels": {"rule": {"oaa": {"crf": {}}}}}
    raw = over(pseudo_labels={"extra": {"source": "classifiers/base", "rule": "oaa"}}, defaults=defaults)
    laid = merge(raw, {"pseudo_labels": {"extra": None, "rule": {"rule": {"oaa": {"crf": None}}}}})
    params = validate(laid)
    assert list(params.pseudo_labels) == ["rule"]
    assert params.pseudo_labels["rule"].rule.settings.crf is None


def test_merge_leaves_its_arguments_alone() -> None:
    base, top = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(base, top) == {"a": {"b": 3, "c": 2}}
    assert (base, top) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_files_and_overrides_are_laid_on_each_other_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(yaml.safe_dump(SMALL))
    second.write_text("seed: 2\ngallery: 3\n")
    params = load([first, second], {"seed": 3})
    assert (params.seed, params.gallery) == (3, 3)


@pytest.mark.parametrize(
    ("text", "fault"), [("a: [", "not YAML"), ("- a\n", "must be a mapping"), (None, "no such file")]
)
def test_a_file_that_is_no_mapping_is_named(text: str | None, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PipelineError, match=fault) as caught:
        parameters.read([file])
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"{file}: ")
