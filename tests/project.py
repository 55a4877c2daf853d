"""A copy of this project in a folder of a test's own, to run Snakemake and DVC in."""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from pipeline.config.params import load
from pipeline.runtime import Runtime
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.stage import execute

ROOT = Path(__file__).parent.parent
PARTS = [
    "Snakefile",
    "profiles",
    "dvc.yaml",
    "params.yaml",
    "pipeline",
    "stages",
    ".dvcignore",
    ".gitignore",
    "environment.yml",
]
TOOLS = Path(sys.executable).parent  # where snakemake and dvc lie
DVC_CONFIG = "[core]\n    analytics = false\n    autostage = false\n"


def copy(folder: Path, git: bool) -> Path:
    """The project's files in ``folder``; DVC works without git where ``git`` is false."""
    folder.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(DVC_CONFIG + ("" if git else "    no_scm = true\n"))
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    return folder


def link_code(folder: Path) -> None:
    """Link the project's code into ``folder``, so that stages can be started there."""
    for part in ("pipeline", "stages", "wsss"):
        (folder / part).symlink_to(ROOT / part)


def environment() -> dict[str, str]:
    """This process's, with this environment's tools first, a git author, and nothing of a DVC or git around it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_"))}
    person = {"NAME": "test", "EMAIL": "test@localhost"}
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in person.items()}
    return {**kept, **who, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: str, check: bool = True) -> str:
    """stdout and stderr of a command of the environment's, run in ``folder``."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


def run_stages(files: list[str], until: str = "report") -> None:
    """Run the jobs of the params files in this process, in the working folder, without Snakemake.

    A process a job would spend most of its time importing torch: a profile has hundreds of jobs.

    Args:
        until: the label of the job to run, with all that it is made of.
    """
    graph = Graph(load([Path(file) for file in files]))
    makers = {path: job for job in graph.jobs for path in job.outputs.values()}
    done: set[str] = set()

    def run_after_inputs(job: Job) -> None:
        if job.label in done:
            return
        done.add(job.label)
        for path in job.inputs.values():
            if path in makers:
                run_after_inputs(makers[path])
        execute(job, import_module(f"stages.{job.stage}").main, Runtime(device="cpu", threads=1))

    run_after_inputs(next(job for job in graph.jobs if job.label == until))


def respect_modes() -> None:
    """Make file modes bind root, too; the ``preexec_fn`` of a subprocess."""
    drop_from_bounding_set, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if os.geteuid() == 0:
        for capability in (override, search):
            if ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0):
                raise OSError("this root cannot drop its capabilities")
