"""SIGKILL at random moments of a stage: what is started again ends with the bytes of an unbroken run."""

import json
import os
import random
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.kill import Trial, compare
from pipeline.config.params import load
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import ground_truth, index
from tests.project import link_code
from tests.voc_tree import make_tree, minimal_params

EPOCHS = {"classifier": 60, "refinement": 90, "segmentation": 120, "one_step": 40, "affinity": 90}
INPUTS = {  # what must have run before a stage
    "refinement": ["classifier drs"],
    "features": ["classifier drs"],
    "localization": ["classifier drs"],
    "affinity": ["classifier drs", "saliency", "pseudo_labels drs"],
    "walk": ["classifier drs", "saliency", "pseudo_labels drs", "affinity drs"],
}
SHORT = {section: {"drs": {"training": {"epochs": 2}}} for section in ("classifiers", "affinities")}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small dataset, its index and masks, and params whose trainings last seconds."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params: dict[str, Any] = minimal_params(make_tree(Path("data"), train=14))
    small = {
        section: {"backbone": {"name": "small"}, "training": {"batch_size": 4, "lr": 0.05, "epochs": epochs}}
        for section, epochs in EPOCHS.items()
    }
    drop = {"attention_drop": {"beta": 0.5, "delta": 0.5}, "accumulate": {"cells": 6, "snapshots": True}}
    head = {"head": {"convs": 1, "channels": 8}}
    slow = {"training": {**small["classifier"]["training"], "lr": 0.005}}
    edam = {"method": {"edam": {"channels": 8, "hidden": 8, "heads": 1}}, **slow}
    params["classifiers"] = {
        "base": {**small["classifier"], **drop, **head},
        "drs": {**small["classifier"], **drop, **head, "suppression": {}},
        "edam": {**small["classifier"], **edam, "accumulate": drop["accumulate"]},
    }
    params["localizations"]["drs"] = {"model": "classifiers/drs"}
    params["refinements"] = {
        "drs": {**small["refinement"], **head, "network": "regression", "source": "classifiers/drs"}
    }
    v2 = {"network": {"deeplab_v2": {"rates": [1, 2], "extra_scales": [0.5]}}, "self_training": True}
    largefov = {"network": {"deeplab_largefov": {"channels": 8, "rate": 2, "dropout": 0.5}}}
    params["segmentations"] = {
        "cam": {**small["segmentation"], **largefov, "labels": "ground_truth"},
        "v2": {**small["segmentation"], **v2, "labels": "ground_truth"},
    }
    body = {"name": "small"}
    narrow = {"channels": 8, "rate": 2, "agm_channels": [8, 8], **head}
    params["one_step"] = {
        "agen": {
            "network": {"agen": {"shared": ["conv2", "conv2"], "grid": 6, "delay": 10, **narrow}},
            "backbones": {"classification": body, "segmentation": body},
            "training": small["one_step"]["training"],
        }
    }
    params["pseudo_labels"]["drs"] = {"source": "classifiers/drs", "rule": "threshold"}
    params["affinities"] = {"drs": {**small["affinity"], "channels": 8, "radius": 3, "labels": "pseudo_labels/drs"}}
    params["walks"] = {"drs": {"affinity": "affinities/drs", "maps": "classifiers/drs"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    return tmp_path


def make_inputs(stage: str) -> None:
    for command in INPUTS.get(stage, []):
        before, *name = command.split()
        run(before, import_module(f"stages.{before}").main, [*name, "--device", "cpu", "--set", json.dumps(SHORT)])


@pytest.mark.parametrize(
    ("stage", "name", "outputs"),
    [
        ("classifier", "base", {"model.pt", "log.json", "maps.h5", "snapshots.h5"}),
        ("classifier", "drs", {"model.pt", "log.json", "maps.h5", "snapshots.h5"}),
        ("classifier", "edam", {"model.pt", "log.json", "maps.h5", "snapshots.h5"}),
        ("refinement", "drs", {"model.pt", "log.json"}),
        ("segmentation", "cam", {"model.pt", "log.json"}),
        ("segmentation", "v2", {"model.pt", "log.json"}),
        ("one_step", "agen", {"model.pt", "log.json"}),
        ("affinity", "drs", {"model.pt", "log.json"}),
    ],
)
def test_a_killed_training_ends_with_the_same_bytes(project: Path, stage: str, name: str, outputs: set[str]) -> None:
    params = load([Path("params.yaml")])
    job = Graph(params).find(stage, name)
    options = ["--params", str(project / "params.yaml"), "--threads", "1", "--device", "cpu"]
    make_inputs(stage)
    unbroken, killed = compare(job, Path("data"), project, options, kills=3, seed=1)
    assert killed.resumptions() >= 1
    assert set(unbroken.hashes()) == outputs
    assert killed.hashes() == unbroken.hashes()
    log = json.loads((killed.folder / job.outputs["log"]).read_text())
    assert [entry["epoch"] for entry in log["epochs"]] == list(range(EPOCHS[stage]))


@pytest.mark.parametrize(("stage", "name"), [("features", "drs"), ("localization", "drs"), ("walk", "drs")])
def test_a_killed_inference_ends_with_the_same_bytes(project: Path, stage: str, name: str) -> None:
    make_inputs(stage)
    job = Graph(load([Path("params.yaml")], SHORT)).find(stage, name)
    options = ["--params", str(project / "params.yaml"), "--set", json.dumps(SHORT), "--device", "cpu"]
    unbroken, killed = (Trial(job, Path("data"), project / kind, options) for kind in ("unbroken", "killed"))
    start = time.monotonic()
    unbroken.run()
    seconds = time.monotonic() - start
    moments = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(killed.command, cwd=killed.folder, start_new_session=True)
        time.sleep(moments.uniform(0.3, 0.9) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed.run()
    assert killed.hashes() == unbroken.hashes()
