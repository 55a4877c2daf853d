"""No string of a params file, an override or a store runs code or leaves its folder.

Names are held to a rule where they are defined. Paths of users' files may have any characters and are quoted.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config.params import load
from pipeline.config.stage_table import SECTIONS, STAGES
from pipeline.data.build_index import build_index
from pipeline.data.index import write
from pipeline.errors import PipelineError
from pipeline.stores.raster import RasterWriter
from pipeline.workflow import graph as graphs
from pipeline.workflow.graph import Graph
from pipeline.workflow.snakemake import Plan
from pipeline.workflow.stage import run
from stages import demo, index
from tests import project
from tests.trained import command
from tests.voc_tree import make_tree, minimal_params

TOUCH = "touch MARK"
FILE_NAMES = [  # each may be the name of a file
    f"a;{TOUCH};b",
    f"$({TOUCH})",
    f"`{TOUCH}`",
    f"a|{TOUCH}",
    f"a&{TOUCH}&b",
    f"a&&{TOUCH}",
    f"a\n{TOUCH}\nb",
    f"a\r\n{TOUCH}",
    "a>MARK",
    ">MARK",
    f"';{TOUCH};'",
    f'";{TOUCH};"',
    f"\\';{TOUCH};\\'",
    f"'\"';{TOUCH};#",
    f"${{x:-$({TOUCH})}}",
    f"<({TOUCH})",
    "a b",
    " a",
    "a ",
    "a\tb",
    "-rf",
    "--help",
    "*",
    "[a]?",
    "~",
    "#a",
    "!a",
    "%s%n",
    "{name}",
    "{{name}}",
    "${seed}",
    "$HOME",
    "\\",
    "'",
    '"',
    "é",
    "\u202ea",
    "\x1b[2J",
    "...",
    ".hidden",
    "a:b",
    "a@b",
    "a,b=c",
]
NAMES = [*FILE_NAMES, "", ".", "..", "../a", "../../a", "/", "/tmp/a", "a/b", "a/../../b", "a\0b", "\ud800", "a" * 101]


def ident(name: str) -> str:
    return name.encode("unicode_escape").decode()[:30]


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Minimal params of a generated dataset; the working folder is two levels below the test's folder."""
    folder = tmp_path / "work/folder"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    project.link_code(folder)
    raw = minimal_params(make_tree(Path("data/given"), train=2, evaluation=1))
    raw["dataset"] |= {"root": "data/demo", "demo": {"train": 2, "evaluation": 1, "size": 32}}
    return raw


def outside(tmp_path: Path) -> list[str]:
    """What lies beside the working folder or was created by a command that ran."""
    beside = [path for level in (tmp_path, tmp_path / "work") for path in level.iterdir()]
    return [str(path) for path in beside if path.name not in ("work", "folder")] + list(
        map(str, tmp_path.rglob("MARK*"))
    )


def refusal(raw: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        load([], raw)
    return caught.value.lines


@pytest.mark.parametrize("name", NAMES, ids=ident)
def test_names_are_held_to_a_rule(
    name: str, params: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params))
    block = {**params["classifiers"]["base"]}
    changes: list[dict[str, Any]] = [
        {"experiment": name},
        {"method": name},
        {"rows": [name]},
        {"seed": name},
        {"localizations": {"cam": {"model": name}}},
        {"localizations": {"cam": {"model": f"classifiers/{name}"}}},
        {"pseudo_labels": {"cam": {"source": f"classifiers/{name}", "rule": name}}},
        {"classifiers": {"base": {"method": name}}},
        {"classifiers": {"base": {"backbone": {"name": name}}}},
        *({section: {name: block}} for section in SECTIONS),
    ]
    for change in changes:
        for line in refusal(params | change):
            assert line.isprintable(), line
    with pytest.raises(SystemExit, match="1"):
        run("demo", demo.main, ["--set", json.dumps({"experiment": name, "rows": [name]})])
    errors = capsys.readouterr().err.rstrip("\n").split("\n")
    assert all(line.startswith("error: params.yaml: ") for line in errors)
    assert not Path("results").exists()
    assert not outside(tmp_path)


