"""Reading of user-supplied files in a process of its own: damaged ones can crash or hang a library, or fill memory."""

import faulthandler
import resource
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from pipeline import interrupts

SECONDS = 30.0  # in which a file must be read, and
SPEED = 2e6  # bytes per second for the time that its size adds
MEMORY = 4 << 30  # bytes that the process may use in addition to those of its parent

_T = TypeVar("_T")


class Failed(Exception):
    """The process died or did not end in time; the message says which, without the file's name."""


def call(function: Callable[[Path], _T], path: Path) -> _T:
    """Return the value of ``function(path)``, computed in a forked process; its exceptions are raised here.

    The value and the exceptions must be picklable.

    Raises:
        Failed: the process died, or it took too long for the size of the file.
    """
    seconds = SECONDS + (path.stat().st_size / SPEED if path.is_file() else 0)
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compute, args=(sender, function, path), daemon=True)
    with interrupts.shielded():
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise Failed(f"damaged: reading it did not end within {seconds:.0f} s")
        succeeded, value = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise Failed(f"damaged: reading it ended the process ({how})") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise value
    return value


def limit_memory(size: int) -> None:
    """Let this process use ``size`` more bytes of address space than it does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _compute(sender: Connection, function: Callable[[Path], object], path: Path) -> None:
    faulthandler.disable()  # the parent reports a crash
    limit_memory(MEMORY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = True, function(path)
    except Exception as error:
        answer = False, error
    sender.send(answer)
