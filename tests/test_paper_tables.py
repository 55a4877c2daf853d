"""The papers' tables as run: claims, the page with the paper's figures beside ours, the plan, and the list of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import references
from pipeline.config.params import load
from pipeline.config.tables import Claim, PlannedTable
from pipeline.report import paper_table
from pipeline.workflow import cost, table_list
from pipeline.workflow.graph import Graph
from pipeline.workflow.snakemake import Plan
from tests import project
from tests.browser import visiting
from tests.faults import TABLES, small_params
from tests.project import ROOT
from tests.tables import planned

FIGURES = {
    "a": {"miou": 60.0},
    "b": {"miou": 58.5},
    "c": {"miou": 58.6},
    "d": {},
    "e": {"first": 1.0, "half": 3.0, "last": 4.0},
    "f": {"first": 1.0, "half": 0.5, "last": 4.0},
}


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        ({"above": ["a", "b"]}, True),
        ({"above": ["a", "b"], "by": 1.5}, True),
        ({"above": ["a", "b"], "by": 1.6}, False),
        ({"above": ["a", "c", "b"]}, True),
        ({"above": ["a", "b", "c"]}, False),
        ({"above": ["b", "a"]}, False),
        ({"above": ["a", "d"]}, None),
        ({"best": "a"}, True),
        ({"best": "a", "by": 1.5}, False),
        ({"best": "b", "by": -1.5}, True),
        ({"best": "b", "by": -1.4}, False),
        ({"best": "c"}, False),
        ({"within": ["b", "c"], "by": 0.1}, True),
        ({"within": ["a", "b", "c"], "by": 1.4}, False),
        ({"rising": "e"}, True),
        ({"rising": "f"}, False),
        ({"rising": "a"}, None),
        ({"slowing": "e"}, True),
        ({"slowing": "f"}, False),
    ],
)
def test_claims_are_checked(claim: dict[str, Any], holds: bool | None) -> None:
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in claim.items()}
    tested = paper_table.check(Claim("text", "miou", **lists), ["a", "b", "c"], FIGURES)
    assert (None if tested is None else tested[0]) is holds


def test_rows_that_are_the_same_network_do_not_test_that_they_are_close() -> None:
    claim = Claim("text", "miou", within=("a", "b"), by=1.0)
    table = PlannedTable("OAA", "Table 1", "t", "VOC", (), {}, {}, claims=(claim,), chains={})
    same, close = {"a": {"miou": 58.6012}, "b": {"miou": 58.6012}}, {"a": {"miou": 58.6012}, "b": {"miou": 58.6013}}
    assert [paper_table.outcomes(table, seeds)[0].seeds for seeds in ([same], [close], [same, close])] == [0, 1, 1]


def test_outcomes_count_seeds() -> None:
    table = PlannedTable(
        "OAA", "Table 1", "t", "VOC", (), {}, {}, claims=(Claim("text", "miou", above=("a", "b")),), chains={}
    )
    seeds = [FIGURES, {"a": {"miou": 1.0}, "b": {"miou": 2.0}}, {"a": {"miou": 3.0}, "b": {"miou": 2.0}}]
    (outcome,) = paper_table.outcomes(table, seeds)
    assert (outcome.holds, outcome.seeds, outcome.verdict) == (2, 3, "holds in 2 of 3 seeds")
    assert outcome.figures == "a 60.0, b 58.5: +1.5"
    (single,) = paper_table.outcomes(table, seeds[:1])
    assert single.verdict == "holds"
    (nothing,) = paper_table.outcomes(table, [{}])
    assert nothing.verdict == "not measured"


ROWS = {
    "cam": {"text": ["CAM"], "published": {"recall": 36.7, "train": 41.0}},
    "oaa": {"text": ["OAA"], "published": {"recall": 52.3}},
    "both": {"text": ["CAM and OAA"], "rows": {"recall": "oaa"}, "scores": {"recall": "maps_noise"}},
    "theirs": {"text": ["SeeNet"], "published": {"recall": 40.0}, "reason": "a competitor's maps are not published"},
}
MAPS = {
    **TABLES["maps"],
    "columns": {"recall": {"score": "maps_recall", "title": "recall (%)"}, "train": {}},
    "rows": ROWS,
    "claims": [
        {"text": "Accumulation discovers more", "column": "recall", "above": ["oaa", "cam"]},
        {"text": "Both are alike", "column": "recall", "within": ["oaa", "cam"], "by": 100},
    ],
    "note": "The paper's CAM is another.",
}
GROWTH = {
    **TABLES["maps"],
    "number": "Fig. 11",
    "columns": {"first": {"score": "coverage_first"}, "last": {"score": "coverage_last"}},
    "rows": {"oaa": {"text": ["OAA"]}},
}
CLASSES = {**TABLES["maps"], "number": "Table 13", "per_class": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which three small tables have run."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        raw = {**small_params(), "rows": None, "tables": {"maps": MAPS, "growth": GROWTH, "classes": CLASSES}}
        raw["variants"] = {"oaa": {"of": "cam", "pseudo_labels": {"source": "classifiers/base"}}}
        Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        for name in raw["tables"]:
            project.run_stages(["params.yaml"], until=f"table {name}")
    return folder


def cells(html: str) -> list[list[str]]:
    """The texts of the page's first table."""
    table = re.search(r'<table class="paper">(.*?)</table>', html, re.DOTALL)
    assert table
    rows = re.findall(r"<tr>(.*?)</tr>", table[1], re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)(?:<small>.*?</small>)?</t[hd]>", row) for row in rows]


