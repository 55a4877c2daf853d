"""What the Snakefile asks before its first rule: are the params right, and which jobs are stale?

Snakemake judges by modification times, which git, DVC and a copy change, and by records of its own, which a fresh
clone lacks. The manifests know better. So ``plan`` forces the jobs that they call stale, and sets the times of all
others right: Snakemake then runs exactly what the manifests ask for, on any machine.
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from pipeline import params as parameters
from pipeline.errors import PipelineError
from pipeline.graph import Graph, Job, stale
from pipeline.schema import Params
from pipeline.stores import manifest

PARAMS = "params.yaml"
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
        """Every file that the rules make."""
        return [str(path) for job in self.graph.jobs for path in made(job)]

    def blocks(self, *sections: str) -> list[str]:
        """SECTION/NAME of every block; each segmentation has its predictions."""
        of = {section: getattr(self.params, section.replace("predictions", "segmentations")) for section in sections}
        return [f"{section}/{name}" for section, names in of.items() for name in names]

    def runtime(self, wildcards: Any, threads: int) -> str:
        """Arguments of a training stage: with more than two threads, all but two load images beside it."""
        return f"--threads {threads} --workers {max(0, threads - 2)}"

    def record(self) -> None:
        """Tell DVC what is fresh, so that ``dvc repro`` does not do it again.

        Only of a run of params.yaml as it stands, since that is what dvc.yaml describes; DVC records its own runs.
        """
        if self.options or "DVC_STAGE" in os.environ or not Path(".dvc").is_dir() or not shutil.which("dvc"):
            return
        behind = stale(self.graph)
        stages = [stage_of(job) for job in self.graph.jobs if job not in behind and job.stage != "download"]
        done = subprocess.run(["dvc", "commit", "--quiet", "--force", *stages], capture_output=True, text=True)
        if done.returncode:
            print(f"note: DVC did not record this run: {done.stderr.strip()}", file=sys.stderr)


def made(job: Job) -> list[Path]:
    """The job's outputs and their manifest."""
    return [*job.outputs.values(), job.folder / manifest.NAME]


def stage_of(job: Job) -> str:
    """The job's name in dvc.yaml."""
    if job.stage == "evaluation":
        return "evaluate_{}@{}".format(*job.name.split("/"))
    return f"{job.stage}@{job.name}" if job.name else job.stage


def plan(workflow: Any, config: Mapping[str, Any]) -> Plan:
    """Check the params; make Snakemake's schedule follow the manifests.

    Ends the process with status 1 and a line a fault where the params are wrong.
    """
    files, overrides = _sources(workflow.config_settings)
    try:
        graph = Graph(parameters.validate(config, " + ".join(files)))
    except PipelineError as error:
        _refuse(error.lines)
    main = workflow.is_main_process and workflow.dag_settings is not None
    if main:
        if not workflow.output_settings.dryrun:
            _drop_dead_locks(Path(".snakemake"))
        _schedule(graph, workflow.dag_settings)
    cards = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if main and cards and workflow.resource_settings.nodes is None:
        workflow.global_resources.setdefault("gpu", cards)
    given = files != [PARAMS] or overrides
    arguments = ["--params", *files, "--set", json.dumps(overrides)] if given else []
    return Plan(graph, shlex.join(arguments), 8 if cards else 2)


def _refuse(faults: Iterable[str]) -> NoReturn:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(1)


def _sources(settings: Any) -> tuple[list[str], dict[str, Any]]:
    """The params files in the order in which Snakemake lays them on each other, and what --config lays on top."""
    given = [os.path.relpath(path) for path in settings.configfiles]
    base = [] if settings.replace_workflow_config else [PARAMS]
    return [*base, *(name for name in given if name != PARAMS)], dict(settings.config)


def _schedule(graph: Graph, settings: Any) -> None:
    """Force the stale jobs that the targets need; leave no trigger but time, and set the times of all others right."""
    from snakemake.settings.types import RerunTrigger

    behind = stale(graph)
    needed = _needed(graph, {*settings.targets, *settings.forcerun})
    allowed = settings.allowed_rules
    forced = [job for job in behind if job in needed and (not allowed or job.stage in allowed)]
    settings.forcerun = {*settings.forcerun, *(str(made(job)[-1]) for job in forced)}
    settings.rerun_triggers = {RerunTrigger.MTIME}
    _set_times([job for job in graph.jobs if job not in behind])


def _needed(graph: Graph, targets: set[str]) -> list[Job]:
    """The jobs that a run of these targets (files or rules; none: all) may run."""
    if not targets or "all" in targets:
        return graph.jobs
    wanted = {os.path.relpath(target) for target in targets}
    needed: list[Job] = []
    inputs: set[Path] = set()
    for job in reversed(graph.jobs):
        if job.stage in targets or wanted & set(map(str, made(job))) or inputs & set(job.outputs.values()):
            needed.append(job)
            inputs.update(job.inputs.values())
    return needed


def _set_times(fresh: list[Job]) -> None:
    """Where a fresh output is older than an input, as after a checkout, make it as old as the newest input."""
    for job in fresh:
        newest = max((_clock(path).stat().st_mtime_ns for path in job.inputs.values()), default=0)
        for path in made(job):
            if _clock(path).stat().st_mtime_ns < newest:
                os.utime(_clock(path), ns=(newest, newest))


def _clock(path: Path) -> Path:
    """Where Snakemake looks for the time of a file or a folder."""
    stamp = path / ".snakemake_timestamp"
    return stamp if stamp.exists() else path


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
