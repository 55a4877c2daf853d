"""Snakemake with files dated in the future, as after a copy from a computer whose clock is ahead."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config.schema import Backbone
from pipeline.networks.backbones import build_backbone
from tests.project import copy, run

pytestmark = pytest.mark.slow
DAY = 86400
MODEL = "results/demo/classifiers/base/model.pt"
NOTHING = "Nothing to be done"
ROOT = Path("data/demo")


def advance(*paths: Path) -> None:
    """Date the paths, and all that lies in them, tomorrow."""
    tomorrow = time.time() + DAY
    for path in paths:
        for item in (path, *path.rglob("*")):
            os.utime(item, (tomorrow, tomorrow))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with a user-supplied dataset, saliency store and weights, and one short training."""
    folder = copy(tmp_path / "project", git=False)
    file = folder / "params.yaml"
    params: dict[str, Any] = yaml.safe_load(file.read_text())
    params["dataset"]["demo"] = {"train": 6, "evaluation": 2, "size": 32, "seed": 0}
    block = params["defaults"]["classifiers"]
    block |= {"training": {"epochs": 1, "batch_size": 6, "lr": 0.01}, "augmentation": {}, "head": {"convs": 0}}
    block["backbone"] = {"name": "small", "weights": "weights.pth"}
    file.write_text(yaml.safe_dump(params))
    torch.save(build_backbone(Backbone("small")).state_dict(), folder / "weights.pth")
    run(folder, "snakemake", "--quiet", "all", "--", "results/demo/saliency/maps.h5")
    (folder / "results/demo/saliency/maps.h5").rename(folder / "saliency.h5")
    params["dataset"]["demo"] = None
    params["saliency"] = {"kind": "store", "path": "saliency.h5"}
    file.write_text(yaml.safe_dump(params))
    return folder


def produced(folder: Path, *targets: str) -> None:
    """Run Snakemake; it must succeed, keep the targets and have nothing to do afterwards."""
    run(folder, "snakemake", "--quiet", "all", "--", *targets)
    assert all((folder / target).exists() for target in targets)
    assert NOTHING in run(folder, "snakemake", "--dry-run", "--", *targets)


def test_user_supplied_files_may_be_dated_in_the_future(project: Path) -> None:
    advance(project / "weights.pth", project / "saliency.h5", project / ROOT)
    produced(project, MODEL, "results/demo/saliency/maps.h5")


def test_outputs_and_code_from_a_clock_ahead_are_no_obstacle(project: Path) -> None:
    """What an earlier job wrote stays up to date; what is missing or stale is computed and kept."""
    produced(project, "results/demo/index/index.json")
    advance(project / "results", project / "stages")
    produced(project, MODEL)
    with (project / "stages/index.py").open("a") as file:
        file.write("OTHER = 1\n")
    advance(project / "results", project / "stages")
    assert "rule index" in run(project, "snakemake", "--dry-run", "--", MODEL)
    produced(project, MODEL)


def test_published_outputs_survive_a_failure_of_their_rule(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log's disk is full, for example: ``tee`` fails after the stage has published its outputs."""
    fake = tmp_path / "bin" / "tee"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\ncat\nexit 1\n")
    fake.chmod(0o755)
    index = "results/demo/index/index.json"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
        text = run(project, "snakemake", "--", index, check=False)
    assert "Error in rule index" in text
    assert (project / index).exists()
    assert NOTHING in run(project, "snakemake", "--dry-run", "--", index)
