"""Faults injected into stages (kills, errors of the disk, files of limited size, other params), and small projects.

``python -m tests.faults`` imports torch and the stages once, and forks a process for each request that it reads from
stdin. A run therefore takes a fraction of a second and starts from the same state each time.

Python reports every access to the file system to audit hooks. The accesses to the working folder are numbered; a fault
strikes at a number. Libraries in C access files without a report: a limit on the size of files strikes in the midst of
what they write.
"""

import dataclasses
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.stage_table import SECTIONS, STAGES
from pipeline.stores.files import sha256
from pipeline.stores.hashes import CACHE
from pipeline.workflow.graph import Graph, Job
from tests.project import ROOT

RELEASE = Path("release.json")  # of the archives to download, where a test has put some
_CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.chmod")
_READS = ("os.listdir", "os.scandir")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Just before access ``number``, counted from 1 and among those that start with ``among``, it is killed; or the access
    fails if ``errno`` is set, and with ``lasting`` so do all changes that follow, as on a disk that remains full. A
    write beyond ``size`` bytes of a file fails, or kills the run with ``fatal``. With ``other``, the run has other
    params, which change every output.
    """

    number: int = 0
    among: str = ""
    errno: int = 0
    lasting: bool = False
    size: int | None = None
    fatal: bool = False
    other: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, or minus the signal that killed it; and the accesses to its folder."""

    status: int
    out: str
    error: str
    accesses: list[str]


class Server:
    """The process that forks. It runs stages on ``device``, with further command-line ``options``."""

    def __init__(self, device: str = "cpu", *options: str) -> None:
        self.device = device
        self._options = ["--device", device, *options]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, job: Job, fault: Fault = Fault(), tidy: bool = False) -> Outcome:
        """Run a job in a folder.

        Args:
            tidy: exit as a program does, with all that Python and the libraries do then, which takes half a second.
                A run with a limit on the size of files always does.
        """
        request = {"folder": str(folder), "stage": job.stage, "name": job.name, "fault": asdict(fault), "tidy": tidy}
        request["options"] = self._options
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


DEMO = {"train": 6, "evaluation": 2, "size": 48, "seed": 0}
SHORT = {"epochs": 1, "iterations": None, "batch_size": 4, "milestones": [], "warmup": 0}
PARAMS = {
    "experiment": "test",
    "dataset": {"demo": DEMO},
    "defaults": {
        "classifiers": {"accumulate": {"skip_epochs": 0}},
        "pseudo_labels": {"rule": {"threshold": {"background": 0.3}}},  # it labels pixels whatever the maps are
    },
    "mixtures": {"mixed": {"labels": "pseudo_labels/cam", "share": 0.5}},
    "boxes": {"cam": {"model": "classifiers/base"}},
    "box_test": {"masks": "class"},
    "segmentations": {"mixed": {"labels": "mixtures/mixed"}},
    "gallery": 2,
}
TABLES = {  # a table of maps, for which no segmentation network is trained
    "maps": {
        "paper": "OAA",
        "number": "Table 11",
        "title": "Quality of maps",
        "published_on": "VOC",
        "head": ["Strategy"],
        "columns": {"recall": {"score": "maps_recall"}},
        "rows": {"cam": {"text": ["CAM"], "published": {"recall": 36.7}}},
    }
}
UNIQUE = ("seconds", "machine")  # keys of a manifest that differ from run to run


def small_params() -> dict[str, Any]:
    """params.yaml with a tiny demo, short trainings, and only the rows that it takes to run every stage."""
    raw = parameters.read([ROOT / "params.yaml"], PARAMS)
    for blocks in (*raw["defaults"].values(), *(raw.get(section, {}) for section in SECTIONS)):
        for block in (blocks, *blocks.values()):
            if isinstance(block, dict) and "training" in block:
                block["training"] |= SHORT
    rows: list[str] = []
    stages: set[str] = set()
    for row in references.rows(parameters.validate(raw)):
        found = {
            job.stage for job in Graph(parameters.validate({**raw, "rows": [row], "first": [], "method": row})).jobs
        }
        if not found <= stages:
            rows.append(row)
            stages |= found
    params = parameters.validate({**raw, "rows": rows, "first": rows[:1], "method": rows[0]})
    kept = {section: {name: raw[section][name] for name in getattr(params, section)} for section in SECTIONS}
    return {**raw, **kept, "rows": rows, "first": rows[:1], "method": rows[0]}


