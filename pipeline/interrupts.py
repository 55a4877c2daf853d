"""Handling of Ctrl-C and SIGTERM (from SLURM, Docker, ``timeout``): a stage saves its state and says how to resume.

``stages/__init__.py`` calls ``listen`` in a process that was started as ``python -m stages.NAME``. From then on, either
signal raises ``Stopped`` in the main thread: immediately, or at the next ``check`` if the code runs under ``deferred``.
Worker processes start under ``shielded`` and never receive the signals, since the current step or block needs them.
"""

import io
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
# Seconds within which a second signal is ignored: ``timeout`` signals both the process and its group. A user is slower.
_REPEATED = 1.0


class Stopped(SystemExit):
    """Exit on request, with the status that shells use: 128 + the signal's number (130 or 143)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


_number: int | None = None  # the first signal received
_time = -math.inf  # when the last signal arrived
_deferrals = 0


def listen() -> None:
    """Install the handler for both signals, and write whole lines. Call this in the main thread.

    With ``python -u`` or ``PYTHONUNBUFFERED=1``, ``print`` writes a line and its end separately, and the handler's own
    line could come between them.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)
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
        with suppress(OSError):  # not print: the signal may have interrupted one, or the pipe may be closed
            os.write(2, text.encode())
    if not repeated and not (first and _deferrals):
        raise Stopped(number)


def requested() -> bool:
    """Whether a signal has arrived."""
    return _number is not None


def check() -> None:
    """Raise ``Stopped`` if a signal has arrived."""
    if _number is not None:
        raise Stopped(_number)


@contextmanager
def deferred() -> Iterator[None]:
    """Delay a signal until the next ``check``. Another signal, at least a second later, stops immediately."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    check()


@contextmanager
def shielded() -> Iterator[None]:
    """Block the signals in processes that are started here. Only SIGKILL or the end of their parent stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say(line: str) -> None:
    """Print a line, even if the Ctrl-C that stops the stage has also ended the reader of its output (``| tee``)."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        if not requested():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
