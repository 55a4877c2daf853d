"""Execution options and hardware detection.

``slots``, ``workers``, ``helpers``, ``checkpoint_every`` and ``cache`` never change a result. ``device``,
``processes``, ``threads`` and ``deterministic`` choose the arithmetic of the networks: a training with another device,
or another number of processes or threads, adds in another order, which its many steps amplify. Inference and label
stages have given the same bytes with one thread and with two; the number of processes does not matter to them. No
option is part of a job's key, so that results remain valid on other machines; ``pipeline.arithmetic`` records what was
used.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline import cards, memory
from pipeline.config.stage_table import Stage
from pipeline.errors import PipelineError

CACHE_SHARE = 0.5  # of the free memory, for the decoded images of the trainings that use all cores


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Execution options; see above for those that results depend on."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N
    processes: int = 1  # that share the job, each on a GPU of its own; see ``pipeline.ranks``
    slots: int = 1  # of a GPU; see ``pipeline.cards``
    workers: int = 0  # extra processes that load and label images; 0: the main process does it
    helpers: int = 0  # extra processes that compute for the losses of a training, which are no longer among the workers
    threads: int = 1  # arithmetic threads
    checkpoint_every: float = 60.0  # seconds between two checkpoints; slow ones are written less often
    cache: float | None = None  # GB of memory for decoded training images; None: a share of the free memory
    deterministic: bool = False  # on CUDA, use only kernels that give the same bytes in every run


@contextmanager
def deterministic_only(where: str) -> Iterator[None]:
    """Turn torch's error for an operation without a deterministic kernel into a PipelineError that names it."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split()[0]
        raise PipelineError(
            f"{where}: --deterministic: {operation} has no deterministic form on CUDA; run without --deterministic"
        ) from error


def cache_budget(runtime: Runtime) -> int:
    """Return the bytes of memory that a training may use for decoded images.

    By default they are a share of the free memory: that of the processor cores which the training uses, so that
    several trainings at a time do not exceed it together.
    """
    if runtime.cache is not None:
        return int(runtime.cache * 1e9)
    cores = len(os.sched_getaffinity(0))
    used = runtime.threads + runtime.workers + runtime.helpers
    return int(CACHE_SHARE * memory.available() * min(1, used / cores))


def default_cores(stage: Stage, processes: int = 1) -> int:
    """Return the number of cores of a job under DVC and by hand.

    It is the one that Snakemake uses on this machine, so that all three end with the same bytes.
    """
    cores = min(len(os.sched_getaffinity(0)), stage.threads * processes if cards.visible() else 1)
    return max(processes, cores)
