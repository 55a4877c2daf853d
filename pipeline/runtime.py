"""How to run: nothing here may change a result."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Runtime:
    """No parameter of the result and no part of a checkpoint's key."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N
    workers: int = 0  # processes beside the main one that load and label images; 0: none
    threads: int = 0  # of the arithmetic; 0: as many as the process may use
    checkpoint_every: float = 60.0  # seconds


def gpus() -> int:
    """The number of NVIDIA cards, without loading CUDA."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