class TestPage:
    """results/EXPERIMENT/tables/NAME."""

    def page(self, finished: Path, name: str) -> str:
        return (finished / "results" / "test" / "tables" / name / "report.html").read_text()

    def test_published_and_measured_figures_stand_side_by_side(self, finished: Path) -> None:
        html = self.page(finished, "maps")
        recall = {
            row: json.loads((finished / f"results/test/evaluation/{maps}/scores.json").read_text())["recall"]
            for row, maps in {"cam": "localizations/cam", "oaa": "classifiers/base"}.items()
        }
        noise = json.loads((finished / "results/test/evaluation/classifiers/base/scores.json").read_text())["noise"]
        assert cells(html) == [
            ["row", "Strategy", "recall (%)", "recall (%)", "train"],
            ["cam", "CAM", "36.7", f"{100 * recall['cam']:.1f}", "41.0"],
            ["oaa", "OAA", "52.3", f"{100 * recall['oaa']:.1f}", "–"],
            ["both", "CAM and OAA", "–", f"{100 * noise:.1f}", "–"],
            ["", "SeeNet", "40.0", "–", "–"],
        ]
        assert re.findall(r"<th [^>]*>recall \(%\)<small>(.*?)</small>", html) == ["published", "measured here"]
        assert "SeeNet is not measured: a competitor&#39;s maps are not published." in html
        assert "Jiang et al., Online Attention Accumulation, Table 11" in html
        assert "The published figures are for VOC." in html
        assert "The paper&#39;s CAM is another." in html

    def test_each_claim_has_its_outcome(self, finished: Path) -> None:
        html, folder = self.page(finished, "maps"), finished / "results/test/tables/maps"
        record = json.loads((folder / "table.json").read_text())
        figures = record["figures"]["1"]
        holds = figures["oaa"]["recall"] > figures["cam"]["recall"]
        assert [(claim["claim"], claim["holds"], claim["seeds"]) for claim in record["claims"]] == [
            ("Accumulation discovers more", int(holds), 1),
            ("Both are alike", 1, 1),
        ]
        verdicts = re.findall(r'<tr class="(\w+)"><td><b>(.*?)</b>', html)
        assert verdicts == [("holds", "holds") if holds else ("fails", "does not hold"), ("holds", "holds")]

    def test_it_says_on_what_it_was_measured(self, finished: Path) -> None:
        html = self.page(finished, "maps")
        assert "<h2>Measured here on</h2>" in html
        assert "train: 6 images" in html or re.search(r"train: \d+ images, \d+ with masks", html)
        assert "fp32" in html

    def test_attention_is_drawn_by_epoch(self, finished: Path) -> None:
        assert "Share of object pixels that cumulative attention has discovered" in self.page(finished, "growth")
        assert "Evolution of attention" not in self.page(finished, "maps")

    def test_a_table_by_class_has_a_column_for_each(self, finished: Path) -> None:
        heading, published, own = cells(self.page(finished, "classes"))
        classes = (finished / "data/demo/classes.txt").read_text().split()
        assert heading == ["row", "", *classes, "recall"]
        assert published == ["CAM", "published", *["–"] * len(classes), "36.7"]
        assert (own[:2], len(own)) == (["cam", "measured here"], len(classes) + 3)

    @pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
    def test_a_browser_shows_it_whole(self, finished: Path, width: int, scheme: str) -> None:
        """Without a fault, without a request to the network, and no wider than the window."""
        with visiting(finished / "results/test/tables/maps/report.html", width=width, scheme=scheme) as visit:
            assert visit.page.locator("table.paper tr").count() == 5
            assert visit.page.locator("table.paper td.measured").first.is_visible()
            assert visit.page.locator("table.claims td").count() == 4
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            assert visit.faults == []

    def test_rows_stand_side_by_side_if_the_paper_prints_them_so(self, finished: Path) -> None:
        params = load([finished / "params.yaml"])
        across = PlannedTable(**{**vars(planned(params, "maps")), "across": True})
        upright = paper_table.grid(planned(params, "maps"), [{}])
        assert paper_table.grid(across, [{}]) == [list(column) for column in zip(*upright, strict=True)]