def put_archives() -> None:
    from tests.release import make_release

    RELEASE.write_text(json.dumps(dataclasses.asdict(make_release(Path("archives").absolute()))))


def put_coco_stuff() -> None:
    from tests.test_coco_stuff import make_source

    make_source()


def put_cub() -> None:
    from tests.test_cub import make_source

    make_source(30)  # so that a list is larger than an image, which is linked


SOURCES = {  # what a stage that creates a dataset needs: its value in params.yaml, and a function that puts its files
    "download": ("voc2012_aug", put_archives),
    "coco_stuff": ("coco", put_coco_stuff),
    "cub": ("CUB_200_2011", put_cub),
}


class Project:
    """A folder in which all jobs of some params have run, and copies of it."""

    def __init__(self, folder: Path, raw: dict[str, Any], server: Server, stages: tuple[str, ...] = ()) -> None:
        self.folder, self.server = folder, server
        (folder / "params.yaml").write_text(json.dumps(raw))
        self.jobs: dict[str, Job] = {}  # the first of each stage
        self.runs: dict[str, Outcome] = {}
        self.graph = Graph(parameters.validate(raw))
        for job in self.graph.jobs:
            if stages and job.stage not in stages:
                continue
            run = server.run(folder, job)
            assert run.status == 0, f"{job.label}: {run.out}{run.error}"
            if job.stage not in self.jobs:
                self.jobs[job.stage], self.runs[job.stage] = job, run
        self.files = contents(folder)

    def needed(self, job: Job) -> dict[str, str]:
        """The hashes of its inputs and outputs, of their manifests, and of all files outside of the results."""
        files = {*job.inputs.values(), *job.outputs.values()}
        folders = {job.folder, *(path.parent for path in job.inputs.values()), self.graph.results / "dataset"}
        files |= {folder / "manifest.json" for folder in folders}
        return {
            name: value
            for name, value in self.files.items()
            if Path(name) in files or not Path(name).is_relative_to(self.graph.results)
        }

    @contextmanager
    def copy(self, job: Job, finished: bool = False, folder: Path | None = None) -> Iterator[Path]:
        """Yield a copy of the job's files, before it has run unless ``finished``.

        The files are links, since stages replace files instead of changing them; on the file system of ``folder``,
        they are copies.
        """
        target = folder or self.folder.with_name("case")
        own = () if finished else (*job.outputs.values(), job.folder / "manifest.json")
        for name in self.needed(job):
            if not any(Path(name).is_relative_to(path) for path in own):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copy2 if folder else os.link)(self.folder / name, target / name)
        try:
            yield target
        finally:
            shutil.rmtree(target)

    def accesses(self, job: Job, finished: bool = False, other: bool = False) -> list[str]:
        """The accesses of an undisturbed run in a copy."""
        with self.copy(job, finished) as folder:
            return self.server.run(folder, job, Fault(other=other)).accesses

    def difference(self, folder: Path, job: Job, allowed: str = "") -> str:
        """Say how a copy differs from the original; empty if it does not. Files that match ``allowed`` may be there."""
        found, expected, lines = contents(folder, self.folder, self.files), self.needed(job), []
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name) and not (allowed and re.search(allowed, name)):
                how = "is left over" if name not in expected else "is lost" if name not in found else "differs"
                lines.append(f"{name} {how}")
        return ", ".join(lines)

    def recovers(self, folder: Path, job: Job, allowed: str = "") -> str:
        """Run the job, and say how its outcome differs from that of an undisturbed run; empty if it does not."""
        run = self.server.run(folder, job)
        if run.status:
            return f"the rerun ends with {run.status}: {run.error}"
        wrong = self.difference(folder, job, allowed)
        return wrong and f"after the rerun {wrong} ({run.out.strip()})"


