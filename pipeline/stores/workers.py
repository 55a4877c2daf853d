"""Watchdog for worker processes: one that dies or stalls ends the stage with a one-line error instead of a hang."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline import interrupts
from pipeline.errors import PipelineError

PATIENCE = 40  # seconds without a result, CPU use or disk reads after which the workers count as stalled
_TICKS = 2  # CPU clock ticks that count as progress: decoding an image takes more, idle waiting less
_GRACE = 10  # seconds for the main thread to notice that its workers have died


class Workers:
    """The worker processes started within ``started``; while the parent waits for them, a thread checks for stalls.

    Slow workers are tolerated: one that uses the CPU or is blocked in disk I/O (process state D) is not stalled.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._processes: list[BaseProcess] = []
        self._waiting = threading.Event()
        self._ended = threading.Event()
        self._stalled = False

    @contextmanager
    def started(self) -> Iterator[None]:
        """Track the processes that the block starts, and shield them from Ctrl-C and SIGTERM."""
        before = set(active_children())
        with interrupts.shielded():
            yield
        self._processes += set(active_children()) - before

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the workers during the block and kill the remaining ones at its end."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.kill()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the block in which the parent waits for a result."""
        self._waiting.set()
        try:
            yield
        finally:
            self._waiting.clear()

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(_GRACE)

    def gone(self, timeout: float = 0.0) -> bool:
        """Whether any worker has exited, or does so within ``timeout`` seconds.

        The connections of a worker that dies break before the kernel reports its exit.
        """
        return bool(wait([process.sentinel for process in self._processes], timeout))

    def failure(self) -> PipelineError:
        """Kill the remaining workers and return an error that says why the others died."""
        ended = wait([process.sentinel for process in self._processes], _GRACE)
        for process in self._processes:
            for _ in range(100):
                if process.sentinel not in ended or process.exitcode is not None:
                    break
                time.sleep(0.01)  # a thread of the executor may be reaping the process at this moment
        codes = [process.exitcode for process in self._processes if process.exitcode]
        self.kill()
        if self._stalled:
            return PipelineError(self._stall())
        names = {signal.Signals(-code).name for code in codes if code < 0}
        if "SIGBUS" in names:
            why = "ran out of space in /dev/shm; enlarge it (e.g. docker run --shm-size 1g) or use fewer --workers"
        elif "SIGKILL" in names:
            why = "was killed, probably because memory ran out; use fewer --workers or allow more memory"
        else:
            how = ", ".join(sorted(names)) or f"exit status {codes[0]}" if codes else "no exit status"
            why = f"ended unexpectedly ({how}); run the stage with --workers 0 to see why"
        return PipelineError(f"{self.label}: a worker process {why}")

    def _stall(self) -> str:
        return (
            f"{self.label}: the worker processes stalled: no result and no activity for {PATIENCE} s; "
            "run the stage again, with fewer --workers if this repeats"
        )

    def _watch(self) -> None:
        """Count idle seconds by ticks of this process, so that a suspended stage (Ctrl-Z) does not count as stalled."""
        idle, computed = 0, -_TICKS
        while not self._ended.wait(1):
            if not self._waiting.is_set():
                idle = 0
                continue
            states = [_state(process.pid) for process in self._processes]
            ticks = sum(ticks for _, ticks in states)
            if any(state == "D" for state, _ in states) or ticks - computed >= _TICKS:
                idle, computed = 0, ticks
                continue
            idle += 1
            if idle == PATIENCE and not self.gone():  # the main thread detects a dead worker by itself
                self._stalled = True
                for process in self._processes:
                    process.kill()
            if idle == PATIENCE + _GRACE:  # the main thread may be reading a message that a worker never completed
                print(f"error: {self._stall()}", file=sys.stderr, flush=True)
                os._exit(1)


def _state(pid: int | None) -> tuple[str, int]:
    """Process state (R, S, D, T, Z; empty once it is gone) and CPU clock ticks used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])
