"""What is derived from the table of stages agrees: the jobs, Snakemake's rules, dvc.yaml."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo

from pipeline.config import params as parameters
from pipeline.config.registry import CHOICES
from pipeline.config.stage_table import FOLDERS, KINDS, SECTIONS, STAGES, TRAINED, kind, sections
from pipeline.errors import PipelineError
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.snakemake import Plan, stage_file
from tests import project

PARAMS = Path("params.yaml")
RUNS = {
    "params.yaml": [PARAMS],
    "voc2012": [PARAMS, Path("profiles/voc2012.yaml")],
    "voc2012_small": [PARAMS, Path("profiles/voc2012.yaml"), Path("profiles/voc2012_small.yaml")],
    "coco_stuff": [PARAMS, Path("profiles/voc2012.yaml"), Path("profiles/coco_stuff.yaml")],
    "demo_boxes": [PARAMS, Path("profiles/demo_boxes.yaml")],
    "cub": [PARAMS, Path("profiles/voc2012.yaml"), Path("profiles/cub.yaml")],
    "voc12_mini": [PARAMS, Path("profiles/voc12_mini.yaml")],
    "voc12_mini_timm": [PARAMS, Path("profiles/voc12_mini.yaml"), Path("profiles/voc12_mini_timm.yaml")],
}


class Rule(NamedTuple):
    """One run of a rule: its name, what it reads and writes."""

    stage: str
    inputs: frozenset[str]
    outputs: frozenset[str]


def graph_of(files: list[Path]) -> Graph:
    return Graph(parameters.load([project.ROOT / file for file in files]))


def names(paths: Any) -> frozenset[str]:
    return frozenset(map(str, paths))


def planned(graph: Graph) -> set[Rule]:
    """The rules that Snakemake should have.

    A manifest replaces a dataset and the saliency maps in its folder. A job that reads only user-supplied files depends
    on its stage's file.
    """
    written = {path: path for job in graph.jobs for path in job.outputs.values()}
    home = {job.outputs["root"]: job.files[0] for job in graph.jobs if job.manifest_folder}
    written |= home | {root / "Saliency": file for root, file in home.items()}
    return {
        Rule(
            job.stage,
            names(written[path] for path in job.inputs.values() if path in written) or names([stage_file(job)]),
            names(job.files),
        )
        for job in graph.jobs
    }


def snakemake_rules(folder: Path, files: list[Path]) -> set[Rule]:
    """The jobs that a dry run prints, without the target rule."""
    command = ["snakemake", "--dry-run", "--forceall", "--cores", "1"]
    text = project.run(folder, *command, "--configfile", *map(str, files))
    found = set()
    for stage, body in re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", text, re.MULTILINE):
        listed = {key: names(value.split(", ")) for key, value in re.findall(r"^    (\w+): (.*)$", body, re.MULTILINE)}
        if stage != "all":
            found.add(Rule(stage, listed.get("input", frozenset()), listed["output"]))
    return found


@pytest.mark.parametrize("run", RUNS)
def test_snakemake_states_the_graph(run: str, tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "project", git=False)
    graph = graph_of(RUNS[run])
    dataset = graph.params.dataset
    if source := dataset.coco_stuff or dataset.cub or (None if dataset.demo or dataset.download else dataset.root):
        (folder / source / "Saliency").mkdir(parents=True)
    for path in {path for job in graph.jobs for key, path in job.inputs.items() if key.startswith("weights of")}:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    assert snakemake_rules(folder, RUNS[run]) == planned(graph)


def test_snakemake_requires_extra_images(tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "project", git=False)
    (folder / "extra.yaml").write_text("dataset: {extra: data/extra}\n")
    files = [PARAMS, folder / "extra.yaml"]
    command = ["snakemake", "--quiet", "all", "--configfile", *map(str, files)]
    refused = "error: data/extra: missing (extra of index); put the images there, or correct dataset.extra"
    assert refused in project.run(folder, *command, check=False)
    (folder / "data/extra").mkdir(parents=True)
    assert snakemake_rules(folder, files) == planned(graph_of(files))


def test_snakemake_names_each_file_that_the_user_must_supply(tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "project", git=False)
    (folder / "lacking.yaml").write_text(
        "dataset: {root: data/none, demo: null}\n"
        "saliency: {kind: store, path: data/none.h5}\n"
        "defaults: {classifiers: {backbone: {weights: data/none.pth}}}\n"
    )
    command = ["snakemake", "--quiet", "all", "--configfile", "lacking.yaml"]
    assert project.run(folder, *command, check=False).splitlines()[-3:] == [
        "error: data/none: missing (root of index); put the dataset there (data/README.md has the layout), or correct"
        " dataset.root",
        "error: data/none.h5: missing (store of saliency); put the file there, or correct saliency.path",
        "error: data/none.pth: missing (weights of backbone of classifier base); put the file there, or correct"
        " backbone.weights: 'imagenet' downloads torchvision's, if any, null starts at random",
    ]


class Stage(NamedTuple):
    """A stage of dvc.yaml."""

    command: str
    data: frozenset[str]
    code: frozenset[str]
    keys: frozenset[str]
    outputs: frozenset[str]


@pytest.fixture(scope="module")
def dvc_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return stages_of(project.copy(tmp_path_factory.mktemp("definitions") / "project", git=False))


def stages_of(folder: Path) -> dict[str, Stage]:
    """The stages of dvc.yaml in ``folder``, as DVC resolves them."""
    stages = {}
    for stage in Repo(str(folder)).index.stages:
        files = {dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)}
        code = {path for path in files if path.startswith(("stages/", "pipeline"))}
        keys = {key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params}
        outputs = names(out.def_path for out in stage.outs)
        stages[stage.name] = Stage(stage.cmd, names(files - code), names(code), names(keys), outputs)
    return stages


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of([PARAMS])


def dvc_jobs(graph: Graph) -> dict[str, Job]:
    """The jobs of dvc.yaml by their names there."""
    return {dvc.name_of(job): job for job in graph.jobs if job.stage not in dvc.EXCLUDED}


def test_dvc_yaml_is_what_the_table_says() -> None:
    assert (project.ROOT / "dvc.yaml").read_text() == dvc.document(), "python -m pipeline.workflow.dvc > dvc.yaml"


def test_dvc_states_the_graph(graph: Graph, dvc_stages: dict[str, Stage]) -> None:
    check_dvc(graph, dvc_stages)


def check_dvc(graph: Graph, dvc_stages: dict[str, Stage]) -> None:
    """Compare the stages of dvc.yaml with the graph, except the inputs of the report."""
    assert dvc_stages.keys() == {dvc.ROWS, *dvc_jobs(graph)}
    rows = f"{graph.results}/{dvc.ROWS}"
    assert dvc_stages[dvc.ROWS].outputs == {rows}
    for name, job in dvc_jobs(graph).items():
        stage = dvc_stages[name]
        assert stage.outputs == names({*job.outputs.values(), *job.files}), job.label
        assert stage.code == names([stage_file(job), "pipeline"]), job.label
        assert stage.command == "python -m pipeline.workflow.dvc run"  # no name that a shell could interpret
        assert dvc.find(graph.jobs, dvc.name_of(job)) is job
        if job.stage != "report":
            own = {f"{rows}/{job.section}/{job.name.rpartition('/')[2]}"} if job.section else set()
            assert stage.data == names(job.inputs.values()) | own, job.label


def test_dvc_report_depends_on_all_that_the_graph_names(graph: Graph, dvc_stages: dict[str, Stage]) -> None:
    check_dvc_report(graph, dvc_stages)


def check_dvc_report(graph: Graph, dvc_stages: dict[str, Stage]) -> None:
    """The report depends on each input by its path, by a folder above it, or by a manifest in such a folder.

    A log is represented by the model that is written with it.
    """
    stage, job = dvc_stages["report"], graph.find("report")

    def below(path: Path) -> bool:
        return not stage.data.isdisjoint(names([path, *path.parents]))

    witnessed = {path for other in graph.jobs if below(other.files[-1]) for path in other.inputs.values()}
    loose = [path for path in job.inputs.values() if not below(path) and path not in witnessed]
    assert {path.name for path in loose} == {"log.json"}


def test_the_first_rows_come_first_and_have_a_report(graph: Graph) -> None:
    wanted = graph.params.first
    report, last = graph.find("first_report"), graph.find("report")
    assert graph.jobs[: len(graph.first)] == graph.first
    assert graph.first[-1] is report
    assert tuple(report.params["rows"]) == wanted == tuple(row for row in wanted if row in last.params["rows"])
    assert report.inputs.items() <= last.inputs.items()
    assert set(report.outputs.values()).isdisjoint(last.outputs.values())
    written: set[Path] = set()
    produced = {path for job in graph.jobs for path in job.outputs.values()}
    for job in graph.jobs:  # in topological order
        assert written >= produced.intersection(job.inputs.values()), job.label
        written.update(job.outputs.values())


def test_snakemake_prefers_the_first_rows(graph: Graph) -> None:
    plan = Plan(graph, [], outdated=graph.jobs)
    preferred = {job.label for job in graph.jobs if plan.priority(STAGES[job.stage])(SimpleNamespace(name=job.name))}
    assert preferred == {job.label for job in graph.first}
    assert "segmentation supervised" in preferred
    assert "segmentation oaa_plus" not in preferred


def test_the_first_report_is_planned_only_before_the_last(graph: Graph) -> None:
    first, last = (str(graph.find(name).files[-1]) for name in ("first_report", "report"))
    fresh, running = (Plan(graph, [], outdated=outdated).targets for outdated in ([], [graph.find("report")]))
    assert set(running) - set(fresh) == {first}
    assert last in fresh


def test_every_gpu_stage_gets_its_cores_where_there_are_enough(graph: Graph) -> None:
    """Threads and workers of a training are as many as its cores; networks and CRF of a prediction take turns."""
    plan = Plan(graph, [], has_gpu=True)
    shown = {stage.name: " ".join(stage.arguments(plan.threads(stage), True)) for stage in plan.stages if stage.gpu}
    trained = {FOLDERS[section].name for section in TRAINED}
    expected = dict.fromkeys(shown, "--threads 8") | dict.fromkeys(trained, "--threads 2 --workers 6")
    assert shown == expected | {"prediction": "--threads 8 --workers 8"}
    assert shown.keys() == {*trained, "localization", "box_maps", "walk", "features", "prediction"}
    assert plan.threads(STAGES["pseudo_labels"]) == 16
    assert {Plan(graph, []).threads(stage) for stage in plan.stages if stage.gpu} == {1}


@pytest.mark.parametrize(
    ("cores", "on_gpu", "processes", "expected"),
    [
        (1, False, 1, (1, 0)),
        (2, False, 1, (2, 0)),
        (4, False, 1, (3, 1)),
        (16, False, 1, (14, 2)),
        (5, False, 5, (5, 0)),
        (8, False, 2, (6, 2)),
        (1, True, 1, (1, 1)),  # one more than there are cores: otherwise the GPU would wait for each image
        (2, True, 1, (1, 1)),
        (4, True, 1, (1, 3)),
        (8, True, 1, (2, 6)),
        (16, True, 1, (2, 14)),
        (4, True, 2, (2, 2)),
        (16, True, 2, (4, 12)),
        (3, True, 2, (2, 2)),
    ],
)
def test_a_training_divides_its_cores(cores: int, on_gpu: bool, processes: int, expected: tuple[int, int]) -> None:
    threads, workers = expected
    arguments = ["--threads", str(threads), "--workers", str(workers)]
    assert STAGES["segmentation"].arguments(cores, on_gpu, processes) == arguments
    assert threads + workers <= max(cores, 2 * processes if on_gpu else 0)


def test_the_table_agrees_with_itself() -> None:
    for stage in STAGES.values():
        assert (project.ROOT / "stages" / f"{stage.name}.py").is_file()
        assert stage.trains == ("model.pt" in stage.writes and "log.json" in stage.writes)
        assert stage.threads >= 1
        for read in stage.reads.values():
            writers = [FOLDERS.get(name) or STAGES[name] for name in (read.allowed or (read.job,))]
            assert all(read.file in writer.writes for writer in writers), stage.name
    evaluated = {section: kind(section) for section in STAGES["evaluation"].targets}
    assert set(evaluated.values()) == set(KINDS)
    assert {section for _, section in sections(STAGES["prediction"])} == {"segmentations", "one_step"}
    scored = {section for section in SECTIONS if {"maps.h5", "labels.h5"} & set(FOLDERS[section].writes)}
    assert evaluated.keys() == scored | {"predictions"}


@pytest.mark.parametrize("files", [["nonesuch.yaml"], ["params.yaml", "wrong.yaml"]])
def test_the_commands_of_wrong_params_fail_in_the_shell(files: list[str], tmp_path: Path) -> None:
    folder = project.copy(tmp_path / "project", git=False)
    (folder / "wrong.yaml").write_text("sede: 1\n")
    line = f"python -m pipeline.workflow.graph {' '.join(files)} | sh -e; echo status $?"
    text = project.run(folder, "sh", "-c", line)
    assert text.endswith("status 1\n"), text
    assert re.search(r"^error: .*(no such file|did you mean seed)", text, re.MULTILINE), text
    assert "demo" not in text


def leaves(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all values but empty mappings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*where, key))
    else:
        yield where


def at(raw: Any, where: tuple[str, ...]) -> Any:
    for key in where:
        raw = raw[key]
    return raw


def variants(value: Any) -> list[Any]:
    """Other values of the kind that ``value`` is."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2]
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [value[1:]]
    if isinstance(value, list):
        return [[*value, 2.0], [item + 1 for item in value], [item + 0.5 for item in value]]
    words = {"adam", "resnet50", "average", "strict", "constant", "threshold", "features", "store", "data/other"}
    sections = ("classifiers", "localizations", "refinements", "affinities", "walks", "pseudo_labels")
    return sorted(words | {f"{section}/{name}" for section in sections for name in ("cam", "base")} | {"cam", "oaa"})


