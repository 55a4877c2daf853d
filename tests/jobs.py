"""The jobs of the params.yaml in the working folder: which are outdated, and running one in this process."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import load
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.workflow.freshness import stale
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.stage import execute
from tests.project import environment, respect_modes


def graph(**overrides: Any) -> Graph:
    return Graph(load([Path("params.yaml")], overrides))


def outdated(**overrides: Any) -> set[str]:
    return {job.label for job in stale(graph(**overrides))}


def perform(job: Job, force: bool = False) -> None:
    execute(job, import_module(f"stages.{job.stage}").main, Runtime(device="cpu", threads=1), force)


def refused(job: Job, force: bool = True) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        perform(job, force)
    return caught.value.lines


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with modes that bind root, too."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        preexec_fn=respect_modes,
        capture_output=True,
        text=True,
        timeout=120,
    )
