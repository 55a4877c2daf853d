"""The frame of every stage: command line, checks of the inputs, locking, atomic outputs and the manifest."""

import argparse
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline import arithmetic, cards, ranks
from pipeline.config import params as parameters
from pipeline.config.reader import quoted
from pipeline.config.registry import plain
from pipeline.config.stage_table import STAGES
from pipeline.errors import PipelineError, disk_faults, exit_on_faults
from pipeline.memory import shortage
from pipeline.runtime import Runtime, default_cores, deterministic_only
from pipeline.stores import kept, locks, manifest
from pipeline.stores.files import partial, publish
from pipeline.stores.hashes import fingerprint
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph, Job, missing
from pipeline.workflow.left_out import LeftOut


@dataclass(frozen=True)
class Work:
    """The argument of a stage's function, which must write every path in ``outputs``.

    These paths are temporary, except a dataset's folder: that may be a mount point or a link, which cannot be renamed,
    and may hold files of the user.
    """

    job: Job
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    runtime: Runtime
    key: str  # hash of parameters, inputs and code; part of the checkpoint's name
    checkpoint: Path  # file, folder or prefix for the state of a long stage; deleted on success


def run(stage: str, work: Callable[[Work], None], arguments: list[str] | None = None) -> None:
    """Run one job of ``stage`` from the command line. Faults in the input are printed, and the exit status is 1."""
    with exit_on_faults():
        options = _parser(stage).parse_args(arguments)
        files = [Path(name) for name in options.params]
        overrides = _overrides(options.set)
        graph = Graph(parameters.load(files, overrides))
        job = LeftOut(files, overrides, graph).find(stage, options.name)
        parameters.check(job.block, " + ".join(options.params))
        entry = STAGES[stage]
        on_gpu = entry.gpu and options.device != "cpu" and bool(cards.visible())
        threads, workers = entry.shares(default_cores(entry, job.processes), on_gpu, job.processes)
        runtime = Runtime(
            device=options.device,
            processes=job.processes,
            slots=options.slots or cards.slots_needed(job.block, graph.params.dataset.demo),
            workers=(workers or 0) if options.workers is None else options.workers,
            threads=options.threads or threads or job.processes,
            checkpoint_every=options.checkpoint_every,
            cache=_gigabytes(options.cache),
            deterministic=options.deterministic,
        )
        with _reported(job):
            execute(job, work, runtime, options.force)


@contextmanager
def _reported(job: Job) -> Iterator[None]:
    """Turn errors of the disk, of memory and of ``--deterministic`` into PipelineErrors."""
    folder = job.outputs["root"] if job.manifest_folder else job.folder
    with disk_faults(folder), shortage(job.label, _less_memory(job)), deterministic_only(job.label):
        yield


def _as_rank(function: Callable[[Work], None], work: Work) -> None:
    """Run a stage's function in a rank other than 0."""
    with _reported(work.job):
        function(work)


def _less_memory(job: Job) -> str:
    """The parameters that reduce the memory of a job."""
    if STAGES[job.stage].trains:
        block = f"{job.section}.{job.name}"
        return f"reduce {block}.training.batch_size (and raise accumulation) or {block}.augmentation.crop"
    return "reduce dataset.working_megapixels"


def _overrides(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"--set {quoted(text)}: not JSON: {error}") from None
    if not isinstance(overrides, dict):
        raise PipelineError(f'--set {quoted(text)}: must be a mapping such as {{"seed": 5}}')
    return overrides


def _gigabytes(text: str) -> float | None:
    """Read the value of --cache; None for the default."""
    try:
        value = float(text or "nan")
    except ValueError:
        value = -1.0
    if value < 0 or math.isinf(value):
        raise PipelineError(f"--cache {quoted(text)}: must be a number of GB of at least 0 (also in WSSS_CACHE)")
    return None if math.isnan(value) else value


def _parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}")
    parser.add_argument("name", nargs="?", default="", help="the block to run, if the stage has several")
    parser.add_argument(
        "--params", nargs="+", default=["params.yaml"], metavar="FILE", help="params files; later ones take precedence"
    )
    parser.add_argument("--set", default="{}", metavar="JSON", help="overrides, merged over the params files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--slots", type=int, default=0, help="slots of a GPU to take; 0: as many as the block needs")
    parser.add_argument("--workers", type=int, help="processes that load or label images")
    parser.add_argument(
        "--threads", type=int, default=0, help="arithmetic threads; both default to Snakemake's and DVC's"
    )
    parser.add_argument("--checkpoint-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument(
        "--cache",
        default=os.environ.get("WSSS_CACHE", ""),
        metavar="GB",
        help="memory for decoded training images, 0: none; default: WSSS_CACHE, or a share of the free memory",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        default=bool(os.environ.get("WSSS_DETERMINISTIC")),
        help="on CUDA, compute the same bytes in every run, more slowly; also if WSSS_DETERMINISTIC is set",
    )
    parser.add_argument("--force", action="store_true", help="run even if the outputs are up to date")
    return parser


