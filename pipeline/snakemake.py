"""What the Snakefile asks before its first rule: are the params right, and what is up to date?

Snakemake judges by modification times, which git, DVC and a copy change, or by records of its own, which a fresh clone
lacks. The manifests know better. So ``plan`` makes the times say what the manifests say, and profiles/default leaves
Snakemake no other trigger: it then runs what is stale and nothing else, on any machine, after any checkout.
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from pipeline import params as parameters
from pipeline import references
from pipeline.errors import PipelineError
from pipeline.graph import Graph, Job, stale, weight_files
from pipeline.schema import Params
from pipeline.stores import manifest

PARAMS = "params.yaml"
DVC_RUNS = "DVC_STAGE"  # DVC sets it for its commands: they force their one rule and record it themselves
SECOND = 10**9  # nanoseconds
_alive: list[IO[str]] = []  # the lock of this process, held until it ends


@dataclass(frozen=True)
class Plan:
    """What the rules need to know of the params."""

    graph: Graph
    options: str  # the stages' arguments that repeat how this run was given its params
    threads: int  # of a stage that trains or infers

    @property
    def params(self) -> Params:
        return self.graph.params

    @property
    def targets(self) -> list[str]:
        """The manifest of every job."""
        return [str(made(job)[-1]) for job in self.graph.jobs]

    def blocks(self, *sections: str) -> list[str]:
        """SECTION/NAME of every block; each segmentation and one-step network has its predictions."""
        rows = references.rows(self.params)
        of = {section: rows if section == "predictions" else getattr(self.params, section) for section in sections}
        return [f"{section}/{name}" for section, names in of.items() for name in names]

    def network(self, wildcards: Any) -> str:
        """SECTION/NAME of the network that makes predictions/NAME."""
        return references.rows(self.params)[wildcards.name]

    def weights(self, section: str) -> Callable[[Any], list[str]]:
        """Of a rule that trains: the files that the block's backbones start from."""
        blocks = getattr(self.params, section)
        return lambda wildcards: list(map(str, weight_files(blocks[wildcards.name]).values()))

    def runtime(self, wildcards: Any, threads: int) -> str:
        """Arguments of a training stage: with more than two threads, all but two load images beside it."""
        return f"--threads {threads} --workers {max(0, threads - 2)}"

    def record(self) -> None:
        """Tell DVC what is fresh, so that ``dvc repro`` does not do it again.

        Only of a run of params.yaml as it stands, since that is what dvc.yaml describes; DVC records its own runs.
        """
        if self.options or DVC_RUNS in os.environ or not Path(".dvc").is_dir() or not shutil.which("dvc"):
            return
        behind = stale(self.graph)
        fresh = [job for job in self.graph.jobs if job not in behind]
        stages = [stage_of(job) for job in fresh if job.stage not in ("download", "coco_stuff")]
        if not stages:
            return
        # Without names DVC records all that dvc.yaml states, and reads it once, not once a name: 18 s, not 4 minutes.
        names = stages if behind or self.params.dataset.demo is None else []
        done = subprocess.run(["dvc", "commit", "--quiet", "--force", *names], capture_output=True, text=True)
        if done.returncode:
            print(f"note: DVC did not record this run: {done.stderr.strip()}", file=sys.stderr)


def made(job: Job) -> list[Path]:
    """The files that the job's rule names. Of a dataset its manifest alone: Snakemake deletes what a rule is to make,
    and nobody's images may go that way."""
    return [*(() if job.home else job.outputs.values()), job.folder / manifest.NAME]


def stage_of(job: Job) -> str:
    """The job's name in dvc.yaml."""
    if job.origin == "one_step":
        verb = {"prediction": "predict", "evaluation": "evaluate"}[job.stage]
        return f"{verb}_one_step@{job.name.removeprefix('predictions/')}"
    if job.stage == "evaluation":
        return "evaluate_{}@{}".format(*job.name.split("/"))
    return f"{job.stage}@{job.name}" if job.name else job.stage


def plan(workflow: Any) -> Plan:
    """Check the params; make the files' times follow the manifests.

    Ends the process with status 1 and a line a fault where the params are wrong, or a file that a person brings is
    missing, whichever part of the graph is asked for.
    """
    files, overrides = _sources(workflow.config_settings)
    try:
        # Not Snakemake's own merger of the files: it mixes the settings of two implementations that a key can name.
        resolve = DVC_RUNS not in os.environ  # DVC runs a stage at a time, and each reads its own settings
        graph = Graph(parameters.load([Path(name) for name in files], overrides, resolve))
    except PipelineError as error:
        _refuse(error.lines)
    # Snakemake would not tell the mend, with --quiet nothing at all.
    if faults := graph.missing():
        _refuse(faults)
    cards = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if workflow.is_main_process:
        if not workflow.output_settings.dryrun:
            _drop_dead_locks(Path(".snakemake"))
        if DVC_RUNS not in os.environ:
            _set_times(graph)
        if cards and workflow.resource_settings.nodes is None:
            workflow.global_resources.setdefault("gpu", cards)
    given = files != [PARAMS] or overrides
    arguments = ["--params", *files, "--set", json.dumps(overrides)] if given else []
    # On a processor two trainings of one thread each are done before one after the other with two: a second thread
    # saves a quarter to a third of a training's time, not half. DVC runs a stage at a time.
    threads = 8 if cards else 2 if DVC_RUNS in os.environ else 1
    return Plan(graph, shlex.join(arguments), threads)


def _refuse(faults: Iterable[str]) -> NoReturn:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(1)


def _sources(settings: Any) -> tuple[list[str], dict[str, Any]]:
    """The params files in the order in which Snakemake lays them on each other, and what --config lays on top."""
    given = [os.path.relpath(path) for path in settings.configfiles]
    base = [] if settings.replace_workflow_config else [PARAMS]
    return [*base, *(name for name in given if name != PARAMS)], dict(settings.config)


def _set_times(graph: Graph) -> None:
    """Make the outputs of fresh jobs as new as the inputs where they are older, and those of stale jobs older.

    The change is harmless, even by a dry run with other params: the next plan sets the times as it needs them.
    """
    behind = stale(graph)
    makers = {path: job for job in graph.jobs for path in job.outputs.values()}
    for job in graph.jobs:
        sources = [file for path in job.inputs.values() for file in (made(makers[path]) if path in makers else [path])]
        newest = max(map(_time, sources or [Path(job.code[0])]))
        for path in made(job):
            time = _time(path)
            if time and newest and (time < newest) != (job in behind):
                time = newest - SECOND if job in behind else newest
                with suppress(FileNotFoundError):  # another run's stage may be about to make it anew
                    os.utime(path, ns=(time, time))


def _time(path: Path) -> int:
    """Nanoseconds; 0 where there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _drop_dead_locks(folder: Path) -> None:
    """Remove the locks that a killed Snakemake left behind.

    Every living one holds a shared lock on one file, which the system frees when its process ends, however it ends.
    """
    folder.mkdir(exist_ok=True)
    file = (folder / "alive").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder / "locks", ignore_errors=True)
    except BlockingIOError:
        pass
    fcntl.flock(file, fcntl.LOCK_SH)
    _alive.append(file)
