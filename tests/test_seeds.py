"""Several seeds of one experiment: one plan, one folder each, one report on all of them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import params as parameters
from pipeline.config.stage_table import STAGES
from pipeline.errors import PipelineError
from pipeline.report import seeds
from pipeline.runtime import Runtime
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.snakemake import Plan
from pipeline.workflow.stage import Work
from stages import report
from tests import drawn, project
from tests.test_definitions import check_dvc, check_dvc_report, essence, planned, snakemake_rules, stages_of
from tests.test_orchestration import commit, edit, reproduced, shrink
from tests.test_orchestration import planned as to_run

PARAMS = project.ROOT / "params.yaml"
ONCE = {name for name, stage in STAGES.items() if not stage.has_many_jobs} | {"features"}


def graph_of(*numbers: int) -> Graph:
    return Graph(parameters.load([PARAMS], {"seeds": list(numbers) or None}))


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ([], ["seeds: is empty; list seeds, such as [1, 2], or leave it out"]),
        ([2, 3], ["seeds: must contain seed, 1, whose results lie in results/demo; add it"]),
        (
            [2, 2, 3, 3],
            [
                "seeds: must contain seed, 1, whose results lie in results/demo; add it",
                "seeds: 2 is listed more than once; each seed is run once",
                "seeds: 3 is listed more than once; each seed is run once",
            ],
        ),
        (
            [1, -1, True, 2.5, "3", None],
            [
                "seeds[1]: -1 must be at least 0",
                "seeds[2]: must be a whole number, not True",
                "seeds[3]: must be a whole number, not 2.5",
                "seeds[4]: must be a whole number, not '3'",
                "seeds[5]: must be a whole number, not null",
            ],
        ),
        (3, ["seeds: must be a list, not 3"]),
        ("1, 2", ["seeds: must be a list, not '1, 2'"]),
        ([1, 2**32], [f"seeds[1]: {2**32} must be at most {2**32 - 1}"]),
    ],
)
def test_wrong_seeds_are_refused_in_a_line_each(value: Any, lines: list[str]) -> None:
    with pytest.raises(PipelineError) as caught:
        parameters.load([PARAMS], {"seeds": value})
    assert list(caught.value.lines) == [f"{PARAMS}: {line}" for line in lines]


def test_each_seed_has_all_jobs_but_those_that_depend_on_none() -> None:
    graph, alone = graph_of(1, 2, 3), graph_of()
    jobs = Counter(job.stage for job in graph.jobs)
    expected = Counter(job.stage for job in alone.jobs)
    assert jobs == {stage: count if stage in ONCE else 3 * count for stage, count in expected.items()}
    outputs = [path for job in graph.jobs for path in job.outputs.values()]
    assert len(outputs) == len(set(outputs))
    assert len({job.label for job in graph.jobs}) == len(graph.jobs)
    for job in graph.jobs:
        if job.stage not in ONCE:
            others = {writer.prefix for writer in job.writers.values() if writer.stage not in ONCE}
            assert others <= {job.prefix}, job.label
        if "seed" in job.params and job.stage not in ("report", "first_report"):
            assert job.params["seed"] == int(job.prefix[5:-1] or 1), job.label


def jobs_of(graph: Graph) -> dict[str, tuple[Any, ...]]:
    return {job.label: essence(job) for job in graph.jobs if job.stage != "report"}


def test_a_further_seed_changes_no_job_of_the_others() -> None:
    alone, two = jobs_of(graph_of()), jobs_of(graph_of(1, 2))
    assert two.items() >= alone.items()
    for more in (graph_of(1, 2, 3), graph_of(0, 1, 2), graph_of(2, 1, 0)):
        assert jobs_of(more).items() > two.items()


def test_the_folder_of_a_further_seed_is_laid_out_like_an_experiment() -> None:
    graph = graph_of(1, 2)
    alone = {path.relative_to(graph.results) for job in graph_of().jobs for path in job.files if job.stage not in ONCE}
    root = graph.results / "seed_2"
    assert {path.relative_to(root) for job in graph.jobs if job.prefix for path in job.files} == alone


def test_a_job_of_a_further_seed_is_started_by_its_name() -> None:
    graph = graph_of(1, 2)
    job = graph.find("evaluation", "seed_2/predictions/oaa")
    assert job.label == "evaluation seed_2/predictions/oaa"
    assert job.inputs["labels"] == Path("results/demo/seed_2/predictions/oaa/labels.h5")
    with pytest.raises(PipelineError, match=r"classifier seed_3/base: no such block; .* seed_2/base"):
        graph.find("classifier", "seed_3/base")


def test_the_first_seed_comes_first() -> None:
    graph = graph_of(3, 1, 2)
    prefixes = [job.prefix for job in graph.jobs]
    assert list(dict.fromkeys(prefixes)) == ["", "seed_3/", "seed_2/"]
    plan = Plan(graph, [], outdated=graph.jobs)

    def priority(job: Job) -> int:
        return int(plan.priority(STAGES[job.stage])(Wildcards(job)))

    order = {(job.prefix, job in graph.first): priority(job) for job in graph.jobs if job.stage not in ONCE}
    assert order == {("", True): 3, ("", False): 2, ("seed_3/", False): 1, ("seed_2/", False): 0}


def test_a_table_of_a_paper_reads_every_seed() -> None:
    files = [PARAMS, project.ROOT / "profiles/tables/oaa_4.yaml"]
    alone, graph = (Graph(parameters.load(files, {"seeds": seeds})) for seeds in (None, [1, 2]))
    (table,) = (job for job in graph.jobs if job.stage == "table")
    scores = {name for name in alone.find("table", table.name).inputs if name.startswith("scores of ")}
    assert scores
    further = {f"scores of seed_2/{name.removeprefix('scores of ')}" for name in scores}
    assert {name for name in table.inputs if name.startswith("scores of ")} == scores | further
    assert all(name in table.writers for name in scores | further)
    assert table.params["seeds"] == [1, 2]
    trained = [job.name for job in alone.jobs if STAGES[job.stage].trains]
    assert sorted(job.name for job in graph.jobs if STAGES[job.stage].trains) == sorted(2 * trained)


class Wildcards:
    def __init__(self, job: Job) -> None:
        self.seed, self.name = job.prefix, job.name


def test_snakemake_and_dvc_state_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project.copy(tmp_path / "project", git=False)
    monkeypatch.chdir(folder)
    unfit = f"dvc.yaml: does not describe the seeds of params.yaml; {dvc.GENERATE}"
    assert dvc.seeds_fault() is None
    with Path("params.yaml").open("a") as file:
        file.write("seeds: [1, 2, 3]\n")
    assert dvc.seeds_fault() == unfit
    assert f"error: {unfit}" in project.run(folder, "dvc", "repro", "rows", check=False)
    Path("dvc.yaml").write_text(dvc.document())
    assert dvc.seeds_fault() is None
    graph = graph_of(1, 2, 3)
    stages = stages_of(folder)
    check_dvc(graph, stages)
    check_dvc_report(graph, stages)
    further = [stage.keys for name, stage in stages.items() if "_seed_" in name]
    assert further
    assert not any("seed" in keys for keys in further)
    assert snakemake_rules(folder, [Path("params.yaml")]) == planned(graph)
    edit(folder, lambda params: params.pop("seeds"))
    assert dvc.seeds_fault() == unfit


@pytest.mark.slow
def test_a_seed_is_added_and_nothing_else_runs_again(tmp_path: Path) -> None:
    """With Snakemake, by hand and DVC; a run that was broken off goes on; metrics are compared across commits."""
    folder = project.copy(tmp_path / "project", git=True)
    edit(folder, shrink)
    project.run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    project.run(folder, "snakemake", "--quiet", "all")
    commit(folder, "One seed")
    model = folder / "results/demo/classifiers/base/model.pt"
    before = model.read_bytes()

    expected = to_run(folder, "--config", "seeds=[2,1]")
    assert {"classifier_seed_2@base", "evaluation_segmentations_seed_2@oaa", "report"} <= expected
    assert all("_seed_2" in name for name in expected - {"report"})
    edit(folder, lambda params: params.update(seeds=[1, 2]))
    commands = project.run(folder, "python", "-m", "pipeline.workflow.graph")
    assert "python -m stages.classifier seed_2/base --params params.yaml" in commands
    project.run(folder, "python", "-m", "stages.classifier", "seed_2/base")
    other = folder / "results/demo/seed_2/classifiers/base/model.pt"
    assert other.read_bytes() != before
    assert to_run(folder) == expected - {"classifier_seed_2@base"}
    (folder / "dvc.yaml").write_text(project.run(folder, "python", "-m", "pipeline.workflow.dvc"))
    done = reproduced(folder)
    assert all("_seed_2" in name for name in done - {"report"})
    assert "segmentation_seed_2@oaa" in done
    assert to_run(folder) == set()
    assert model.read_bytes() == before
    commit(folder, "Two seeds")

    table = json.loads((folder / "results/demo/metrics.json").read_text())
    assert table["oaa"]["seeds"].keys() == {"1", "2"}
    changed = json.loads(project.run(folder, "dvc", "metrics", "diff", "HEAD~1", "--json"))
    file = changed["results/demo/metrics.json"]
    assert file["oaa.maps_recall"]["new"] == pytest.approx(table["oaa"]["maps_recall"], abs=1e-6)
    assert file["oaa.seeds.1.maps_recall"]["new"] == pytest.approx(file["oaa.maps_recall"]["old"])

    arguments = ("-m", "pipeline.workflow.reproduce", "--config", "seeds=[1,2,0]")
    shown = project.run(folder, "python", *arguments)
    assert re.search(r"^seed_0/predictions/oaa on 4 evaluation images: miou", shown, re.MULTILINE)
    assert "base: done" in shown
    assert "seed_2" not in shown
    edit(folder, lambda params: params.update(seeds=[1, 2, 0], gallery=1))
    noted = project.run(folder, "snakemake", "--quiet", "all")
    fault = f"dvc.yaml: does not describe the seeds of params.yaml; {dvc.GENERATE}"
    assert f"note: DVC did not record this run: {fault}" in noted
    (folder / "wsss").symlink_to(project.ROOT / "wsss")
    exported = project.run(folder, "python", "-m", "wsss", "export", "demo/seed_2/oaa", "--formats", "png")
    assert "16 photos" in exported
    scores = project.run(folder, "python", "-m", "pipeline.report.per_class", "results/demo/seed_2")
    assert re.search(r"^predictions/oaa,iou,", scores, re.MULTILINE)


def runs_of(values: dict[str, list[float | None]]) -> seeds.Runs:
    """Runs of as many seeds as there are values of the final mIoU of each row."""
    count = len(next(iter(values.values())))
    scores = [{row: {"miou": v} for row, found in values.items() if (v := found[n]) is not None} for n in range(count)]
    return {n + 1: seeds.Run({}, {}, {row: entry.get(row, {}) for row in values}) for n, entry in enumerate(scores)}


def test_orderings_are_stated_where_all_seeds_agree() -> None:
    runs = runs_of({"a": [0.5, 0.6, 0.7], "b": [0.65, 0.4, 0.6], "c": [0.3, 0.4, 0.2], "d": [0.9, None, 0.9]})
    (ranking,) = seeds.rankings({row: {"predictions": ""} for row in "abcd"}, runs)
    assert ranking.title == "Final mIoU of the segmentation"
    assert ranking.seeds == [1, 2, 3]
    assert [row.name for row in ranking.rows] == ["a", "b", "c"]  # d has no score in seed 2
    assert [row.undecided for row in ranking.rows] == [[("b", 2)], [("c", 2)], []]  # a tie is not above
    assert ranking.rows[0].values == ["50.0", "60.0", "70.0"]
    assert (ranking.rows[0].mean, str(ranking.rows[0].range)) == ("60.0", "50.0–70.0")


def test_one_seed_has_neither_ranges_nor_rankings() -> None:
    runs = runs_of({"a": [0.5], "b": [0.6]})
    assert seeds.means(runs) is runs[1].metrics
    assert seeds.ranges(runs) == {}
    assert seeds.rankings({"a": {"predictions": ""}, "b": {"predictions": ""}}, runs) == []
    assert seeds.table(runs) == {"a": {"miou": 0.5}, "b": {"miou": 0.6}}


def test_a_mean_takes_the_seeds_that_have_the_score() -> None:
    runs = runs_of({"a": [0.5, None, 0.6]})
    assert seeds.means(runs) == {"a": {"miou": 0.55}}
    assert seeds.ranges(runs) == {"a": {"miou": (0.5, 0.6)}}


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The report's job of an experiment with the seeds 3 and 7, whose row ``cam`` is better with seed 7."""
    monkeypatch.chdir(tmp_path)
    job = drawn.experiment({**drawn.RAW, "seeds": [7, 3]}).find("report")
    path = job.inputs["scores of seed_7/predictions/cam"]
    scores = json.loads(path.read_text())
    scores |= {"miou": 0.75, "iou": scores["iou"] | {"circle": 1.0}, "arithmetic": [drawn.OTHER]}
    path.write_text(json.dumps(scores))
    log = job.inputs["log of seed_7/segmentations/oaa"]
    log.write_text(json.dumps(json.loads(log.read_text()) | {"warning": "learns nothing"}))
    write(job)
    return job


