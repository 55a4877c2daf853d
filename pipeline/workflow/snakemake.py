"""Support for the Snakefile: validate the params, decide which jobs are up to date, and build the rules.

Snakemake compares modification times, which git, DVC and copying change, or its own records, which a fresh clone lacks.
The manifests are more reliable. So ``plan`` sets the modification times to match the manifests, and profiles/default
disables Snakemake's other triggers. Snakemake then runs exactly the stale jobs, on any machine and after any checkout.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from pipeline import cards
from pipeline.config.stage_table import STAGES, Stage
from pipeline.errors import PipelineError, warn
from pipeline.stores import locks, manifest
from pipeline.workflow import cost, dvc, settings
from pipeline.workflow.freshness import keep_outputs, stale
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.left_out import LeftOut

PARAMS = "params.yaml"
SECOND = 10**9  # nanoseconds
FIXES = {  # part of DVC's message -> fix
    "not a git repository": "run: dvc config --local core.no_scm true",
    "Unable to acquire lock": "if the file system has no locks, run: dvc config --local core.hardlink_lock true",
}
_interrupts: list[int] = []  # signals received by this process (Ctrl-C)
_alive: list[IO[str]] = []  # the lock file of this process, kept open until it ends


@dataclass(frozen=True)
class Requests:
    """Finds the jobs of requested files. A file of a job that the graph lacks ends Snakemake.

    Snakemake knows its targets only after it has read the Snakefile, when it asks for the inputs of a target's job.
    """

    workflow: Any
    left_out: LeftOut

    def find(self, stage: str, name: str) -> Job:
        """Return the job, or print a line for each requested job that is left out, or that is unknown, and exit.

        The status is 0 if nothing else was requested, as if all rows had been.
        """
        try:
            return self.left_out.find(stage, name)
        except PipelineError as error:
            targets = self.workflow.dag_settings.targets
            lines = [self.left_out.requested(target) for target in sorted(targets)]
            if targets and all(lines):
                for line in dict.fromkeys(filter(None, lines)):
                    warn(line)
                sys.exit(0)
            _refuse(dict.fromkeys([*error.lines, *filter(None, lines)]))


@dataclass(frozen=True)
class Plan:
    """The contents of the Snakefile's rules."""

    graph: Graph
    options: list[str]  # arguments that pass this run's params files and overrides to the stages
    gpu_slots: int = 0  # of this machine, for jobs to share; 0 on a cluster or without a GPU
    cores: int = 1  # of this machine, for jobs to share
    has_gpu: bool = False  # this machine, or each node of the cluster
    outdated: Sequence[Job] = ()  # the jobs that are not up to date
    unset: Set[str] = frozenset()  # labels of jobs whose inputs' times Snakemake must ignore: see ``_set_times``
    requests: Requests | None = None  # None: no job is requested that the graph lacks

    @property
    def stages(self) -> list[Stage]:
        """The stages that have a job, and those that would have one if no row was left out."""
        names = {job.stage for job in self.graph.jobs}
        return [stage for stage in STAGES.values() if stage.has_many_jobs or stage.name in names]

    @property
    def targets(self) -> list[str]:
        """The manifest of every job. The first report is not needed once the report on all rows is up to date."""
        done = not any(job.stage == "report" for job in self.outdated)
        jobs = (job for job in self.graph.jobs if not (done and job.stage == "first_report"))
        return [str(job.files[-1]) for job in jobs]

    def inputs(self, stage: Stage) -> Any:
        """Return the input function of a rule."""
        from snakemake.io import ancient  # only Snakemake's process has it

        def job_inputs(wildcards: Any) -> list[str]:
            job = (self.requests or self.graph).find(stage.name, _full_name(wildcards))
            paths = [str(path) for path in declared_inputs(job)]
            return list(map(ancient, paths)) if job.label in self.unset else paths

        return job_inputs

    def outputs(self, stage: Stage) -> list[str]:
        """Return the outputs of a rule; the folder of a further seed and the block's name are wildcards."""
        if stage.has_many_jobs:
            folder = f"{self.graph.results}/{{seed}}{stage.folder}/{{name}}"
            return [f"{folder}/{file}" for file in (*stage.writes, manifest.NAME)]
        return [str(path) for path in self.graph.find(stage.name).files]

    def log(self, stage: Stage) -> str:
        """Return the log file of a rule, with the wildcards of its outputs."""
        name = stage.folder or stage.name
        return f"{self.graph.results}/logs/" + (
            f"{{seed}}{name}/{{name}}.log" if stage.has_many_jobs else f"{name}.log"
        )

    def threads(self, stage: Stage) -> Any:
        """Return the number of cores of a rule, or the function that gives it where its jobs differ.

        Without a GPU, each job gets one core, and jobs run in parallel: a second thread shortens a training by only a
        quarter to a third. A job on a GPU of this machine gets the share of the cores that its slots are of all slots,
        but at least two for each process, to start kernels and to load images.

        Snakemake reserves no cores, so a job that needs more of them than another job frees may wait until all others
        have ended. Beside jobs on a GPU of this machine, the others therefore get as many as the smallest of those, or
        more if their stage has few jobs.
        """
        if callable(self.slots(stage)):
            return lambda wildcards: self._cores(self.graph.find(stage.name, _full_name(wildcards)))
        if not self.has_gpu:
            return 1
        if not self.gpu_slots:
            return stage.threads
        jobs = sum(job.stage == stage.name for job in self.graph.jobs)
        return min(stage.threads, max(self._smallest, self.cores // max(1, jobs)))

    def _cores(self, job: Job) -> int:
        """The cores of a job of a stage with ``gpu``."""
        if not self.has_gpu:
            return job.processes
        threads = STAGES[job.stage].threads * job.processes
        share = self.cores * self._slots(job) // self.gpu_slots if self.gpu_slots else threads
        return max(2 * job.processes, min(threads, share))

    @cached_property
    def _smallest(self) -> int:
        """The fewest cores of a job on a GPU."""
        return min((self._cores(job) for job in self.graph.jobs if STAGES[job.stage].gpu), default=self.cores)

    def slots(self, stage: Stage) -> Any:
        """Return the function that gives the slots of GPUs that a job takes (``pipeline.cards``).

        On a cluster, each process of a job takes a card of its own.
        """
        if not stage.gpu:
            return 0
        if not self.gpu_slots and not self._has_several_processes(stage):
            return 1
        return lambda wildcards: self._slots(self.graph.find(stage.name, _full_name(wildcards)))

    def _slots(self, job: Job) -> int:
        if not self.gpu_slots:
            return job.processes
        needed = cards.slots_needed(job.block, self.graph.params.dataset.demo)
        return min(self.gpu_slots, job.processes * cards.attainable(needed, cards.visible(), job.processes))

    def _has_several_processes(self, stage: Stage) -> bool:
        return any(job.processes > 1 for job in self.graph.jobs if job.stage == stage.name)

    def priority(self, stage: Stage) -> Any:
        """Return the function that gives a job its priority: the first rows, the first seed, then seed by seed."""
        first = {job.full_name for job in self.graph.first if job.stage == stage.name}
        prefixes = list(dict.fromkeys(job.prefix for job in self.graph.jobs))[::-1]

        def job_priority(wildcards: Any) -> int:
            return prefixes.index(getattr(wildcards, "seed", "")) + (_full_name(wildcards) in first)

        return job_priority

    def command(self, stage: Stage) -> Any:
        """Return the function that builds the command of a rule from its wildcards, threads and resources."""

        def job_command(wildcards: Any, threads: int, resources: Any) -> str:
            name = [_full_name(wildcards)] if stage.has_many_jobs else []
            processes = self.graph.find(stage.name, *name).processes if stage.gpu else 1
            arguments = stage.arguments(threads, self.has_gpu and stage.gpu, processes)
            if self.gpu_slots and stage.gpu:
                arguments += ["--slots", str(max(1, resources.gpu // processes))]
            return shlex.join(["python", "-m", f"stages.{stage.name}", *name, *arguments, *self.options])

        return job_command

    def record(self) -> None:
        """Record the up-to-date jobs in DVC, so that ``dvc repro`` does not run them again.

        A run with other params files or overrides is not recorded, since dvc.yaml describes params.yaml alone.
        """
        if _interrupts or self.options or not Path(".dvc").is_dir() or not shutil.which("dvc"):
            return
        outdated = [job for job in stale(self.graph) if job.stage not in dvc.EXCLUDED]
        fresh = [job for job in self.graph.jobs if job not in outdated]
        names = [dvc.name_of(job) for job in fresh if job.stage not in dvc.EXCLUDED]
        if not names:
            return
        names.append(dvc.ROWS)
        try:
            if fault := dvc.seeds_fault():
                print(f"note: DVC did not record this run: {fault}", file=sys.stderr)
                return
            dvc.write_rows()
            if not outdated and self.graph.params.dataset.demo:
                # Without names, DVC records all stages and reads dvc.yaml once, not once per name: 18 s, not 4 min.
                dvc.write_placeholders(self.graph)
                names = []
        except OSError as error:
            print(f"note: DVC did not record this run: {error.filename}: {error.strerror}", file=sys.stderr)
            return
        done = subprocess.run(["dvc", "commit", "--force", *names], capture_output=True, text=True)
        if done.returncode:
            reason = next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR: ")), done.stderr.strip()
            )
            fix = next((f"; {text}" for part, text in FIXES.items() if part in reason), "")
            print(f"note: DVC did not record this run: {reason.removeprefix('ERROR: ')}{fix}", file=sys.stderr)


def _full_name(wildcards: Any) -> str:
    """Return the full name of a job: '' if it runs once, else the block's name, after 'seed_N/' of a further seed."""
    return f"{getattr(wildcards, 'seed', '')}{getattr(wildcards, 'name', '')}"


def stage_file(job: Job) -> Path:
    """Return the file of the stage's program."""
    return Path("stages") / f"{job.stage}.py"


def declared_inputs(job: Job) -> list[Path]:
    """Return the inputs that the rule of a job declares: outputs of other jobs, or else the stage's file.

    Its outputs are the job's ``files``. A dataset rule declares only its manifest, since Snakemake deletes declared
    outputs before it runs a rule, which would delete the user's images. Nor is the folder with the report's pictures
    declared, from which the next report takes over those that are still right.

    A manifest replaces a dataset and all that lies in it. User-supplied files are not declared: Snakemake fails a job
    whose input is dated in the future. The manifests record their contents, and ``plan`` checks that they exist.
    """
    written = {path: writer for name, path in job.inputs.items() if (writer := job.writers.get(name))}
    files = [writer.files[-1] if writer.manifest_folder else path for path, writer in written.items()]
    return list(dict.fromkeys(files)) or [stage_file(job)]  # so that there is a time to compare with


def plan(workflow: Any) -> Plan:
    """Validate the params and set the modification times of the outputs to match the manifests.

    If the params are invalid or a user-supplied file is missing, print one line per fault and exit with status 1. All
    of the graph is checked, whatever the requested targets are.
    """
    files, overrides = _params_sources(workflow.config_settings)
    local = not (workflow.remote_exec or workflow.resource_settings.nodes is not None)
    try:
        gpu_slots = cards.total_slots() if local else 0
        # Not Snakemake's own merge of the files: it would mix the settings of two implementations.
        notice = warn if workflow.is_main_process else lambda line: None
        graph = Graph(settings.load([Path(file) for file in files], overrides, notice))
    except PipelineError as error:
        _refuse(error.lines)
    # Snakemake would not suggest a fix, and with --quiet it would print nothing.
    if faults := graph.missing():
        _refuse(faults)
    outdated = stale(graph)
    if not local:
        workflow.global_resources["_cores"] = sys.maxsize  # the cores of this machine do not limit a node's
    unset: set[str] = set()
    if workflow.is_main_process:
        for line in cost.announcement(graph, outdated):
            print(line, file=sys.stderr)
        _note_interrupts()
        if not workflow.output_settings.dryrun:
            _drop_dead_locks(Path(".snakemake"))
            keep_outputs(outdated)
        unset = _set_times(graph, outdated)
        if gpu_slots:
            gpu_slots = workflow.global_resources.setdefault("gpu", gpu_slots).value
            if gpu_slots < 1:  # the stages would use the GPUs all the same
                _refuse(
                    [f"--resources gpu={gpu_slots}: must be at least 1; to compute on the CPU, set {cards.VISIBLE}="]
                )
    customised = files != [PARAMS] or overrides
    options = ["--params", *files, "--set", json.dumps(overrides)] if customised else []
    requests = Requests(workflow, LeftOut([Path(file) for file in files], overrides, graph))
    cores = workflow.resource_settings.cores or 1  # a job that Snakemake starts on a node has no use for it
    return Plan(graph, options, gpu_slots, cores, bool(gpu_slots) or not local, outdated, unset, requests)


def _note_interrupts() -> None:
    """Remember Ctrl-C, so that ``record`` does not delay the exit. The next run records these jobs in DVC."""
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, handle)


def _refuse(faults: Iterable[str]) -> NoReturn:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(1)


def _params_sources(settings: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the params files in the order in which they are merged, and the overrides from --config."""
    configfiles = [os.path.relpath(path) for path in settings.configfiles]
    base = [] if settings.replace_workflow_config else [PARAMS]
    return [*base, *(name for name in configfiles if name != PARAMS)], _typed(dict(settings.config))


def _typed(value: Any) -> Any:
    """Convert texts that are numbers, true, false or null: in lists and mappings, Snakemake leaves them as text."""
    if isinstance(value, Mapping):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    try:
        scalar = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return value if isinstance(scalar, dict | list | str) else scalar


def _set_times(graph: Graph, outdated: list[Job]) -> set[str]:
    """Set the times of outputs: at least as new as the inputs for up-to-date jobs, older for stale jobs.

    No output or stage's file stays in the future, where a clock that is ahead may have put it: Snakemake dates the
    outputs of a job by the clock and fails the job if an input is newer. Setting times is harmless even if other params
    are used, since the next plan sets them again.

    Returns:
        The labels of up-to-date jobs whose outputs look older than their inputs, since the results are read-only.
    """
    unset: set[str] = set()
    now = time.time_ns()
    for job in graph.jobs:
        writers = [writer for name in job.inputs if (writer := job.writers.get(name))]
        sources = {*declared_inputs(job), *(path for writer in writers for path in writer.files)}
        if not writers and _time(stage_file(job)) > now:
            _set_time(stage_file(job), now)
        newest = min(now, max(map(_time, sources)))
        for path in job.files:
            current = _time(path)
            if current and newest and ((current < newest) != (job in outdated) or current > now):
                done = _set_time(path, newest - SECOND if job in outdated else newest)
                if not done and job not in outdated:
                    unset.add(job.label)
    return unset


def _set_time(path: Path, nanoseconds: int) -> bool:
    """Set the modification time of a file. Return whether that is allowed."""
    try:
        os.utime(path, ns=(nanoseconds, nanoseconds))
    except FileNotFoundError:
        pass  # a stage of another run may be replacing it
    except OSError:
        return False
    return True


def _time(path: Path) -> int:
    """Return the modification time in nanoseconds; 0 if the file does not exist or cannot be accessed."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _drop_dead_locks(folder: Path) -> None:
    """Remove the locks that a killed Snakemake left behind.

    Every running Snakemake holds a shared lock on one file. If the file system has no locks, a running Snakemake cannot
    be distinguished from a killed one, and nothing is removed.
    """
    folder.mkdir(exist_ok=True)
    file = (folder / "alive").open("a")
    warning = "the locks that a killed Snakemake leaves are not removed; then run snakemake --unlock"
    if locks.take(file, warning) is locks.Lock.HELD:
        shutil.rmtree(folder / "locks", ignore_errors=True)
    locks.take(file, warning, shared=True, wait=True)
    _alive.append(file)
