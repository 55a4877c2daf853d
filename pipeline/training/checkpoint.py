"""Checkpoint and model files. They contain only tensors and plain values; checkpoints are atomic and checksummed."""

import io
from pathlib import Path
from typing import IO, Any, cast

import torch

from pipeline.stores import sealed


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` atomically, with its checksum. No more than one tensor is copied at a time."""
    with sealed.writing(path) as file:
        torch.save(state, cast(IO[bytes], file))


def load(path: Path) -> dict[str, Any] | None:
    """Read the state in ``path``; None if the file does not exist.

    Raises:
        PipelineError: the file is damaged.
    """
    try:
        payload = sealed.read(path)
    except FileNotFoundError:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def save_model(path: Path, network: torch.nn.Module, **fields: Any) -> None:
    """Write a trained network's weights, as CPU tensors, and ``fields`` that describe how to rebuild it."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    buffer = io.BytesIO()  # if the disk is full, ``torch.save`` raises an error that does not say so
    torch.save({"state": state, **fields}, buffer)
    path.write_bytes(buffer.getbuffer())


def load_model(path: Path) -> dict[str, Any]:
    """Read a file of ``save_model``. The stage has already verified its hash."""
    model: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return model
