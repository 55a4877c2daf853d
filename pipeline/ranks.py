"""The processes of a job that uses several GPUs, or several processes of a CPU: ``training.processes`` of its network.

Rank 0 is the stage's own process. It alone locks, checks the inputs, writes and publishes. It starts the other ranks,
which run the same function of the stage, each on a GPU of its own, until they have computed their part of the job; then
they ``leave``. All ranks are processes of one machine.

If a rank fails or is killed, rank 0 kills the others and ends with the message of the one that failed. If rank 0 is
killed, the others exit. Signals reach rank 0 alone, which agrees with the others on when to stop.

This module does not import torch.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from pipeline import arithmetic, cards, interrupts
from pipeline.errors import PipelineError

_GRACE = 10.0  # seconds for a rank that has lost the connection to another to learn how that one has ended
_NOTICE = 5.0  # seconds for rank 0 to notice that another rank has failed, before it is ended
_LAST = 60.0  # seconds for the other ranks to end after rank 0 has all that it needs
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset")  # parts of torch's messages


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks of its job."""

    rank: int = 0
    count: int = 1
    port: int = 0  # of rank 0, on this machine
    listener: socket.socket | None = None  # of this port, in rank 0

    def part(self, size: int, unit: int = 1) -> slice:
        """Return this rank's part of ``size`` items; it may be empty. Ranks split no ``unit`` of consecutive items.

        All parts but the last ones have the same length.
        """
        units = -(-size // unit)
        length = -(-units // self.count) * unit
        return slice(min(self.rank * length, size), min((self.rank + 1) * length, size))

    def loaded(self, size: int, unit: int = 1) -> slice:
        """Return this rank's part of a batch, or the first unit if the part is empty.

        A rank without a part computes these images without any effect, so that it joins in what ranks do together.
        """
        part = self.part(size, unit)
        return part if part.start < part.stop else slice(0, min(unit, size))


_place = Place()
_ranks: "list[_Rank]" = []  # the other ranks, in rank 0


def place() -> Place:
    """Return this process's place; rank 0 of 1 outside of ``started``."""
    return _place


def leave() -> None:
    """End this process if it is not rank 0: its part is done."""
    if _place.rank:
        raise SystemExit(0)


def working(rank: int) -> bool:
    """Whether a rank still computes its part.

    Raises:
        PipelineError: it has failed.
    """
    other = next(each for each in _ranks if each.number == rank)
    status = other.status()
    if status:
        raise other.failure()
    return status is None


class _Rank:
    """Another rank, as rank 0 sees it."""

    def __init__(self, number: int, process: BaseProcess, errors: Connection, label: str) -> None:
        self.number, self.process, self.errors, self.label = number, process, errors, label
        self._lock = threading.Lock()  # two threads may ask for the status, and only one can collect it
        self._failure: PipelineError | None = None

    def status(self, timeout: float = 0.0) -> int | None:
        """Return the exit status, after at most ``timeout`` seconds; None if the rank has not ended."""
        if not wait([self.process.sentinel], timeout):
            return None
        with self._lock:
            self.process.join()
            return self.process.exitcode

    def failure(self) -> PipelineError:
        """Return the error that ended the rank, or one that says how it ended."""
        with self._lock:
            self._failure = self._failure or self._read() or PipelineError(self._how())
        return self._failure

    def _read(self) -> PipelineError | None:
        try:
            return PipelineError(*self.errors.recv()) if self.errors.poll() else None
        except (EOFError, OSError):
            return None

    def _how(self) -> str:
        code = self.process.exitcode or 0
        who = f"{self.label}: process {self.number + 1} of {_place.count}"
        if code == -signal.SIGKILL:
            return f"{who} was killed, probably because memory ran out; allow more memory or lower training.processes"
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{who} ended unexpectedly ({how}); run the stage with training.processes 1 to see why"


@contextmanager
def started(function: Callable[[Any], None], work: Any, label: str) -> Iterator[Any]:
    """Start the other ranks of a job, which call ``function``; yield the argument for rank 0.

    Loader processes, threads and memory are divided among the ranks. The outputs of the others go to folders beside the
    checkpoint, which are deleted with it.

    Args:
        function: a function of a module, such as the ``main`` of a stage.
        work: its argument, a ``Work`` of ``pipeline.workflow.stage``. With one process it is yielded as it is.
        label: the job, for messages.

    Raises:
        PipelineError: there are fewer GPUs or cores than processes, or another rank failed.
    """
    runtime, count = work.runtime, work.runtime.processes
    if count == 1:
        yield work
        return
    global _place
    names = cards.reserve(runtime.device, runtime.slots, count)
    runtime = replace(
        runtime,
        threads=max(1, runtime.threads // count),
        workers=runtime.workers // count,
        cache=None if runtime.cache is None else runtime.cache / count,
    )
    work = replace(work, runtime=runtime)
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener:
        _place = Place(0, count, listener.getsockname()[1], listener)
        try:
            for number in range(1, count):
                _ranks.append(_start(function, work, replace(_place, rank=number, listener=None), names, label))
            cards.adopt(runtime.device, names[0])
            with _watched():
                yield work
                _await_end()
        finally:
            _kill()
            _ranks.clear()
            _place = Place()


def _start(function: Callable[[Any], None], work: Any, where: Place, names: list[str], label: str) -> _Rank:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (function, work, where, names[where.rank], sender)
    process = context.Process(target=_run, args=arguments, daemon=False)
    resource_tracker.ensure_running()  # starting it would end the shield
    with interrupts.shielded():
        process.start()
    sender.close()
    return _Rank(where.rank, process, receiver, label)


def _await_end() -> None:
    """Wait until all other ranks have left."""
    end = time.monotonic() + _LAST
    for each in _ranks:
        status = each.status(max(0.0, end - time.monotonic()))
        if status is None:
            raise PipelineError(f"{each.label}: process {each.number + 1} of {_place.count} did not end; run it again")
        if status:
            raise each.failure()


def _kill() -> None:
    for each in _ranks:
        if each.process.is_alive():
            each.process.kill()
    for each in _ranks:
        each.process.join(_GRACE)
        each.errors.close()


@contextmanager
def _watched() -> Iterator[None]:
    """End the block with the error of the first other rank that fails, even while it waits for that rank."""
    failed: list[_Rank] = []
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(failed, ended), daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if not _lost_connection(error):
            raise
        end = time.monotonic() + _GRACE
        while not failed and time.monotonic() < end:
            time.sleep(0.05)
        if not failed:
            raise
        raise failed[0].failure() from None
    finally:
        ended.set()
        thread.join()


def _watch(failed: list[_Rank], ended: threading.Event) -> None:
    """Kill all other ranks when one of them fails, and end this process if it does not notice."""
    running = {each.process.sentinel: each for each in _ranks}
    while running and not ended.is_set():
        wait(list(running), 0.1)
        done = {sentinel: each for sentinel, each in running.items() if each.status() is not None}
        running = {sentinel: each for sentinel, each in running.items() if sentinel not in done}
        failed += [each for each in done.values() if each.status()]
        if failed:
            for each in running.values():
                each.process.kill()
            if not ended.wait(_NOTICE):
                for line in failed[0].failure().lines:
                    print(f"error: {line}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def _run(function: Callable[[Any], None], work: Any, where: Place, name: str, errors: Connection) -> None:
    """Compute the part of a rank other than 0."""
    global _place
    _place = where
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # rank 0 reports
    cards.adopt(work.runtime.device, name)
    folder = work.checkpoint.with_name(f"{work.checkpoint.name}-rank-{where.rank}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with arithmetic.recording():
            function(replace(work, outputs={key: folder / path.name for key, path in work.outputs.items()}))
    except PipelineError as error:
        errors.send(error.lines)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if _lost_connection(error):  # another rank has failed, and rank 0 kills this one as soon as it knows
            time.sleep(2 * _GRACE)
        raise


def _lost_connection(error: RuntimeError) -> bool:
    return any(part in str(error) for part in _LOST)


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
