"""Execution options and hardware detection. Nothing here may change a result."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Runtime:
    """Execution options. They never change results, so they are not part of the checkpoint key."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N
    workers: int = 0  # extra processes that load and label images; 0: the main process does it
    threads: int = 0  # arithmetic threads; 0: all cores that the process may use
    checkpoint_every: float = 60.0  # seconds between two checkpoints


def gpus() -> int:
    """Count the NVIDIA cards without loading CUDA."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
