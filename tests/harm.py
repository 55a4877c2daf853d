"""What may happen to a worker process. Spawned workers import this module, which loads no torch."""

import os
import signal
import time
from collections.abc import Callable


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