@pytest.mark.parametrize("name", ["demo", "demo_seed2", "voc2012-small", "v1.0", "_", "2024", "A" * 100])
def test_plain_names_of_experiments_are_accepted(name: str, params: dict[str, Any]) -> None:
    assert load([], params | {"experiment": name}).experiment == name


@pytest.mark.parametrize("root", [".", "..", "../..", "/", "data/..", "results", "results/demo", "./results/a/../b"])
def test_a_dataset_contains_neither_the_project_nor_its_results(root: str, params: dict[str, Any]) -> None:
    (line,) = refusal(params | {"dataset": {"root": root}})
    assert line.startswith(f": dataset.root: {root} ")


@pytest.fixture
def shell(tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """Runs a script with a python that only records its arguments; returns those of each call."""
    tools = tmp_path / "work/folder/tools"
    record = tmp_path / "work/folder/calls"

    def run_script(script: str) -> list[list[str]]:
        tools.mkdir(exist_ok=True)
        (tools / "python").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> {record}\nprintf "\\0" >> {record}\n')
        (tools / "python").chmod(0o755)
        record.unlink(missing_ok=True)
        paths = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", f"set -euo pipefail; {script}"], env=paths, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [call.split("\0") for call in record.read_bytes().decode().split("\0\0") if call]

    return run_script


@pytest.mark.parametrize("name", FILE_NAMES, ids=ident)
def test_paths_are_quoted_in_commands(
    name: str, params: dict[str, Any], tmp_path: Path, shell: Callable[[str], list[list[str]]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The commands of Snakemake's rules and of pipeline.workflow.graph, with params files of such a name."""
    file = f"./{name}.yaml"
    Path(file).write_text(yaml.safe_dump(params))
    path = name.translate({ord("{"): None, ord("}"): None})
    overrides = json.dumps(
        {"dataset": {"root": f"data/{path}", "extra": path or "a"}, "saliency": {"path": f"a{path}"}}
    )
    plan = Plan(Graph(load([Path(file)], json.loads(overrides))), ["--params", file, "--set", overrides], False)
    command = plan.command(STAGES["demo"])(SimpleNamespace(), 1, None)
    assert shell(f"{command} 2>&1 | tee ./{shlex.quote(name)}") == [
        ["-m", "stages.demo", "--params", file, "--set", overrides]
    ]
    monkeypatch.setattr("sys.argv", ["graph", "./params.yaml", file])
    Path("params.yaml").write_text(yaml.safe_dump(params))
    graphs.main()
    calls = shell(capsys.readouterr().out)
    assert len(calls) == len(plan.graph.jobs)
    assert all(call[-3:] == ["--params", "./params.yaml", file] for call in calls)
    assert not outside(tmp_path)


@pytest.mark.parametrize("name", FILE_NAMES, ids=ident)
def test_stages_take_any_path(
    name: str, params: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "{" in name:  # Snakemake's wildcards, which cannot be escaped
        (line,) = refusal(params | {"dataset": {"root": name}})
        assert line == f": dataset.root: {name!r} must be a path without braces"
        return
    (Path("data") / name).mkdir()
    Path("data/given").rename(Path("data") / name / "set")
    params["dataset"] |= {"root": f"data/{name}/demo"}
    Path(f"./{name}.yaml").write_text(yaml.safe_dump(params))
    run("demo", demo.main, ["--params", f"./{name}.yaml"])
    root = f"data/{name}/set"
    saliency = {"kind": "folder", "path": f"{root}/Saliency"}
    change = json.dumps({"dataset": {"root": root, "demo": None}, "saliency": saliency})
    run("index", index.main, ["--params", f"./{name}.yaml", "--set", change])
    assert json.loads(Path("results/test/index/index.json").read_text())["root"] == root
    assert (Path("data") / name / "demo/tags.json").exists()
    assert not outside(tmp_path)


@pytest.mark.parametrize(
    "image_id",
    ["../x", "../../x", "/x", "/tmp/x", "a/../../x", "a/..", "..", ".", "a//b", "a/", "/", "a/./b", "a\nb", "\x1b[2J"],
    ids=ident,
)
def test_an_export_stays_in_its_folder(
    image_id: str, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever ids a store and an index have, as if they came from someone else."""
    experiment = Path("results/mine")
    index = build_index(make_tree(Path("voc"))).index
    for split, ids in index["splits"].items():
        index["splits"][split] = [image_id if name == "img_000" else name for name in ids]
    index["images"][image_id] = index["images"].pop("img_000")
    store = experiment / "deep/er/labels.h5"
    for path in (experiment / "index/index.json", store):
        path.parent.mkdir(parents=True)
    write(experiment / "index/index.json", index)
    with RasterWriter(store, "labels") as writer:
        for name in (image_id, "img_001"):
            image = index["images"][name]
            writer.append(name, np.zeros((image["height"], image["width"]), np.uint8))
    before = set(Path().rglob("*"))
    status = command("export", store, "--out", "results/out/png", "--formats", "png")
    error = capsys.readouterr().err
    assert status == 0 or error.startswith("error: ")
    assert all(path.is_relative_to("results/out") for path in {*Path().rglob("*")} - before)
    assert not Path("/tmp/x.png").exists()
    assert not Path("/x.png").exists()


EVIL = f"d;{TOUCH};$({TOUCH})`{TOUCH}`'\"&|# *"  # all at once, for what starts slowly


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the project in a folder of such a name, whose dataset and profile have such names, too."""
    folder = project.copy(tmp_path / "work" / f"folder {EVIL}", git=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        raw = minimal_params(make_tree(Path("data") / f"given {EVIL}", train=2, evaluation=1))
    raw["dataset"] |= {"root": f"data/{EVIL}", "demo": {"train": 2, "evaluation": 1, "size": 32}}
    raw |= {section: {} for section in SECTIONS if section not in raw}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw | {"test": {}, "gallery": 1, "defaults": {}}))
    (folder / f"profiles/{EVIL} {{x}}.yaml").write_text(
        yaml.safe_dump({"seed": 5, "dataset": {"root": f"data/given {EVIL}", "demo": None}})
    )
    return folder


def marks(tmp_path: Path) -> list[Path]:
    return list(tmp_path.rglob("MARK*"))


@pytest.mark.slow
def test_snakemake_takes_any_path_and_refuses_names(copied: Path, tmp_path: Path) -> None:
    extra = ["--configfile", "params.yaml", f"profiles/{EVIL} {{x}}.yaml", "--config", "gallery=2", "--until", "index"]
    text = project.run(copied, "snakemake", *extra)
    assert (copied / "results/test/index/index.json").exists(), text
    for change in (f"experiment=a;{TOUCH};b", "experiment=../../out", f"experiment={tmp_path}/out"):
        text = project.run(copied, "snakemake", "--until", "index", "--config", change, check=False)
        assert "experiment: " in text
        assert "must be 1 to 100 ASCII letters" in text
        assert "Traceback" not in text
    assert not marks(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("out")) == []


@pytest.mark.slow
def test_dvc_takes_any_path_and_refuses_names(copied: Path, tmp_path: Path) -> None:
    (copied / "dvc.yaml").write_text(project.run(copied, "python", "-m", "pipeline.workflow.dvc"))
    text = project.run(copied, "dvc", "repro", "index")
    assert (copied / "results/test/index/index.json").exists(), text
    good = yaml.safe_load((copied / "params.yaml").read_text())
    victim = tmp_path / "work/out/rows/mine"
    victim.parent.mkdir(parents=True)
    victim.touch()
    block = f"a;{TOUCH};b"
    evil = {**good["classifiers"], block: good["classifiers"]["base"]}
    rows = copied / "results/test/rows/classifiers"
    rows.mkdir(parents=True, exist_ok=True)
    (rows / block).write_text("needed\n")  # as if these files had come with the params
    for change, job in (
        ({"experiment": f"a;{TOUCH};b"}, "index"),
        ({"experiment": "../../out"}, "index"),
        ({"classifiers": evil}, f"classifier@{block}"),
    ):
        (copied / "params.yaml").write_text(yaml.safe_dump(good | change))
        for options in ((), ("--single-item",)):
            text = project.run(copied, "dvc", "repro", *options, job, check=False)
            assert "error: params.yaml: " in text or "ERROR: " in text
    assert victim.exists()
    assert not marks(tmp_path)
