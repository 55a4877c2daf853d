"""What the Snakefile asks before its first rule: are the params right, and what is up to date?

Snakemake judges by modification times, which git, DVC and a copy change, or by records of its own, which a fresh clone
lacks. The manifests know better. So ``plan`` makes the times say what the manifests say, and profiles/default leaves
Snakemake no other trigger: it then runs what is stale and nothing else, on any machine, after any checkout.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from pipeline import runtime
from pipeline.config import params as parameters
from pipeline.config.stage_table import STAGES, Stage
from pipeline.errors import PipelineError
from pipeline.stores import locks, manifest
from pipeline.workflow import dvc
from pipeline.workflow.graph import Graph, Job, stale

PARAMS = "params.yaml"
SECOND = 10**9  # nanoseconds
FIXES = {  # of what DVC may say
    "not a git repository": "run: dvc config --local core.no_scm true",
    "Unable to acquire lock": "where the file system has no locks, run: dvc config --local core.hardlink_lock true",
}
_interrupted: list[int] = []  # the signals of this process, Ctrl-C
_alive: list[IO[str]] = []  # the lock of this process, held until it ends


@dataclass(frozen=True)
class Plan:
    """What the Snakefile asks: which rules there are, and what is in them."""

    graph: Graph
    options: list[str]  # the stages' arguments that repeat how this run was given its params
    ample: bool  # a GPU is at hand, or the nodes of a cluster are

    @property
    def stages(self) -> list[Stage]:
        """Those that have a job."""
        return [STAGES[name] for name in dict.fromkeys(job.stage for job in self.graph.jobs)]

    @property
    def targets(self) -> list[str]:
        """The manifest of every job."""
        return [str(rule_files(job)[-1]) for job in self.graph.jobs]

    def inputs(self, stage: Stage) -> Any:
        """Of a rule's jobs, by their wildcards; a dataset stands for its manifest."""
        homes = {job.outputs["root"]: rule_files(job)[-1] for job in self.graph.jobs if job.home}

        def of(wildcards: Any) -> list[str]:
            job = self.graph.find(stage.name, getattr(wildcards, "name", ""))
            # What reads nothing still has a time to compare with: its program's.
            return [str(homes.get(path, path)) for path in job.inputs.values()] or [str(program(job))]

        return of

    def outputs(self, stage: Stage) -> list[str]:
        """Of a rule, with the block's name as a wildcard."""
        job = next(job for job in self.graph.jobs if job.stage == stage.name)
        return [self._pattern(stage, path, job) for path in rule_files(job)]

    def log(self, stage: Stage) -> str:
        name = stage.folder or stage.name
        return str(self.graph.results / "logs" / (f"{name}/{{name}}.log" if stage.several else f"{name}.log"))

    def threads(self, stage: Stage) -> int:
        """On a plain processor most stages get a single thread, and their jobs run side by side: a second one saves a
        quarter to a third of a training's time, not half."""
        return stage.threads if self.ample else stage.local_threads

    def command(self, stage: Stage) -> Any:
        """Of a rule's jobs, by their wildcards and threads."""

        def of(wildcards: Any, threads: int) -> str:
            name = [wildcards.name] if stage.several else []
            return shlex.join(["python", "-m", f"stages.{stage.name}", *name, *stage.arguments(threads), *self.options])

        return of

    def record(self) -> None:
        """Tell DVC what is fresh, so that ``dvc repro`` does not do it again.

        Only of a run of params.yaml as it stands, since that is what dvc.yaml describes.
        """
        if _interrupted or self.options or not Path(".dvc").is_dir() or not shutil.which("dvc"):
            return
        behind = stale(self.graph)
        fresh = [job for job in self.graph.jobs if job not in behind]
        names = [dvc.name_of(job) for job in fresh if job.stage not in dvc.UNKNOWN]
        if not names:
            return
        dvc.write_rows()
        names.append(dvc.ROWS)
        if not behind and self.graph.params.dataset.demo:
            # Without names DVC records all that dvc.yaml states, and reads it once, not once a name: 18 s, not 4 min.
            dvc.stand_in(self.graph)
            names = []
        done = subprocess.run(["dvc", "commit", "--force", *names], capture_output=True, text=True)
        if done.returncode:
            reason = next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR: ")), done.stderr.strip()
            )
            fix = next((f"; {text}" for part, text in FIXES.items() if part in reason), "")
            print(f"note: DVC did not record this run: {reason.removeprefix('ERROR: ')}{fix}", file=sys.stderr)

    def _pattern(self, stage: Stage, path: Path, job: Job) -> str:
        folder = self.graph.results / stage.folder
        return str(folder / "{name}" / path.relative_to(folder / job.name)) if stage.several else str(path)


def program(job: Job) -> Path:
    return Path("stages") / f"{job.stage}.py"


def rule_files(job: Job) -> list[Path]:
    """The files that the job's rule names. Of a dataset its manifest alone: Snakemake deletes what a rule is to make,
    and nobody's images may go that way."""
    return [*(() if job.home else job.outputs.values()), job.folder / manifest.NAME]


def plan(workflow: Any) -> Plan:
    """Check the params; make the files' times follow the manifests.

    Ends the process with status 1 and a line a fault where the params are wrong, or a file that the user supplies is
    missing, whichever part of the graph is asked for.
    """
    files, overrides = _sources(workflow.config_settings)
    try:
        # Not Snakemake's own merger of the files: it mixes the settings of two implementations that a key can name.
        graph = Graph(parameters.load([Path(file) for file in files], overrides, resolve=True))
    except PipelineError as error:
        _refuse(error.lines)
    # Snakemake would not say how to fix it, and with --quiet nothing at all.
    if faults := graph.missing():
        _refuse(faults)
    cards = runtime.gpus()
    if workflow.is_main_process:
        _note_interrupts()
        if not workflow.output_settings.dryrun:
            _drop_dead_locks(Path(".snakemake"))
        _set_times(graph)
        if cards and workflow.resource_settings.nodes is None:
            workflow.global_resources.setdefault("gpu", cards)
    given = files != [PARAMS] or overrides
    options = ["--params", *files, "--set", json.dumps(overrides)] if given else []
    return Plan(
        graph, options, ample=bool(cards or workflow.remote_exec or workflow.resource_settings.nodes is not None)
    )


def _note_interrupts() -> None:
    """After Ctrl-C a person waits for the stages to save their state, not for DVC: the next run records it."""
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupted.append(number)
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, handle)


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
        sources = [
            file for path in job.inputs.values() for file in (rule_files(makers[path]) if path in makers else [path])
        ]
        newest = max(map(_time, sources or [program(job)]))
        for path in rule_files(job):
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

    Every living one holds a shared lock on one file. Where the file system has no locks, a living one cannot be told
    from a killed one, and nothing is removed.
    """
    folder.mkdir(exist_ok=True)
    file = (folder / "alive").open("a")
    unguarded = "the locks that a killed Snakemake leaves are not removed; then run snakemake --unlock"
    if locks.take(file, unguarded) is locks.Lock.HELD:
        shutil.rmtree(folder / "locks", ignore_errors=True)
    locks.take(file, unguarded, shared=True, wait=True)
    _alive.append(file)
