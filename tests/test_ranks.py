"""Jobs of several processes are stopped, killed and resumed, and fail, as jobs of one process are and do."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config.params import load
from pipeline.data.sampling import epoch_order
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores.files import sha256
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import execute
from tests import rank_stages
from tests.project import link_code, run_stages
from tests.stopping import CLASSIFIER, LOG, STATUS, copy_without, hashes, log, wait_until, wait_until_none_is_left
from tests.voc_tree import make_tree, minimal_params

WRITTEN = (".pt", ".h5", ".json")  # suffixes of outputs
TRAINING = {"batch_size": 8, "lr": 0.01, "epochs": 30, "accumulation": 2, "processes": 2}
LARGEFOV = {"deeplab_largefov": {"channels": 8, "rate": 2, "dropout": 0.5}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset, and a classifier that two processes have trained without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        link_code(folder)
        params = minimal_params(make_tree(Path("data"), train=17, evaluation=5))
        block = {
            "backbone": {"name": "small"},
            "training": TRAINING,
            "head": {"convs": 1, "channels": 8},
            "accumulate": {"cells": 6, "snapshots": True},
            "attention_drop": {"beta": 0.5, "delta": 0.5},
        }
        short = {"training": {**TRAINING, "epochs": 2}}
        params["classifiers"] = {"base": block, "short": {**block, **short}}
        params["localizations"]["cam"] = {"model": "classifiers/short"}
        params["boxes"] = {"cam": {"model": "classifiers/short"}}
        edges = {"labels": "pseudo_labels/cam", "backbone": {"name": "small"}, "channels": 8, "radius": 2, **short}
        params["affinities"] = {"cam": edges}
        params["walks"] = {"cam": {"affinity": "affinities/cam", "maps": "localizations/cam", "radius": 2, "times": 2}}
        row = {"labels": "ground_truth", "network": LARGEFOV, "backbone": {"name": "small"}}
        params["segmentations"]["cam"] = {**row, **short}
        params["test"] = {"scales": [1.0], "flip": True, "crf": {"iterations": 1}}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        run_stages(["params.yaml"], "ground_truth")
        process = begin("classifier", "base", "--checkpoint-every", "1e9")
        assert process.wait(300) == 0, log()
    return folder


@pytest.fixture
def project(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same before the training."""
    project = copy_without(unbroken, tmp_path, CLASSIFIER)
    monkeypatch.chdir(project)
    return project


