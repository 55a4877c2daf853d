"""The papers' tables: one profile lies on every other, and the report shows the paper's figures beside ours."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import references
from pipeline.config.params import load, read, validate
from pipeline.config.schema import Params
from pipeline.config.tables import Claim, PlannedTable, Score, Table, step
from pipeline.errors import PipelineError
from pipeline.report import metrics, paper_table
from pipeline.workflow import cost, table_list
from pipeline.workflow.graph import Graph
from pipeline.workflow.snakemake import Plan
from tests import project
from tests.browser import visiting
from tests.faults import TABLES, small_params
from tests.project import ROOT

FILES = sorted((ROOT / "profiles" / "tables").glob("*.yaml"))
BENEATH = {"demo": [], "voc12_mini": ["voc12_mini"], "voc2012": ["voc2012"], "small": ["voc2012", "voc2012_small"]}
PAPERS = ROOT.parent / "shared" / "papers"
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def beneath(profile: str) -> list[Path]:
    return [ROOT / "params.yaml", *(ROOT / "profiles" / f"{name}.yaml" for name in BENEATH[profile])]


def planned(params: Params, name: str) -> PlannedTable:
    table = params.tables[name]
    assert isinstance(table, PlannedTable)
    return table


def table_of(file: Path) -> Table:
    return load([ROOT / "params.yaml", file]).tables[file.stem]


class TestFiles:
    """profiles/tables."""

    @each_file
    @pytest.mark.parametrize("profile", BENEATH)
    def test_it_lies_on_every_profile(self, file: Path, profile: str) -> None:
        params = load([*beneath(profile), file], resolve=True)
        table = planned(params, file.stem)
        assert params.experiment == load(beneath(profile)).experiment  # what tables share is trained once
        assert table.chains.keys() == table.steps.keys()
        graph = Graph(params)
        assert {job.stage for job in graph.jobs} >= {"table", "evaluation", "index"}
        assert {job.stage for job in graph.jobs}.isdisjoint({"report", "features"})
        for row, chain in table.chains.items():
            assert chain.keys() == table.steps[row]

    @pytest.mark.parametrize("profile", ["demo", "voc12_mini", "voc2012"])
    def test_all_are_planned_on_a_tree(self, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the dataset, its saliency maps and the weights lie, no file is missing."""
        names = ("mobilenet_v2_imagenet", "tf_efficientnet_lite2")
        weights = [Path(f"../shared/weights/{name}_fp16.pth") for name in names]
        shared = tmp_path / "shared"
        for folder in ("data/voc12_mini/Saliency", "weights"):
            (shared / folder).mkdir(parents=True)
        (tmp_path / "project" / "data" / "voc2012" / "Saliency").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "project")
        for file in weights:
            file.touch()
        graph = Graph(load([*beneath(profile), *FILES]))
        assert graph.missing() == []
        tables = [job for job in graph.jobs if job.stage == "table"]
        assert [job.name for job in tables] == [file.stem for file in FILES]
        assert len({job.folder for job in graph.jobs}) == len(graph.jobs)
        for file in weights:
            file.unlink()
        faults = Graph(load([*beneath(profile), *FILES])).missing()
        assert [fault.partition(": missing (")[0] for fault in faults] == (
            [str(file) for file in weights] if profile == "voc12_mini" else []
        )

    @each_file
    def test_it_holds_one_table_and_no_setting_of_a_profile(self, file: Path) -> None:
        raw = yaml.safe_load(file.read_text())
        assert list(raw["tables"]) == [file.stem]
        assert raw["rows"] is None
        assert raw.keys() <= {"rows", "variants", "tables", "mixtures", "segmentations"}
        assert all(
            block.keys() <= {"labels", "share"}
            for key in ("mixtures", "segmentations")
            for block in raw.get(key, {}).values()
        )

    def test_variants_of_one_name_are_the_same(self) -> None:
        """Profiles are merged, and the tables of a dataset share their results."""
        known: dict[str, Any] = {}
        for file in FILES:
            raw = yaml.safe_load(file.read_text())
            for name, variant in {**raw.get("variants", {}), **raw.get("mixtures", {})}.items():
                assert known.setdefault(name, variant) == variant, f"{file.name}: {name}"

    def test_all_together_are_valid(self) -> None:
        params = load([ROOT / "params.yaml", *FILES])
        assert list(params.tables) == [file.stem for file in FILES]

    @each_file
    def test_figures_are_those_of_the_paper(self, file: Path) -> None:
        table = table_of(file)
        text = PAPERS / f"{table.paper.lower()}.txt"
        if not text.exists():
            pytest.skip(f"{text} is missing: the papers are not part of the project")
        content = text.read_text()
        for name, row in table.rows.items():
            for column, figure in row.published.items():
                printed = rf"(?<![\d.]){re.escape(f'{figure:.3f}'.rstrip('0'))}0*(?![\d]|\.\d)"
                assert re.search(printed, content), f"{name}.{column}: {figure:g}"

    @each_file
    def test_the_papers_claims_hold_for_its_figures(self, file: Path) -> None:
        table = table_of(file)
        for claim in table.claims:
            figures = {row: table.rows[row].published for row in table.measured}
            if any(figures[row] for row in claim.rows):  # Fig. 11 has curves alone
                tested = paper_table.check(claim, table.measured, figures)
                assert tested, claim.text
                assert tested[0], f"{claim.text}: {tested[1]}"


