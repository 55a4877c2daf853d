"""What the report says of rows of every method: which maps, learned from what, labelled by which rule."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import references
from pipeline.report import protocol
from tests.drawn import LEARNER, RAW, SMALL, experiment, training_logs

CONFIDENT = {"rule": {"confident": {"high": 0.5, "low": 0.15}}}
AGEN = {
    "network": {"agen": {"shared": ["conv2", "conv2"]}},
    "backbones": {"classification": {"name": "small"}, "segmentation": {"name": "small"}},
    "training": SMALL["training"],
}
PLAIN_AGEN = {"network": {"agen": {"shared": ["conv2", "conv2"], "agm": [], "coam": [], "boundary_weight": 0}}}
WALKED: dict[str, Any] = RAW | {
    "method": "walked",
    "classifiers": {
        "base": SMALL,
        "amr": {**SMALL, "method": {"amr": {"shared": "stem"}}},
        "edam": {**SMALL, "method": "edam", "suppression": {}},
        "alone": {**SMALL, "method": {"edam": {"collaborative": False}}},
    },
    "localizations": RAW["localizations"]
    | {
        "amr": {"model": "classifiers/amr", "climbing": {"iterations": 9}},
        "edam": {"model": "classifiers/edam"},
        "alone": {"model": "classifiers/alone"},
        "agen": {"model": "one_step/agen"},
    },
    "affinities": {"base": {"labels": "pseudo_labels/confident", **SMALL}},
    "walks": {
        "once": {"affinity": "affinities/base", "maps": "classifiers/base", "times": 3, "power": 1.5},
        "twice": {"affinity": "affinities/base", "maps": "walks/once", "edge_weighting": False},
        "climbed": {"affinity": "affinities/base", "maps": "localizations/amr"},
    },
    "pseudo_labels": RAW["pseudo_labels"]
    | {
        "confident": {"source": "localizations/cam", **CONFIDENT},
        "walked": {"source": "walks/once", "rule": {"threshold": {"background": 0.4}}},
        "amr": {"source": "walks/climbed", "rule": {"threshold": {"background": "saliency"}}},
        "edam": {"source": "localizations/edam", "rule": {"edam": {"background": 0.4, "crf": {}}}},
        "alone": {"source": "localizations/alone", "rule": {"drs": {"beta": 0.06}}},
        "agen": {"source": "localizations/agen", "rule": {"oaa": {"background": {"power": 8}}}},
    },
    "one_step": {"agen": AGEN, "plain_agen": AGEN | PLAIN_AGEN},
    "segmentations": RAW["segmentations"]
    | {name: {"labels": f"pseudo_labels/{name}", **LEARNER} for name in ("walked", "amr", "edam", "alone")}
    | {"two_step": {"labels": "pseudo_labels/agen", **LEARNER}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_maps_that_walked_are_scored_and_shown(place: Path) -> None:
    experiment(WALKED)
    html = (place / "results/drawn/report.html").read_text()
    section = html.partition("<h2>From tags to pseudo labels</h2>")[2].partition("</section>")[0]
    columns = re.findall(r'<th scope="col">([\w ]+)<small>([\w/]+)', section)
    assert columns == [
        ("CAM", "localizations/cam"),
        ("Cumulative attention", "classifiers/base"),
        ("Labels of the affinities", "pseudo_labels/confident"),
        ("Walked map", "walks/once"),
        ("Pseudo label", "pseudo_labels/walked"),
    ]
    assert len(re.findall("<img", section)) == 4 * 7
    for walk in WALKED["walks"]:
        assert f'<th scope="row">walks/{walk}</th>' in html  # recall by class
        assert f'<g class="s0"><title>walks/{walk}</title>' in html  # its panel of the threshold sweep
    table = json.loads((place / "results/drawn/metrics.json").read_text())
    scores = json.loads((place / "results/drawn/evaluation/walks/once/scores.json").read_text())
    assert table["walked"]["maps_recall"] == scores["recall"]


@pytest.mark.parametrize(("method", "shown"), [("agen", "two_step"), ("plain_agen", "cam"), ("edam", "edam")])
def test_a_one_step_row_is_shown_by_the_row_that_learns_from_it(place: Path, method: str, shown: str) -> None:
    experiment(WALKED | {"method": method}, train=2, held=1, masks=False)
    html = (place / "results/drawn/report.html").read_text()
    assert f"The images of the train split show every step of {shown} from tags" in html


def test_map_columns_say_what_the_maps_are(place: Path) -> None:
    graph = experiment(WALKED, train=2, held=1, masks=False)
    params, logs = graph.params, training_logs(graph)
    assert [
        protocol.map_columns(params, name, logs) for name in ("walks/twice", "walks/climbed", "localizations/edam")
    ] == [
        {
            "CAM": "localizations/cam",
            "Cumulative attention": "classifiers/base",
            "Walked map 1": "walks/once",
            "Walked map 2": "walks/twice",
        },
        {"Recalibrated CAM, climbed": "localizations/amr", "Walked map": "walks/climbed"},
        {"Activation mask": "localizations/edam"},
    ]


def test_provenance_names_every_method_and_rule(place: Path) -> None:
    graph = experiment(WALKED, train=2, held=1, masks=False)
    params, logs = graph.params, training_logs(graph)
    told = {row: protocol.provenance(params, row, logs) for row in references.rows(params)}
    small = "small from random weights"
    affinities = (
        f"along affinities of {small}, frozen, learned from pseudo_labels/confident "
        "(localizations/cam, rule confident, constant backgrounds 0.5 and 0.15, dense CRF on (10 iterations))"
    )
    assert {row: cells["Map networks"] for row, cells in told.items()} == {
        "cam": f"CAM, {small}",
        "oaa": f"CAM, {small}",
        "oaa_plus": f"CAM, {small}; integral {small}",
        "mixed": f"CAM, {small}",
        "supervised": "none",
        "walked": f"CAM, {small}; walk of maps^1.5 of 2^3 steps (radius 5, beta 10) {affinities}",
        "amr": "AMR (Gaussian modulation of channels and positions, consistency 0.05, xi 0.5, branches share the stem)"
        f", {small}; AdvCAM's climbing (9 iterations of 0.08); walk of 2^8 steps (radius 5, beta 10) {affinities}",
        "edam": f"EDAM, collaborative attention over 2 images that share a class, {small}, DRS, learnable",
        "alone": f"EDAM without collaborative attention, {small}",
        "two_step": f"AGEN, {small}, {small}",
        "agen": "none",
        "plain_agen": "none",
    }
    assert {row: cells["Pseudo labels"] for row, cells in told.items() if row not in RAW["segmentations"]} == {
        "walked": "rule threshold, constant background 0.4, dense CRF off",
        "amr": "rule threshold, background 1 - saliency, dense CRF off",
        "edam": "rule edam, constant background 0.4, refined by saliency (theta 0.0784314, alpha 0.25, beta 0.95), "
        "dense CRF on (10 iterations)",
        "alone": "rule drs, background where saliency is below 0.06, dense CRF off",
        "two_step": "rule oaa, background (1 - strongest)^8, salient background ignored, dense CRF off",
        "agen": "on the fly, by branch A and AGM 3, 4, 5, CoAM 3, 4, 5, background (1 - strongest)^8, "
        "boundary loss with dense CRF",
        "plain_agen": "on the fly, by branch A alone, background (1 - strongest)^8",
    }
    assert told["oaa"]["Maps"] == "classifiers/base (cumulative attention)"
    assert told["cam"]["Maps"] == "classifiers/base → localizations/cam"
    assert told["walked"]["Maps"] == "classifiers/base (cumulative attention) → walks/once"
