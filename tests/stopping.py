"""What tests share that stop and kill stages: each stage has a process group of its own and prints to ``LOG``."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from pipeline.stores.files import sha256

CLASSIFIER = Path("results/test/classifiers/base")
LOG = Path("log.txt")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def copy_without(done: Path, folder: Path, *outputs: Path) -> Path:
    """Copy a project, whose stages are done, to folder/project, without the outputs of those to run again."""
    project = folder / "project"
    shutil.copytree(done, project, symlinks=True)
    for path in outputs:
        shutil.rmtree(project / path)
    return project


def log() -> str:
    return LOG.read_text() if LOG.exists() else ""


def wait_until(process: subprocess.Popen[bytes], when: Callable[[], object]) -> None:
    """Wait until the condition holds; fail if the process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, log()
        assert time.monotonic() < deadline, log()
        time.sleep(0.01)


def group(leader: int) -> list[str]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            found += [path.parent.name] if group == str(leader) and state != "Z" else []
    return found


def wait_until_none_is_left(leader: int) -> None:
    """Wait until the whole group has ended; fail after 20 s.

    multiprocessing's resource tracker and orphaned workers end once they notice that the stage has ended.
    """
    deadline = time.monotonic() + 20
    while left := group(leader):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def hashes(folder: Path, suffixes: Collection[str] = (".pt", ".h5")) -> dict[str, str]:
    """The hash of each file in the folder with one of these suffixes, by name."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.suffix in suffixes}
