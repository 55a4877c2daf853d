"""Snakemake and DVC over the same stages: each knows what the other has done, and nothing stale passes for done."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.workflow import dvc
from tests.project import copy, environment, run

pytestmark = pytest.mark.slow
SCHEDULE = re.compile(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", re.MULTILINE)
NOTHING = "Nothing to be done"
CLEAN = "Data and pipelines are up to date."


def shrink(params: dict[str, Any]) -> None:
    """The demo's params with two rows, few small images, narrow networks and one epoch."""
    params["dataset"]["demo"] = {"train": 12, "evaluation": 4, "size": 48, "seed": 0}
    for section in ("classifiers", "refinements", "segmentations"):
        block = params["defaults"][section]
        block["training"] = {"epochs": 1, "batch_size": 6, "lr": 0.01}
        block["augmentation"] = {"flip": True}
        block |= (
            {"network": {"deeplab_largefov": {"channels": 8}}} if section == "segmentations" else {"head": {"convs": 0}}
        )
    params["defaults"]["classifiers"]["accumulate"] = {"cells": 12, "skip_epochs": 0}
    params.update(
        method="oaa",
        first=[],
        classifiers={"base": {}},
        refinements={},
        localizations={"cam": {"model": "classifiers/base"}},
        pseudo_labels={"cam": {"source": "localizations/cam"}, "oaa": {"source": "classifiers/base"}},
        affinities={},
        walks={},
        mixtures={},
        one_step={},
        segmentations={"cam": {"labels": "pseudo_labels/cam"}, "oaa": {"labels": "pseudo_labels/oaa"}},
        gallery=2,
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change params.yaml as a person would."""
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text())
    change(params)
    file.write_text(yaml.safe_dump(params, sort_keys=False))


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)


def planned(folder: Path, *arguments: str) -> set[str]:
    """What a dry run of Snakemake would run, under the names of dvc.yaml."""
    text = run(folder, "snakemake", "--dry-run", *arguments)
    jobs = set()
    for rule, body in SCHEDULE.findall(text):
        wildcards = re.search(r"wildcards: seed=(.*), name=(.*)", body)
        seed, path = wildcards.groups() if wildcards else ("", "")
        section, _, name = path.rpartition("/")
        section = "segmentations" if rule == "prediction" or section == "predictions" else section
        jobs.add("@".join(filter(None, ("_".join(filter(None, (rule, section, seed.rstrip("/")))), name))))
    assert jobs or NOTHING in text, text
    return jobs - {"all"}


def worked(text: str) -> set[str]:
    """The stages that DVC started and that did something: those up to date, and what DVC alone has, are left out."""
    stages = dict(re.findall(r"Running stage '(.*)':\n> .*\n((?:(?!Running|Updating).*\n)*)", text))
    return {name for name, output in stages.items() if ": up to date" not in output} - {dvc.ROWS}


def reproduced(folder: Path, *arguments: str) -> set[str]:
    """What ``dvc repro`` ran anew."""
    return worked(run(folder, "dvc", "repro", *arguments))


def loosen_oaa(params: dict[str, Any]) -> None:
    params["pseudo_labels"]["oaa"]["rule"] = {"oaa": {"attention": 0.05}}


OF_OAA = {
    "pseudo_labels@oaa",
    "segmentation@oaa",
    "prediction_segmentations@oaa",
    "evaluation_pseudo_labels@oaa",
    "evaluation_segmentations@oaa",
    "report",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository in which Snakemake has made all results; tests copy it."""
    folder = copy(tmp_path_factory.mktemp("orchestration") / "finished", git=True)
    edit(folder, shrink)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    commit(folder, "Small demo")
    run(folder, "snakemake", "--quiet", "all")
    commit(folder, "Results")
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished repository; times, which a copy keeps, included."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def clone(project: Path, folder: Path) -> Path:
    """A fresh clone with its data and results pulled from a remote, as on another machine."""
    run(project, "dvc", "remote", "add", "--default", "storage", str(folder.parent / "storage"))
    run(project, "dvc", "push", "--quiet")
    commit(project, "Remote")
    run(folder.parent, "git", "clone", "--quiet", str(project), str(folder))
    run(folder, "dvc", "pull", "--quiet")
    return folder


def test_after_snakemake_neither_tool_has_anything_to_do(project: Path) -> None:
    assert CLEAN in run(project, "dvc", "status")
    assert reproduced(project) == set()
    assert planned(project) == set()
    table = json.loads((project / "results/demo/metrics.json").read_text())
    assert set(table) == {"cam", "oaa"}


def test_dvc_runs_what_a_param_touches_and_snakemake_then_nothing(project: Path) -> None:
    edit(project, loosen_oaa)
    ran = reproduced(project)
    assert {"pseudo_labels@oaa", "report"} <= ran <= OF_OAA
    assert planned(project) == set()
    assert CLEAN in run(project, "dvc", "status")


def test_a_dry_run_with_other_params_does_no_harm(project: Path) -> None:
    everything = planned(project, "--config", "seed=2")
    assert {"classifier@base", "segmentation@cam", "report"} <= everything
    assert "index" not in everything
    assert planned(project) == set()


def test_profiles_are_laid_on_params(project: Path) -> None:
    (project / "profiles" / "loose.yaml").write_text("pseudo_labels: {oaa: {rule: {oaa: {attention: 0.05}}}}\n")
    arguments = ("--configfile", "params.yaml", "profiles/loose.yaml", "--config", "gallery=1")
    assert planned(project, *arguments) == OF_OAA | {"features@base"}
    command = run(project, "snakemake", "--dry-run", "--printshellcmds", *arguments)
    assert "stages.report --params params.yaml profiles/loose.yaml --set '{\"gallery\": 1}'" in command


def test_stale_jobs_that_a_target_does_not_need_are_left_alone(project: Path) -> None:
    edit(project, loosen_oaa)
    target = "results/demo/predictions/cam/labels.h5"
    assert planned(project, "--", target) == set()
    assert planned(project, "--force", "--allowed-rules", "prediction", "--", target) == {
        "prediction_segmentations@cam"
    }
    assert planned(project, "--", "results/demo/predictions/oaa/labels.h5") == {
        "pseudo_labels@oaa",
        "segmentation@oaa",
        "prediction_segmentations@oaa",
    }


def test_changed_code_and_missing_files_are_noticed(project: Path) -> None:
    (project / "results/demo/localizations/cam/maps.h5").unlink()
    assert {"localization@cam", "pseudo_labels@cam", "report"} <= planned(project)
    assert "classifier@base" not in planned(project)
    with (project / "stages/demo.py").open("a") as file:
        file.write("# a comment\n")
    assert "demo" not in planned(project)
    with (project / "stages/demo.py").open("a") as file:
        file.write("OTHER = 1\n")
    assert {"demo", "index", "classifier@base"} <= planned(project)


def test_dvc_starts_what_a_comment_touches_and_trains_nothing(project: Path) -> None:
    for source in ("stages/segmentation.py", "pipeline/training/loop.py"):
        with (project / source).open("a") as file:
            file.write("# a comment\n")
    assert "segmentation@oaa" in run(project, "dvc", "status")
    text = run(project, "dvc", "repro")
    assert "segmentation oaa: up to date" in text
    assert worked(text) == set()
    assert CLEAN in run(project, "dvc", "status")
    assert "done in" not in text  # which a stage says after its work


def test_dvc_runs_what_the_rows_need(project: Path) -> None:
    """From nothing, with fewer rows in params.yaml; then with all of them."""
    shutil.rmtree(project / "results/demo")
    (project / "dvc.lock").unlink()
    edit(project, lambda params: params.update(method="cam", rows=["cam"]))
    text = run(project, "dvc", "repro")
    assert text.count("segmentation oaa is left out: row oaa is not listed in rows; add it there") == 1
    assert set(json.loads((project / "results/demo/metrics.json").read_text())) == {"cam"}
    assert planned(project) == set()
    assert CLEAN in run(project, "dvc", "status")
    assert reproduced(project) == set()
    placeholder = project / "results/demo/segmentations/oaa/model.pt"
    assert placeholder.read_text() == dvc.PLACEHOLDER
    edit(project, lambda params: params.pop("rows"))
    assert {"segmentation@oaa", "prediction_segmentations@oaa"} <= planned(project)
    ran = reproduced(project)
    assert {"segmentation@oaa", "report"} <= ran <= OF_OAA
    assert placeholder.stat().st_size > 1000
    assert planned(project) == set()


def test_an_experiment_may_have_fewer_rows(project: Path) -> None:
    text = run(project, "dvc", "exp", "run", "--name", "few", "--set-param", "+rows=[oaa]")
    assert "segmentation cam is left out: row cam is not listed in rows; add it there" in text
    assert worked(text) <= {"report", *(name for name in worked(text) if name.endswith("@cam"))}
    assert set(json.loads((project / "results/demo/metrics.json").read_text())) == {"oaa"}
    assert (project / "results/demo/segmentations/cam/model.pt").stat().st_size > 1000  # what was there stays
    assert planned(project) == set()


def test_what_stands_in_for_results_is_never_read(project: Path) -> None:
    model = project / "results/demo/segmentations/cam/model.pt"
    model.unlink()
    edit(project, lambda params: params.update(method="oaa", rows=["oaa"]))
    run(project, "dvc", "repro")
    assert model.read_text() == dvc.PLACEHOLDER
    edit(project, lambda params: params.pop("rows"))
    text = run(project, "python", "-m", "stages.prediction", "cam", check=False)
    assert re.search(r"^error: results/demo/segmentations/cam/model.pt: damaged", text, re.MULTILINE), text


def test_a_failing_stage_says_why_under_dvc(project: Path) -> None:
    edit(project, loosen_oaa)
    maps = project / "results/demo/classifiers/base/maps.h5"
    maps.write_bytes(maps.read_bytes()[:-1])
    text = run(project, "python", "-m", "dvc", "repro", "--single-item", "pseudo_labels@oaa", check=False)
    assert re.search(r"^error: results/demo/classifiers/base/maps.h5: damaged", text, re.MULTILINE), text
    assert "failed to reproduce 'pseudo_labels@oaa'" in text


def test_snakemake_runs_what_a_param_touches_and_any_commit_checked_out_is_up_to_date(project: Path) -> None:
    edit(project, loosen_oaa)
    assert planned(project) == OF_OAA
    run(project, "snakemake", "--quiet", "all")
    commit(project, "Looser")
    for revision in ("main", "HEAD~1", "main"):
        run(project, "git", "checkout", "--quiet", revision)
        run(project, "dvc", "checkout", "--quiet")
        assert CLEAN in run(project, "dvc", "status")
        assert planned(project) == set()


def test_a_fresh_clone_trusts_what_it_pulls_and_no_more(project: Path, tmp_path: Path) -> None:
    folder = clone(project, tmp_path / "clone")
    assert planned(folder) == set()
    assert CLEAN in run(folder, "dvc", "status")
    assert "Running stage" not in run(folder, "dvc", "repro")
    edit(folder, loosen_oaa)
    assert planned(folder) == OF_OAA
    assert {"pseudo_labels@oaa", "report"} <= reproduced(folder) <= OF_OAA
    assert planned(folder) == set()


def test_experiments_are_compared_number_by_number(project: Path) -> None:
    run(project, "dvc", "exp", "run", "--name", "cam", "--set-param", "method=cam")
    run(project, "dvc", "exp", "run", "--name", "oaa", "--set-param", "method=oaa")
    difference = json.loads(run(project, "dvc", "metrics", "diff", "cam", "oaa", "--json"))["metrics.json"]
    assert (difference["method"]["old"], difference["method"]["new"]) == ("cam", "oaa")
    table = json.loads((project / "results/demo/metrics.json").read_text())
    assert difference["miou"]["old"] == pytest.approx(table["cam"]["miou"])
    assert difference["miou"]["new"] == pytest.approx(table["oaa"]["miou"])
    assert planned(project) == set()


def test_a_failing_stage_says_why_and_is_not_taken_for_done(project: Path) -> None:
    edit(project, loosen_oaa)
    maps = project / "results/demo/classifiers/base/maps.h5"
    whole = maps.read_bytes()
    maps.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    text = run(project, "snakemake", "--quiet", "all", check=False)
    assert re.search(r"^error: results/demo/classifiers/base/maps.h5: damaged", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert "error: " in (project / "results/demo/logs/pseudo_labels/oaa.log").read_text()
    assert "pseudo_labels@oaa" in run(project, "dvc", "status")
    maps.write_bytes(whole)
    assert planned(project) == OF_OAA


def test_nothing_is_recorded_where_nothing_was_made(tmp_path: Path) -> None:
    folder = copy(tmp_path / "project", git=False)
    (folder / "stages/demo.py").write_text("raise SystemExit('error: no room')\n")
    text = run(folder, "snakemake", "--quiet", "all", check=False)
    assert "error: no room" in text
    assert "note: " not in text
    assert not (folder / "dvc.lock").exists()


def test_wrong_params_are_refused_in_a_line(project: Path) -> None:
    edit(project, lambda params: params.update(sede=1))
    for quiet in ((), ("--quiet", "all")):
        text = run(project, "snakemake", *quiet, check=False)
        assert "error: params.yaml: sede: unknown key; did you mean seed?" in text
        assert "Traceback" not in text


def test_a_killed_snakemake_is_started_again_without_ado(project: Path) -> None:
    """Killed outright it leaves its locks and a stage still at work, for which the next one waits.

    The stage is suspended until the next one waits: it might be done before Snakemake has planned.
    """
    folder = project / "results/demo/classifiers/base"
    command = ["snakemake", "--config", "seed=2", "--", "results/demo/classifiers/base/model.pt"]
    lock, log = folder / ".lock-classifier", project / "results/demo/logs/classifiers/base.log"
    lock.unlink()
    with subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as first:
        while not (lock.exists() and lock.read_text()):
            time.sleep(0.02)
            assert first.poll() is None
        stage = int(lock.read_text())
        os.kill(stage, signal.SIGSTOP)
        first.kill()
    assert any((project / ".snakemake/locks").iterdir())
    log.unlink()  # as Snakemake would, at a moment when this test may be reading it
    with subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as second:
        try:
            while not (log.exists() and f"waiting for process {stage}" in log.read_text()):
                time.sleep(0.02)
                assert second.poll() is None
        finally:
            os.kill(stage, signal.SIGCONT)
        text, _ = second.communicate()
    assert "1 of 1 steps (100%) done" in text
    assert planned(project, *command[1:]) == set()


def test_lint_has_nothing_to_say(project: Path) -> None:
    assert "good condition" in run(project, "snakemake", "--lint")
