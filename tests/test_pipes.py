"""Command-line programs whose output nobody reads to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import exit_on_faults
from tests.project import ROOT, environment, link_code

PROGRAMS = [
    ("pipeline.report.per_class", "results"),
    ("pipeline.report.per_class", "--help"),
    ("pipeline.workflow.graph", str(ROOT / "params.yaml")),
    ("pipeline.workflow.dvc",),
    ("pipeline.config.json_schema",),
    ("wsss", "--help"),
    ("wsss", "predict", "--help"),
    ("stages.index", "--help"),
    ("stages.index", "--params", "no.yaml"),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_a_program_without_a_reader_ends_silently(
    program: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    scores = tmp_path / "results/evaluation/maps/cam/scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({"classes": ["a"], "iou": {"a": 0.5}, "miou": 0.5}))
    reader, writer = os.pipe()
    os.close(reader)
    fails = "no.yaml" in program  # its line goes to stderr, which is closed, too
    with subprocess.Popen(
        [sys.executable, "-m", *program],
        env=environment(),
        stdout=writer,
        stderr=writer if fails else subprocess.PIPE,
        text=True,
    ) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=120)
    assert not errors
    assert process.returncode in (
        (1,) if fails else (0, 141) if "--help" in program else (141,)
    )  # argparse ends with 0


def test_another_broken_pipe_is_an_error() -> None:
    with pytest.raises(BrokenPipeError), exit_on_faults():
        raise BrokenPipeError("of a worker")


def test_exit_statuses_stay() -> None:
    for status in (0, 3, 130):
        with pytest.raises(SystemExit) as ended, exit_on_faults():
            sys.exit(status)
        assert ended.value.code == status