def test_a_claim_is_counted_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed has its own figures; the table shows their mean and range."""
    monkeypatch.chdir(tmp_path)
    raw = {**small_params(), "rows": None, "seeds": [1, 2], "tables": {"maps": MAPS}}
    raw["variants"] = {"oaa": {"of": "cam", "pseudo_labels": {"source": "classifiers/base"}}}
    Path("params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    project.run_stages(["params.yaml"], until="table maps")
    folder = Path("results/test/tables/maps")
    record = json.loads((folder / "table.json").read_text())
    recall = {seed: figures["cam"]["recall"] for seed, figures in record["figures"].items()}
    assert recall.keys() == {"1", "2"}
    assert recall["1"] != recall["2"]
    own = json.loads(Path("results/test/seed_2/evaluation/localizations/cam/scores.json").read_text())["recall"]
    assert recall["2"] == pytest.approx(100 * own, abs=1e-3)
    assert [claim["seeds"] for claim in record["claims"]] == [2, 2]
    assert record["claims"][1]["holds"] == 2
    html = (folder / "report.html").read_text()
    assert "holds in 2 of 2 seeds" in html
    low, high = sorted(recall.values())
    assert f"{(low + high) / 2:.1f}<small>{low:.1f} to {high:.1f}</small>" in html


class TestPlan:
    """What a run of tables does before it begins."""

    def test_it_says_what_it_costs(self, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(finished)
        graph = Graph(load([Path("params.yaml")]))
        trainings = [job for job in graph.jobs if job.stage == "classifier"]
        assert list(cost.announcement(graph, [])) == [
            "tables maps, growth, classes: 1 training (1 classifier); none of them to be run"
        ]
        first, second = cost.announcement(graph, trainings)
        assert first.endswith("1 of them to be run")
        assert second == "no training of test has been timed"

    def test_it_names_the_machine_of_the_times(self) -> None:
        graph = Graph(load([ROOT / "params.yaml", ROOT / "profiles/tables/oaa_4.yaml"]))
        first, second = cost.announcement(graph, graph.jobs)
        assert first == "tables oaa_4: 11 trainings (2 classifier, 3 refinement, 6 segmentation); 11 of them to be run"
        assert second == (
            "about 4 min of one core, or 2 min on 2 cores, if each takes as long as on two cores of an AMD EPYC with "
            "AVX-512 (docs/RESULTS.md)"
        )
        assert list(cost.announcement(Graph(load([ROOT / "params.yaml"])), [])) == []

    def test_the_tables_are_the_targets(self) -> None:
        graph = Graph(load([ROOT / "params.yaml", ROOT / "profiles/tables/oaa_4.yaml"]))
        targets = Plan(graph, [], outdated=graph.jobs).targets
        assert "results/demo/tables/oaa_4/manifest.json" in targets
        assert "results/demo/manifest.json" not in targets
        assert len(targets) == len(graph.jobs)

    def test_tables_share_what_the_profile_trains(self) -> None:
        demo, table = (
            {job.label: job for job in Graph(load([ROOT / "params.yaml", *more])).jobs}
            for more in ([], [ROOT / "profiles/tables/oaa_4.yaml"])
        )
        shared = {"classifier base", "refinement oaa_plus", "segmentation oaa_plus", "prediction cam"}
        assert shared <= demo.keys() & table.keys()
        for label in shared:
            assert (demo[label].outputs, demo[label].params) == (table[label].outputs, table[label].params)
        assert references.rows(load([ROOT / "params.yaml", ROOT / "profiles/tables/oaa_4.yaml"])).keys() == {
            "cam",
            "oaa_average",
            "oaa",
            "oaa_plus_cross_entropy",
            "oaa_plus_enhance",
            "oaa_plus",
        }


class TestList:
    """docs/TABLES.md."""

    def test_it_is_up_to_date(self) -> None:
        """Run: python -m pipeline.workflow.table_list > docs/TABLES.md"""
        assert (ROOT / "docs" / "TABLES.md").read_text() == table_list.document()

    def test_measured_outcomes_are_recorded(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(finished)
        monkeypatch.setattr(table_list, "OUTCOMES", tmp_path / "outcomes.json")
        assert "Not measured on the demo: agen_1, agen_2, " in table_list.document()
        table_list.record("test", "Commit abc.")
        text = table_list.document()
        assert re.search(r"\*\*On test\*\*, \d of \d measured claims of \d tables? hold\. Commit abc\.", text)
        assert re.search(
            r"\| OAA Table 11 \| Both are alike \| holds \| oaa [\d.]+, cam [\d.]+: they differ by [\d.]+ \|", text
        )