def changed(raw: dict[str, Any], where: tuple[str, ...]) -> Graph | None:
    """The graph of the params with another value at ``where``; None where no variant is valid."""
    for value in variants(at(raw, where)):
        other = copy.deepcopy(raw)
        at(other, where[:-1])[where[-1]] = value
        try:
            graph = Graph(parameters.validate(other, resolve=True))
        except PipelineError:
            continue
        if value != at(raw, where):
            return graph
    return None


def followers(graph: Graph, first: set[str]) -> set[str]:
    """These jobs and all that follow from them, as DVC calls them."""
    reached: set[str] = set()
    files: set[Path] = set()
    for job in graph.jobs:
        if dvc.name_of(job) in first or not files.isdisjoint(job.inputs.values()):
            reached.add(dvc.name_of(job))
            files.update(job.outputs.values())
    return reached


def states(block: Any, key: tuple[str, ...]) -> bool:
    """Whether the block has a value at ``key``, or names another implementation than the one whose setting it is."""
    return any(
        leaf[: len(key)] == key or (key[0] in CHOICES and leaf[0] == key[0] and leaf[1:2] != key[1:2])
        for leaf in leaves(block)
    )


def set_themselves(raw: dict[str, Any], where: tuple[str, ...], stages: dict[str, Stage]) -> set[str]:
    """Stages whose block gives what stands at ``where`` in the defaults: DVC cannot know that it stays as it is."""
    if where[0] != "defaults":
        return set()
    keep = {f"{where[1]}.{name}" for name, block in raw[where[1]].items() if states(block, where[2:])}
    return {name for name, stage in stages.items() if stage.keys & keep}


def essence(job: Job) -> tuple[Any, ...]:
    return job.params, job.inputs, job.outputs


UNUSED = ("variants", "box_test")  # the demo's rows have no variant and no boxes


def test_a_changed_param_touches_the_same_jobs(graph: Graph, dvc_stages: dict[str, Stage]) -> None:
    """DVC's keys cover all params that a job depends on, and reach no job that the graph would not run again."""
    raw = yaml.safe_load((project.ROOT / PARAMS).read_text())
    before = dvc_jobs(graph)
    tried, everything = 0, list(leaves(raw))
    for where in everything:
        other = changed(raw, where)
        if where[0] in ("experiment", "first") or other is None:
            continue
        tried += 1
        after = dvc_jobs(other)
        moved = {name for name in before if essence(before[name]) != essence(after[name])}
        depend = {name for name in moved if before[name].params != after[name].params}
        path = ".".join(where)
        reached = {
            name for name, stage in dvc_stages.items() if any(f"{path}.".startswith(f"{key}.") for key in stage.keys)
        }
        assert bool(moved) == (where[0] not in UNUSED), path
        assert depend <= reached, path
        assert reached - set_themselves(raw, where, dvc_stages) <= followers(graph, moved), path
    assert tried > 0.8 * len(everything)