def write(job: Job) -> None:
    report.main(Work(job, job.inputs, job.outputs, Runtime(), "key", Path("checkpoint")))


def test_the_report_shows_means_ranges_and_orderings(several: Job, capsys: pytest.CaptureFixture[str]) -> None:
    html = several.outputs["report"].read_text()
    table = json.loads(several.outputs["table"].read_text())
    cam, oaa = table["cam"], table["oaa"]
    first = cam["seeds"]["3"]["miou"]
    mean = (first + 0.75) / 2
    assert cam["miou"] == pytest.approx(mean, abs=1e-6)
    assert (cam["least"]["miou"], cam["most"]["miou"]) == (first, 0.75)
    assert cam["seeds"]["7"] == {**cam["seeds"]["3"], "miou": 0.75}
    assert oaa["least"] == oaa["most"]
    low, high = f"{100 * first:.1f}", "75.0"
    cell = f'title="seed 3: {low}, seed 7: {high}">{100 * mean:.1f}<small>{low}–{high}</small>'
    assert cell in html
    assert "Each is the mean over the seeds 3, 7" in html
    section = html.partition('<section id="seeds">')[2].partition("</section>")[0]
    ranked = section.partition("</details>")[0]
    assert re.findall(r'scope="col"[^>]*>([\w ]+)', ranked)[:5] == ["Method", "seed 3", "seed 7", "mean", "range"]
    places = re.findall(r'<th scope="row">(\w+)</th>', ranked)
    assert places == sorted(table, key=lambda row: -table[row]["miou"])
    assert "<span>oaa (1 of 2)</span>" in ranked  # cam is above oaa with seed 7 only
    assert "learns nothing" in html
    assert "segmentations/oaa (seed 7)" in html
    assert "<dt>Seeds</dt><dd>3, 7</dd>" in html
    assert f"{drawn.KIND} / training: {drawn.KIND}. Inference: {drawn.OTHER}" in html
    assert "computed in different arithmetic" in html
    assert html.count("<s class=") == 3 + 3 + 3 + 3 + 1  # steps of each row
    top = json.loads(several.outputs["metrics"].read_text())
    assert top == {"method": "oaa_plus", "iou": top["iou"], **table["oaa_plus"]}
    write(several)
    last = capsys.readouterr().out.splitlines()
    assert "means over the seeds 3, 7; the last column is the range of the final mIoU" in last
    assert any(line.startswith("  cam ") and line.endswith(f"{low}–{high}") for line in last)


def test_pictures_and_classes_are_those_of_the_first_seed(several: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same as without further seeds."""
    html = several.outputs["report"].read_text()
    folder = Path("alone")
    folder.mkdir()
    monkeypatch.chdir(folder)
    alone = drawn.experiment(drawn.RAW).find("report").outputs["report"].read_text()
    for name in ("classes", "curves", "confusion", "from-tags-to-pseudo-labels", "predictions"):
        part = f'<section id="{name}">'
        assert html.partition(part)[2].partition("</section>")[0] == alone.partition(part)[2].partition("</section>")[0]


def test_the_main_metrics_of_several_seeds_have_the_mean_of_each_class() -> None:
    chain = {"a": {"predictions": "predictions/a"}}
    scores = [
        {"predictions/a": {"iou": {"cat": 0.5, "dog": None}}},
        {"predictions/a": {"iou": {"cat": 0.7, "dog": None}}},
    ]
    runs = {seed: seeds.Run(found, {}, {"a": {}}) for seed, found in enumerate(scores)}
    assert seeds.headline("a", chain, runs)["iou"] == {"cat": 0.6}
