"""Variants: rows that are other rows with changes, on any profile."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import references
from pipeline.config.params import load, merge, read, validate
from pipeline.config.schema import Params, Training
from pipeline.data.index import Index
from pipeline.data.streams import Purpose, chosen
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import execute
from stages import segmentation
from tests.faults import small_params
from tests.project import ROOT, run_stages

BENEATH = {"demo": [], "voc12_mini": ["voc12_mini"], "voc2012": ["voc2012"]}


def params(variants: Mapping[str, Any], profile: str = "demo") -> Params:
    files = [ROOT / "params.yaml", *(ROOT / "profiles" / f"{name}.yaml" for name in BENEATH[profile])]
    raw = merge(read(files), {"variants": {"supervised_deeplab_v2": None}})
    every_row = [*references.rows(validate({**raw, "rows": None})), *variants]
    return validate({**raw, "variants": variants, "rows": every_row}, resolve=True)


def faults(variants: Any) -> list[str]:
    with pytest.raises(PipelineError) as caught:
        validate({**read([ROOT / "params.yaml"]), "variants": variants, "rows": ["oaa_plus", *variants]})
    return [line.removeprefix("params.yaml: ") for line in caught.value.lines]


@pytest.mark.parametrize("profile", BENEATH)
def test_a_variant_has_the_settings_of_the_profile_beneath(profile: str) -> None:
    """The blocks that the change affects are copied; nothing but the change and the references differs."""
    found = params({"mild": {"of": "drs_fixed", "classifiers": {"suppression": {"delta": 0.9}}}}, profile)
    base, mild = found.classifiers["drs_fixed"], found.classifiers["mild"]
    assert base.suppression
    assert mild.suppression == replace(base.suppression, delta=0.9)
    assert mild.training == base.training
    assert found.localizations["mild"].model == "classifiers/mild"
    assert found.localizations["mild"].scales == found.localizations["drs_fixed"].scales
    assert found.pseudo_labels["mild"].source == "localizations/mild"
    assert found.pseudo_labels["mild"].rule == found.pseudo_labels["drs_fixed"].rule
    assert found.segmentations["mild"].labels == "pseudo_labels/mild"
    assert found.segmentations["mild"].training == found.segmentations["drs_fixed"].training


def test_blocks_before_the_change_are_shared() -> None:
    found = params({"finer": {"of": "oaa_plus", "refinements": {"network": {"integral": {"threshold": 0.2}}}}})
    assert found.refinements["finer"].source == "classifiers/base"
    assert "finer" not in found.classifiers
    one = params({"longer": {"of": "oaa", "lengths": {"segmentations": 2}}})
    assert one.segmentations["longer"].labels == "pseudo_labels/oaa"
    assert not {"longer"} & (one.pseudo_labels.keys() | one.classifiers.keys())


def test_a_change_of_a_choice_keeps_its_other_settings() -> None:
    found = params(
        {"all": {"of": "oaa_plus", "refinements": {"network": {"integral": {"threshold": 0.2}}}}}, "voc12_mini"
    )
    settings = found.refinements["all"].network.settings
    assert (settings.threshold, settings.reduction) == (0.2, "pooled")


def test_two_blocks_of_a_section_keep_their_names_apart() -> None:
    """IRN's row has two blocks of pseudo labels: those of the walk, and those that the affinities learn from."""
    found = params({"slow": {"of": "cam_irn", "classifiers": {"training": {"lr": 0.01}}}})
    assert found.pseudo_labels["slow"].source == "walks/slow"
    assert found.affinities["slow"].labels == "pseudo_labels/slow_cam_confident"
    assert found.pseudo_labels["slow_cam_confident"].source == "localizations/slow"
    assert found.walks["slow"].maps == "localizations/slow"
    nearest = params({"low": {"of": "cam_irn", "pseudo_labels": {"rule": {"threshold": {"background": 0.1}}}}})
    assert nearest.pseudo_labels["low"].source == "walks/cam_irn"
    assert "low" not in nearest.affinities


