"""What may happen to a worker process, to a stage that publishes, and to a folder.

Spawned workers import this module, which loads no torch.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.stores.files import publish


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def bus_error() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def hang() -> None:
    time.sleep(600)


def compute() -> None:
    end = time.monotonic() + 6
    while time.monotonic() < end:
        pass


def call(harm: Callable[[], object]) -> int:
    harm()
    return os.getpid()


@contextmanager
def killed_while_publishing(published: int) -> Iterator[list[Path]]:
    """Interrupt the stage in the block after its first ``published`` outputs, or else before its manifest.

    Yields:
        The outputs that were published.
    """
    done: list[Path] = []

    def dying(path: Path, temporary: Path) -> None:
        if len(done) == published:
            raise KeyboardInterrupt
        publish(path, temporary)
        done.append(path)

    def dead(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.workflow.stage.publish", dying)
        patch.setattr("pipeline.workflow.stage.manifest.write", dead)
        try:
            yield done
        except KeyboardInterrupt:
            return
    raise AssertionError("the stage published all of its outputs")


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.relative_to(Path.cwd()) if path.is_absolute() else path))  # a long path would be refused


ODD: dict[str, Callable[[Path], Any]] = {  # entries of a folder, placed at a path, that are no regular files
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to the folder above": lambda path: path.symlink_to(".."),
    "a FIFO": os.mkfifo,
    "a socket": _listen,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}