class TestParams:
    """The section ``tables``."""

    def params(self, **changes: Any) -> dict[str, Any]:
        table = {**TABLES["maps"], **changes}
        return {**read([ROOT / "params.yaml"]), "rows": None, "tables": {"maps": table}}

    def faults(self, raw: dict[str, Any]) -> list[str]:
        with pytest.raises(PipelineError) as caught:
            validate(raw)
        return [line.removeprefix("params.yaml: ") for line in caught.value.lines]

    def test_a_table_of_maps_trains_no_segmentation_network(self) -> None:
        params = validate(self.params())
        assert (set(params.segmentations), set(params.pseudo_labels)) == (set(), set())
        assert (set(params.classifiers), set(params.localizations)) == ({"base"}, {"cam"})
        assert planned(params, "maps").chains == {"cam": {"maps": "localizations/cam"}}

    def test_a_table_of_labels_ends_at_the_labels(self) -> None:
        params = validate(self.params(columns={"recall": {"score": "labels_miou"}}))
        assert (set(params.segmentations), set(params.pseudo_labels)) == (set(), {"cam"})

    def test_rows_restrict_a_table(self) -> None:
        rows = {"cam": {"text": ["CAM"]}, "oaa": {"text": ["OAA"]}}
        params = validate({**self.params(rows=rows), "rows": ["oaa", "supervised"]})
        assert list(planned(params, "maps").chains) == ["oaa"]
        lines = self.faults({**self.params(rows=rows), "rows": ["supervised"]})
        assert lines == ["rows: none of them is a row of the tables; name one of theirs, or set rows to null"]

    def test_the_profiles_other_rows_do_not_run(self) -> None:
        params = validate(self.params())
        assert {job.stage for job in Graph(params).jobs} == {
            "demo",
            "index",
            "ground_truth",
            "classifier",
            "localization",
            "evaluation",
            "table",
        }

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"rows": {"cma": {"text": ["a"]}}}, "tables.maps.rows: cma: no such row; add it (variants), or state"),
            ({"rows": {"cam": {"text": []}}}, "tables.maps.rows.cam.text: has 0 entries, but head has 1"),
            ({"rows": {}}, "tables.maps.rows: is empty"),
            (
                {"rows": {"cam": {"text": ["a"], "published": {"recal": 1}}}},
                "tables.maps.rows.cam: no column is named recal; did you mean recall?",
            ),
            ({"paper": "SEAM"}, "tables.maps.paper: 'SEAM' is none of OAA, DRS, AMR, EDAM, AGEN"),
            ({"columns": {"recall": {"score": "recall"}}}, "tables.maps.columns.recall.score: 'recall' is none of"),
            (
                {"claims": [{"text": "t", "column": "recall", "best": "cma"}]},
                "tables.maps.claims[0]: cma is no measured row of the table; did you mean cam?",
            ),
            (
                {"claims": [{"text": "t", "column": "noise", "best": "cam"}]},
                "tables.maps.claims[0].column: no column is named noise",
            ),
            (
                {"claims": [{"text": "t", "column": "recall"}]},
                "tables.maps.claims[0]: set exactly one of above, best, within, rising, slowing",
            ),
            (
                {"claims": [{"text": "t", "best": "cam"}]},
                "tables.maps.claims[0].column: must be set for above, best and within, and for these alone",
            ),
            (
                {"claims": [{"text": "t", "column": "recall", "above": ["cam"]}]},
                "tables.maps.claims[0].above: must name at least two rows",
            ),
        ],
    )
    def test_faults_are_named(self, changes: dict[str, Any], fault: str) -> None:
        lines = self.faults(self.params(**changes))
        assert any(line.startswith(fault) for line in lines), lines

    def test_every_score_of_metrics_json_can_be_a_column(self) -> None:
        scores = Score.__args__  # type: ignore[attr-defined]
        assert {column.key for column in metrics.COLUMNS} < set(scores)
        assert {column.key: column.step for column in metrics.COLUMNS} == {
            score: step(score) for score in scores if not score.startswith("coverage_")
        }


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