def contents(folder: Path, same: Path | None = None, known: dict[str, str] | None = None) -> dict[str, str]:
    """The hash of each file; ``known`` has those of the files that are links to files of ``same``."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name.startswith((".lock-", ".hashes")):
            continue
        if known and same and (same / name).exists() and path.samefile(same / name):
            found[name] = known[name]
        elif path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[name] = json.dumps({key: value for key, value in manifest.items() if key not in UNIQUE})
        else:
            found[name] = sha256(path)
    return found


def _serve() -> None:
    import pkgutil

    import pipeline
    import stages
    from pipeline.workflow import closure

    for package in (pipeline, stages):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    import_module("torch._dynamo")  # an optimizer imports it at its first step
    for name in STAGES:
        closure.digest((ROOT / "stages" / f"{name}.py",))  # it caches what it reads
    gc.collect()
    gc.freeze()  # so that the processes share the memory of these modules
    for line in sys.stdin:
        pipes = [os.pipe() for _ in range(3)]  # not files, which a limit on their size would cut
        if (child := os.fork()) == 0:
            return _run(json.loads(line), *(write for _, write in pipes))
        for _, write in pipes:
            os.close(write)
        with ThreadPoolExecutor(len(pipes)) as pool:
            *printed, accesses = pool.map(_read, [read for read, _ in pipes])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, *printed, accesses.splitlines()]), flush=True)


def _read(pipe: int) -> str:
    with open(pipe) as file:
        return file.read()


def _run(request: dict[str, Any], out: int, error: int, accesses: int) -> None:
    from pipeline.workflow import stage

    fault = Fault(**request["fault"])
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), out, error)):
        os.dup2(target, number)
    os.chdir(request["folder"])
    work: Callable[[Any], None] = import_module(f"stages.{request['stage']}").main
    if RELEASE.exists():
        _serve_archives()
    if fault.other:
        _take_other_params(stage)
    _inject(fault, accesses)
    options = [*request["options"], "--threads", "1", "--checkpoint-every", "0"]
    status: Any = 0
    try:
        stage.run(request["stage"], work, [request["name"], *options])
    except SystemExit as end:
        status = end.code
    if fault.size is None and not request["tidy"]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _inject(fault: Fault, log: int) -> None:
    folder, count, process = f"{Path.cwd()}/", 0, os.getpid()
    counting = threading.Lock()  # files are hashed in threads

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        access = _access(event, arguments, folder)
        if access is None or os.getpid() != process:  # a child that reads user-supplied files counts for itself
            return
        with counting:
            os.write(log, f"{access}\n".encode())
            count += access.startswith(fault.among)
            strikes = count == fault.number and access.startswith(fault.among)
        if strikes and not fault.errno:
            os.kill(os.getpid(), signal.SIGKILL)
        follows = fault.lasting and count >= fault.number > 0 and access.startswith("change ")
        if fault.lasting and event in ("os.remove", "os.rmdir"):  # a full disk forbids no removal
            return
        if fault.errno and (strikes or follows):
            raise OSError(fault.errno, os.strerror(fault.errno), access.split(" ", 2)[2])

    sys.addaudithook(hook)
    if fault.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault.fatal else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _access(event: str, arguments: tuple[Any, ...], folder: str) -> str | None:
    """'change EVENT PATH' or 'read EVENT PATH'; None for other events and for files outside of the folder."""
    if event == "open":
        path, _, flags = arguments
        kind = "change" if flags & _WRITE_FLAGS else "read"
    elif event in _CHANGES or event in _READS:
        path, kind = arguments[0], "change" if event in _CHANGES else "read"
    else:
        return None
    if path is None or isinstance(path, int):
        return None
    relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree: to an open folder
    name = os.path.join(folder, os.fsdecode(path))
    if not relative and not name.startswith(folder):
        return None
    file = name.removeprefix(folder)
    if file.startswith(str(CACHE)):  # what it holds depends on the age of the files, and it may be lost at any time
        return None
    return f"{kind} {event} {file}"


def _take_other_params(stage: Any) -> None:
    execute = stage.execute

    def execute_other(job: Any, work: Callable[[Any], None], *arguments: Any) -> None:
        def changed(what: Any) -> None:
            work(what)
            for path in what.outputs.values():
                file = path if path.is_file() else min(path.rglob("*.txt"))
                new = file.with_name(f"{file.name}.other")  # the file itself may be a link
                new.write_bytes(file.read_bytes() + b"\n")
                new.replace(file)

        execute(replace(job, values={**job.values, "other": True}), changed, *arguments)

    stage.execute = execute_other


def _serve_archives() -> None:
    from pipeline.data.download import Archive, Release
    from stages import download

    content = json.loads(RELEASE.read_text())
    archives = {key: Archive(**content.pop(key)) for key in ("voc", "sbd")}
    download.voc2012_aug = lambda: Release(**archives, **content)


if __name__ == "__main__":
    _serve()