def begin(*arguments: str, device: str = "cpu") -> subprocess.Popen[bytes]:
    """A stage in a process group of its own."""
    stage, *rest = arguments
    command = [sys.executable, "-m", f"stages.{stage}", *rest, "--device", device, "--threads", "1"]
    with LOG.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The other ranks of a stage."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def assert_resumes(unbroken: Path) -> None:
    """The training goes on and ends with the bytes of an unbroken one, and leaves nothing else."""
    assert begin("classifier", "base", "--checkpoint-every", "0").wait(300) == 0, log()
    assert "classifier base: resumes from epoch" in log()
    names = ("model.pt", "maps.h5", "snapshots.h5", "log.json")
    mine, theirs = hashes(CLASSIFIER, WRITTEN), hashes(unbroken / CLASSIFIER, WRITTEN)
    assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}
    assert not list(CLASSIFIER.glob(".checkpoint*"))


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_saves_the_state_and_ends_all(unbroken: Path, project: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches the whole group, SIGTERM often the stage alone."""
    process = begin("classifier", "base", "--checkpoint-every", "1e9")
    wait_until(process, lambda: "epoch 2/" in log())
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(60) == STATUS[number], log()
    wait_until_none_is_left(process.pid)
    *before, saved = log().splitlines()
    (told,) = (line for line in before if not line.startswith("classifier base: epoch"))
    assert told.startswith(f"stopping on {number.name}; to resume, run the same command again: python -m stages.")
    assert re.fullmatch(r"classifier base: state saved at epoch \d+, step \d+", saved)
    assert "Traceback" not in log()
    assert_resumes(unbroken)


def test_killed_again_and_again_it_ends_the_same(unbroken: Path, project: Path) -> None:
    """SIGKILL of all processes, of the other rank, and of the stage; those that are left end within seconds."""
    moments = random.Random(0)
    for victim in ("group", "rank", "stage"):
        process = begin("classifier", "base", "--checkpoint-every", "0.2")
        wait_until(process, lambda: list(CLASSIFIER.glob(".checkpoint-*")) and "epoch " in log())
        time.sleep(moments.uniform(0.0, 0.8))
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(ranks_of(process)[0] if victim == "rank" else process.pid, signal.SIGKILL)
        status = process.wait(30)
        wait_until_none_is_left(process.pid)
        if victim == "rank":
            assert status == 1
            errors = [line for line in log().splitlines() if not line.startswith(("classifier base: ", "note: "))]
            assert errors == [
                "error: classifier base: process 2 of 2 was killed, probably because memory ran out; allow more memory "
                "or lower training.processes"
            ]
    assert_resumes(unbroken)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_killed_on_two_cards_it_ends_the_same(project: Path) -> None:
    """Both ranks in turn: over NCCL, a rank does not notice by itself that another has died."""
    options = ("classifier", "base", "--deterministic", "--checkpoint-every", "0.2")
    found = []
    for victims in ((), ("rank", "stage")):
        shutil.rmtree(CLASSIFIER, ignore_errors=True)
        for victim in victims:
            process = begin(*options, device="cuda")
            wait_until(process, lambda: list(CLASSIFIER.glob(".checkpoint-*")) and "epoch " in log())
            time.sleep(0.5)
            os.kill(ranks_of(process)[0] if victim == "rank" else process.pid, signal.SIGKILL)
            process.wait(30)
            wait_until_none_is_left(process.pid)
        assert begin(*options, device="cuda").wait(300) == 0, log()
        found.append(hashes(CLASSIFIER, WRITTEN))
    assert {**found[0], "manifest.json": ""} == {**found[1], "manifest.json": ""}


def test_a_fault_of_another_rank_is_the_one_line(project: Path) -> None:
    """An image of the second half of the first batch disappears."""
    order = epoch_order([()] * 17, 1, 0, 0)
    path = Path(f"data/JPEGImages/img_{order[6]:03d}.jpg")
    path.unlink()
    process = begin("classifier", "base")
    assert process.wait(60) == 1
    (line,) = log().splitlines()
    assert line.startswith(f"error: {path}: ")


def test_a_loader_that_dies_in_another_rank(project: Path) -> None:
    process = begin("classifier", "base", "--workers", "2")
    wait_until(process, lambda: "epoch 1/" in log())
    (rank,) = ranks_of(process)
    (loader,) = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    os.kill(int(loader), signal.SIGKILL)
    assert process.wait(60) == 1
    *_, line = log().splitlines()
    assert line.startswith("error: classifier base: a worker process was killed")


@pytest.mark.parametrize(
    ("failing", "line"),
    [
        (rank_stages.refuse, "rank 1 refuses"),
        (rank_stages.crash, "index: process 2 of 2 ended unexpectedly (exit status 1); run the stage with"),
        (rank_stages.leave_rank_0_waiting, "index: process 2 of 2 ended unexpectedly (SIGTERM); run the stage with"),
    ],
)
def test_rank_0_raises_the_error_of_another(
    project: Path, capfd: pytest.CaptureFixture[str], failing: Callable[[Any], None], line: str
) -> None:
    job = Graph(load([Path("params.yaml")])).find("index")
    start = time.monotonic()
    with pytest.raises(PipelineError) as caught:
        execute(job, failing, Runtime(device="cpu", processes=2), force=True)
    assert time.monotonic() - start < 30
    (found,) = caught.value.lines
    assert found.startswith(line)
    assert capfd.readouterr().err.count("Traceback") == (failing is rank_stages.crash)


class TestInference:
    """Blocks are shared among the ranks; the bytes are those of one process."""

    @pytest.mark.parametrize(
        ("stage", "name", "before"),
        [
            ("localization", "cam", "classifier short"),
            ("prediction", "cam", "segmentation cam"),
            ("walk", "cam", "affinity cam"),
            ("features", "short", "classifier short"),
            ("box_maps", "cam", "classifier short"),
        ],
    )
    def test_the_bytes_are_those_of_one_process(self, project: Path, stage: str, name: str, before: str) -> None:
        run_stages(["params.yaml"], before)
        job = Graph(load([Path("params.yaml")])).find(stage, name)
        assert job.processes == 2
        main = partial(rank_stages.in_small_blocks, stage)
        found = []
        for processes in (1, 2):
            execute(job, main, Runtime(device="cpu", workers=1, processes=processes), force=True)
            found.append({path.name: sha256(path) for path in job.outputs.values()})
        assert found[0] == found[1]
        assert not list(job.folder.glob(".checkpoint*"))

    def test_both_ranks_compute_and_it_resumes(self, project: Path) -> None:
        run_stages(["params.yaml"], "classifier short")
        job = Graph(load([Path("params.yaml")])).find("localization", "cam")
        execute(job, partial(rank_stages.in_small_blocks, "localization"), Runtime(device="cpu"), force=True)
        expected = sha256(job.outputs["maps"])
        main = partial(rank_stages.stopped_after_two_blocks, "localization")
        with pytest.raises(PipelineError, match="stopped"):
            execute(job, main, Runtime(device="cpu", processes=2), force=True)
        (folder,) = (path for path in job.folder.glob(".checkpoint*") if not path.name.endswith("-rank-1"))
        first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.part")}
        assert {int(name[:5]) % 2 for name in first} == {0, 1}
        assert len(first) < 6
        main = partial(rank_stages.with_kept_parts, "localization", Path("kept.json").resolve())
        execute(job, main, Runtime(device="cpu", processes=2), force=True)
        assert sha256(job.outputs["maps"]) == expected
        kept = json.loads(Path("kept.json").read_text())
        assert {name: kept[name] for name in first} == first


def test_options_are_divided(project: Path) -> None:
    """Loader processes, threads and memory of the job; each rank has at least a thread."""
    job = Graph(load([Path("params.yaml")])).find("index")
    main = partial(rank_stages.note_runtime, Path("noted").resolve())
    with pytest.raises(PipelineError, match="noted"):
        execute(job, main, Runtime(device="cpu", processes=2, threads=5, workers=5, cache=3.0), force=True)
    for rank in (0, 1):
        assert json.loads(Path(f"noted-{rank}.json").read_text()) == {"threads": 2, "workers": 2, "cache": 1.5}
    assert import_module("pipeline.ranks").place().count == 1
