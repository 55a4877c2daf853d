"""Worker processes that cannot hang their stage: one that is killed, or that stops working, ends it with one line."""

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

PATIENCE = 40  # seconds without a result, without computation and without a read from the disk
_TICKS = 2  # clock ticks of computation: a worker that decodes an image uses more, one that waits in vain less
_GRACE = 10  # seconds for the main thread to notice that its workers are gone


class Workers:
    """The processes that were started within ``started``, and a watch over them while their parent waits.

    Workers that are slow are left alone: one that computes, or that the system keeps in a read (state D), is at work.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._processes: list[BaseProcess] = []
        self._waiting = threading.Event()
        self._ended = threading.Event()
        self._stalled = False

    @contextmanager
    def started(self) -> Iterator[None]:
        """Take charge of the processes that the block starts; they never see Ctrl-C or SIGTERM."""
        before = set(active_children())
        with interrupts.shielded():
            yield
        self._processes += set(active_children()) - before

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch over the workers until the block ends; none outlives it."""
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
        """Mark that the parent can go on only once a worker has delivered."""
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

    def gone(self) -> bool:
        """Whether one of them ended before its time."""
        return any(process.exitcode is not None for process in self._processes)

    def failure(self) -> PipelineError:
        """Kill the workers that are left; what happened to those that are gone, in one line."""
        ended = wait([process.sentinel for process in self._processes], _GRACE)
        for process in self._processes:
            for _ in range(100):
                if process.sentinel not in ended or process.exitcode is not None:
                    break
                time.sleep(0.01)  # an executor's thread may be taking its status at this moment
        codes = [process.exitcode for process in self._processes if process.exitcode]
        self.kill()
        if self._stalled:
            return PipelineError(self._stall())
        names = {signal.Signals(-code).name for code in codes if code < 0}
        if "SIGBUS" in names:
            why = "found no room in /dev/shm; enlarge it, as by docker run --shm-size 1g, or use fewer --workers"
        elif "SIGKILL" in names:
            why = "was killed, as the system does where memory runs out; use fewer --workers, or allow more memory"
        else:
            how = ", ".join(sorted(names)) or f"exit status {codes[0]}" if codes else "no exit status"
            why = f"ended unexpectedly ({how}); run the stage with --workers 0 to see why"
        return PipelineError(f"{self.label}: a worker process {why}")

    def _stall(self) -> str:
        return (
            f"{self.label}: the worker processes delivered nothing and did nothing for {PATIENCE} s; "
            "run the stage again, with fewer --workers if it repeats"
        )

    def _watch(self) -> None:
        """Count seconds that pass while this process runs: a suspended stage (Ctrl-Z) is not one that hangs."""
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
            if idle == PATIENCE and not self.gone():  # a dead one the main thread finds by itself
                self._stalled = True
                for process in self._processes:
                    process.kill()
            if idle == PATIENCE + _GRACE:  # a worker may have died within a message that the main thread now reads
                print(f"error: {self._stall()}", file=sys.stderr, flush=True)
                os._exit(1)


def _state(pid: int | None) -> tuple[str, int]:
    """The state of a process (R, S, D, T, Z; none once it is gone) and the clock ticks that it has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[11]) + int(fields[12])
