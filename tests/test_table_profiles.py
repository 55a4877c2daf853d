"""The papers' tables as params: each lies on every profile and holds the paper's figures, and faults are named."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import load, read, validate
from pipeline.config.tables import Score, Table, step
from pipeline.errors import PipelineError
from pipeline.report import metrics, paper_table
from pipeline.workflow.graph import Graph
from tests.faults import TABLES
from tests.project import ROOT
from tests.tables import planned

FILES = sorted((ROOT / "profiles" / "tables").glob("*.yaml"))
BENEATH = {"demo": [], "voc12_mini": ["voc12_mini"], "voc2012": ["voc2012"], "small": ["voc2012", "voc2012_small"]}
PAPERS = ROOT.parent / "shared" / "papers"
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def beneath(profile: str) -> list[Path]:
    return [ROOT / "params.yaml", *(ROOT / "profiles" / f"{name}.yaml" for name in BENEATH[profile])]


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