def test_a_reference_may_be_changed_and_a_variant_varied() -> None:
    found = params(
        {
            "second": {"of": "first", "localizations": {"scales": [0.5]}},
            "first": {"of": "cam", "localizations": {"model": "classifiers/other"}},
            "other": {"of": "cam", "classifiers": {"training": {"lr": 0.01}}},
        }
    )
    assert found.localizations["first"].model == found.localizations["second"].model == "classifiers/other"
    assert found.localizations["second"].scales == (0.5,)
    assert "first" not in found.classifiers


def test_one_step_rows_vary_too() -> None:
    found = params({"plain": {"of": "agen", "one_step": {"network": {"agen": {"agm": [5], "coam": []}}}}})
    settings, base = (found.one_step[name].network.settings for name in ("plain", "agen"))
    assert (settings.agm, settings.coam) == ((5,), ())
    assert settings.shared == base.shared


@pytest.mark.parametrize(
    ("profile", "section", "before", "after"),
    [("demo", "segmentations", (12, None), (16, None)), ("voc2012", "segmentations", (None, 15000), (None, 20000))],
)
def test_lengths_scale_epochs_or_iterations(
    profile: str, section: str, before: tuple[int | None, int | None], after: tuple[int | None, int | None]
) -> None:
    found = params({"long": {"of": "oaa", "lengths": {section: 4 / 3}}}, profile)
    trainings = [getattr(found, section)[name].training for name in ("oaa", "long")]
    assert [(training.epochs, training.iterations) for training in trainings] == [before, after]


@pytest.mark.parametrize(("profile", "sizes"), [("demo", (8, 9, 8)), ("voc2012", (2, 3, 4))])
def test_batches_are_enlarged_to_a_multiple(profile: str, sizes: tuple[int, int, int]) -> None:
    """EDAM needs as many images as its groups have."""
    change = {group: {"method": {"edam": {"group": group}}} for group in (3, 4)}
    variants = {
        f"group_{group}": {"of": "edam", "classifiers": change[group], "batches": {"classifiers": group}}
        for group in change
    }
    found = params(variants, profile)
    assert tuple(found.classifiers[name].training.batch_size for name in ("edam", "group_3", "group_4")) == sizes


def test_variants_run_only_where_they_are_named() -> None:
    raw = read([ROOT / "params.yaml"])
    raw["variants"] = {"slow": {"of": "oaa", "classifiers": {"training": {"lr": 0.01}}}}
    assert "slow" not in references.rows(validate(raw))
    assert "slow" not in validate(raw).classifiers
    assert list(references.rows(validate({**raw, "rows": ["slow"], "method": "slow", "first": []}))) == ["slow"]
    raw["variants"]["wrong"] = {"of": "nothing"}  # of a row that the params lack
    assert "slow" not in validate(raw, every_row=True).classifiers  # what dvc.yaml describes


def test_lengths_move_milestones() -> None:
    found = params({"long": {"of": "oaa", "lengths": {"classifiers": 2}}}, "voc2012")
    assert (found.classifiers["long"].training.epochs, found.classifiers["long"].training.milestones) == (30, (20,))


@pytest.mark.parametrize(
    ("variants", "fault"),
    [
        ([1], "variants: must be a mapping of names to variants, not [1]"),
        ({"a": {"of": "oa"}}, "variants.a.of: 'oa' is no row; did you mean oaa?"),
        ({"a": {}}, "variants.a.of: is missing; name the row that it changes"),
        ({"a": 3}, "variants.a: must be a mapping, not 3"),
        ({"a b": {"of": "oaa"}}, "variants.a b: a variant's name consists of 1 to 100 ASCII letters, digits and '_'"),
        ({"a": {"of": "oaa", "clasifiers": {}}}, "variants.a.clasifiers: unknown key; did you mean classifiers?"),
        ({"a": {"of": "oaa", "classifiers": [1]}}, "variants.a.classifiers: must be a mapping, not [1]"),
        ({"a": {"of": "oaa", "lengths": {"classifier": 2}}}, "variants.a.lengths.classifier: unknown section"),
        (
            {"a": {"of": "oaa", "lengths": {"classifiers": 0}}},
            "variants.a.lengths.classifiers: 0 must be a number",
        ),
        (
            {"a": {"of": "oaa", "walks": {"times": 3}}},
            "variants.a: the row oaa has no block in walks; it consists of segmentations/oaa, pseudo_labels/oaa, ",
        ),
        (
            {"amr": {"of": "oaa", "classifiers": {}}},
            "variants.amr: classifiers has a block of this name",
        ),
        ({"a": {"of": "b"}, "b": {"of": "a"}}, "variants.a: is a variant of itself; set of to another row"),
        (
            {"a": {"of": "oaa", "classifiers": {"accumulate": {"fusion": "maximum"}}}},
            "classifiers.a.accumulate.fusion: 'maximum' is none of max, average; did you mean max?",
        ),
    ],
)
def test_faulty_variants_are_named(variants: Any, fault: str) -> None:
    assert any(line.startswith(fault) for line in faults(variants)), faults(variants)


