"""Ctrl-C and SIGTERM (of SLURM, Docker, ``timeout``): a stage stops where nothing is lost and says how to resume.

``stages/__init__.py`` calls ``listen`` in a process that was started as ``python -m stages.NAME``. From then on either
signal raises ``Stopped`` in the main thread: at once, or, within ``deferred``, at the next ``check``. Worker processes
are started within ``shielded`` and never see the signals, since the step or block at work still needs them.
"""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEATED = 1.0  # seconds: ``timeout`` sends its signal twice, to the process and to its group; a person is slower


class Stopped(SystemExit):
    """The process was asked to stop. It exits with 128 + the signal's number, as shells report it: 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


_number: int | None = None  # the signal that came first
_time = -math.inf  # when the last one came
_deferrals = 0


def listen() -> None:
    """Handle both signals in this process from now on. Call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _number, _time
    first, repeated = _number is None, time.monotonic() - _time < _REPEATED
    _time = time.monotonic()
    if first:
        _number = number
        command = shlex.join(["python", *sys.orig_argv[1:]])
        text = f"stopping on {signal.Signals(number).name}; to resume, run the same command again: {command}\n"
        with suppress(OSError):  # not print: the signal may have come within one, and its reader may have ended
            os.write(2, text.encode())
    if not repeated and not (first and _deferrals):
        raise Stopped(number)


def requested() -> bool:
    """Whether one of the signals has come."""
    return _number is not None


def check() -> None:
    """Raise ``Stopped`` if one of the signals has come."""
    if _number is not None:
        raise Stopped(_number)


@contextmanager
def deferred() -> Iterator[None]:
    """After a signal, let the block reach its next ``check``. One more, a second later or after, ends it at once."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    check()


@contextmanager
def shielded() -> Iterator[None]:
    """Start processes that never receive the signals. Only SIGKILL or their parent's end stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say(line: str) -> None:
    """Print a line of a stage that may be stopping, whose reader (``| tee``) the same Ctrl-C may have ended."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        if not requested():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