def execute(job: Job, work: Callable[[Work], None], runtime: Runtime, force: bool = False) -> None:
    """Run the job unless its outputs are up to date; then publish the outputs and their manifest.

    Raises:
        PipelineError: an input is missing, or it does not match its manifest; or the results cannot be written to.
    """
    start = time.monotonic()
    kept.restore(job.files)
    if _skip(job, force):  # before the lock, which read-only results do not have
        return
    with _lock(job):
        if _skip(job, force):
            return
        if "SLURM_JOB_ID" in os.environ:
            node = os.environ.get("SLURMD_NODENAME", platform.node())
            print(f"{job.label}: SLURM job {os.environ['SLURM_JOB_ID']} on {node}", flush=True)
        if runtime.processes > 1:
            cards.require(runtime.device, runtime.processes)
        inputs = _check_inputs(job)
        code = job.code
        key = _key(job, inputs, code)
        in_place = job.manifest_folder is not None
        temporary = {name: path if in_place else _temporary(job, path) for name, path in job.outputs.items()}
        for path in temporary.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if in_place:
            manifest.remove(job.folder)
        checkpoint = job.folder / f".checkpoint-{job.stage}-{key[:16]}"
        task = Work(job, job.inputs, temporary, runtime, key, checkpoint)
        with arithmetic.recording():
            with ranks.started(functools.partial(_as_rank, work), task, job.label) as mine:
                work(mine)
            used = arithmetic.used()
        # Hash this job's own files: without locks, another experiment may replace a shared one once it is published
        hashes = {job.key(path): fingerprint(temporary[name]) for name, path in job.outputs.items()}
        if not in_place:
            manifest.remove(job.folder)
            for name, path in job.outputs.items():
                publish(path, temporary[name])
        manifest.write(
            job.folder,
            stage=job.label,
            params=plain(job.params),
            inputs=inputs,
            outputs=hashes,
            code=code,
            seconds=round(time.monotonic() - start, 1),
            machine=manifest.host(),
            arithmetic=used,
        )
        _remove_state(job)
    print(f"{job.label}: done in {time.monotonic() - start:.1f} s", flush=True)


def _skip(job: Job, force: bool) -> bool:
    """Return whether there is nothing to do, and say so."""
    fresh = not force and is_fresh(job, {})
    if fresh:
        print(f"{job.label}: up to date", flush=True)
        _tidy(job)
    return fresh


def _remove_state(job: Job, key: str = "") -> None:
    """Remove checkpoints of the job, or only those with this key, and the outputs that are kept for it."""
    kept.drop(job.files)
    for old in job.folder.glob(f".*checkpoint-{job.stage}-{key[:16]}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _tidy(job: Job) -> None:
    """Remove what a run that was killed after it had published left behind. Other params' checkpoints remain."""
    record = manifest.read(job.folder) or {}
    with suppress(OSError):  # the results may be read-only
        _remove_state(job, _key(job, record["inputs"], job.code))


def _check_inputs(job: Job) -> dict[str, str]:
    datasets = {writer for writer in job.writers.values() if writer.manifest_folder}
    unfinished = {writer for writer in datasets if manifest.read(writer.folder) is None}
    faults = [
        f"{path}: is not finished; run the stage {writer.label} (again)"
        for writer in unfinished
        for path in writer.outputs.values()
    ]
    absent, hashes = missing(job), {}
    for name, path in job.inputs.items():
        writer = job.writers.get(name)
        try:
            if writer in unfinished:
                continue
            if path in absent:
                faults.append(absent[path])
            elif writer is None or writer in datasets:
                hashes[name] = job.fingerprint(name) if path.is_dir() else manifest.verify(path)
            else:
                hashes[name] = manifest.verify(path, required=True)
        except PipelineError as error:
            faults.extend(error.lines)
    if faults:
        raise PipelineError(*dict.fromkeys(faults))
    return hashes


def _key(job: Job, inputs: dict[str, str], code: str) -> str:
    import hashlib

    text = json.dumps([job.label, plain(job.params), inputs, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


_UNGUARDED = "two processes could run the same block at the same time; start each block only once"


def _temporary(job: Job, path: Path) -> Path:
    """Return the temporary path of an output. Experiments that share a file each have their own."""
    return partial(path.with_name(f"{path.name}.{job.folder.name}") if path in _shared(job) else path)


def _shared(job: Job) -> list[Path]:
    """Return the outputs that jobs of other experiments write, too: metrics.json or a dataset."""
    return [path for path in job.outputs.values() if path.parent != job.folder]


@contextmanager
def _lock(job: Job) -> Iterator[None]:
    """Hold the locks of the job and of the outputs that it shares with other experiments.

    Wait if another process holds one, such as a stage that outlived a killed Snakemake.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = (job.folder / f".lock-{job.stage}").open("a+")
    except OSError as error:
        raise PipelineError(
            f"{error.filename}: cannot be written to ({error.strerror}), and {job.label} is not up to date; "
            "make the folder writable, or set another experiment"
        ) from None
    with ExitStack() as stack:
        stack.enter_context(_hold(lock, job.label))
        for path in _shared(job):
            with suppress(PermissionError):  # the folder around a dataset may belong to someone else
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_hold(path.with_name(f".lock-{path.name}").open("a+"), job.label))
        yield


@contextmanager
def _hold(lock: IO[str], label: str) -> Iterator[None]:
    with lock as file:
        if locks.take(file, _UNGUARDED) is locks.Lock.BUSY:
            file.seek(0)
            print(f"{label}: waiting for process {file.read().strip()}, which is at work on it", flush=True)
            locks.take(file, _UNGUARDED, wait=True)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


SILENCE = 30.0  # seconds


def progress(items: Any, label: str, total: int | None = None) -> Any:
    """Iterate over items with a progress bar on a terminal, or printed lines in a log.

    A line follows every tenth of the items, and the first item that ends after ``SILENCE`` seconds without a line.
    """
    total = len(items) if total is None else total
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, desc=label, total=total, leave=False)
    return _lines(items, label, total)


def _lines(items: Any, label: str, total: int) -> Iterator[Any]:
    step = max(1, -(-total // 10))
    shown = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if number % step == 0 or number == total or time.monotonic() - shown > SILENCE:
            shown = time.monotonic()
            print(f"{label}: {number}/{total}", flush=True)