def test_a_change_may_refer_to_the_block_that_it_changes() -> None:
    assert (
        params({"twice": {"of": "cam_irn", "walks": {"maps": "walks/cam_irn"}}}).walks["twice"].maps == "walks/cam_irn"
    )


def test_a_cycle_of_references_ends_in_one_line() -> None:
    lines = faults(
        {"a": {"of": "cam_irn", "walks": {"maps": "walks/cam_irn"}}, "b": {"of": "a", "walks": {"maps": "walks/b"}}}
    )
    assert any(line.startswith("references form a cycle: walks/b <- walks/b") for line in lines), lines


def test_no_variant_is_left_in_the_params() -> None:
    raw = read([ROOT / "params.yaml"], {"variants": {"a": {"of": "oaa", "classifiers": {"accumulate": {"cells": 5}}}}})
    raw["rows"] = ["oaa_plus", "a"]
    assert "a" in validate(raw).classifiers
    assert vars(validate(raw)).keys() == vars(validate(read([ROOT / "params.yaml"]))).keys()
    without = {**merge(raw, {"variants": {"a": None}}), "rows": ["oaa_plus"]}
    assert "a" not in validate(without).classifiers


def test_a_share_of_the_images_trains_for_as_many_steps() -> None:
    training = Training(batch_size=8, lr=0.1, epochs=12, milestones=(10,))
    assert (training.on_share(0.2).epochs, training.on_share(0.2).milestones) == (60, (50,))
    assert training.on_share(1.0) == training
    steps = Training(batch_size=8, lr=0.1, iterations=100)
    assert steps.on_share(0.2) == steps


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    ids = [f"image{number}" for number in range(100)]
    small, large = (chosen(ids, count, 3, Purpose.SHARE) for count in (20, 50))
    assert (len(small), len(large)) == (20, 50)
    assert small < large
    assert small != chosen(ids, 20, 4, Purpose.SHARE) != chosen(ids, 20, 4, Purpose.MIXTURE)


def test_the_network_trains_on_the_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images outside of the share are never read: here, their labels are missing."""
    monkeypatch.chdir(tmp_path)
    raw = {**small_params(), "rows": ["few"], "first": [], "method": "few"}
    raw["variants"] = {"few": {"of": "cam", "segmentations": {"share": 0.5}}}
    Path("params.yaml").write_text(json.dumps(raw))
    run_stages(["params.yaml"], until="pseudo_labels cam")
    job = Graph(load([Path("params.yaml")])).find("segmentation", "few")
    ids = list(Index(job.inputs["index"]).images("train").ids)
    kept = chosen(ids, round(len(ids) / 2), raw["seed"], Purpose.SHARE)
    store = RasterStore(job.inputs["labels"])
    labels = {name: store.get(name) for name in kept}
    with RasterWriter(Path("half.h5"), "labels") as writer:
        for name, raster in labels.items():
            writer.append(name, raster)
    Path("half.h5").replace(job.inputs["labels"])
    manifest.write(job.inputs["labels"].parent, stage="", outputs={"labels.h5": sha256(job.inputs["labels"])})
    execute(job, segmentation.main, Runtime(device="cpu", threads=1))
    log = json.loads(job.outputs["log"].read_text())
    assert 0 < len(kept) < len(ids)
    assert log["steps"][-1]["step"] >= 1
