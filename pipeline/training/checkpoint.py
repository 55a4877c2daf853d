"""Checkpoint and model files. They contain only tensors and plain values; checkpoints are atomic and checksummed."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic

_DIGEST = 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` atomically, preceded by its sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(payload).hexdigest().encode())
        file.write(payload)


def load(path: Path) -> dict[str, Any] | None:
    """Read the state in ``path``; None if the file does not exist.

    Raises:
        PipelineError: the checksum does not match.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    expected, payload = content[:_DIGEST].decode("latin-1"), content[_DIGEST:]
    actual = hashlib.sha256(payload).hexdigest()
    if actual != expected:
        raise PipelineError(
            f"{path}: damaged checkpoint: sha256 is {actual}, expected {expected}; delete it to start over"
        )
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def save_model(path: Path, network: torch.nn.Module, **fields: Any) -> None:
    """Write a trained network's weights, as CPU tensors, and ``fields`` that describe how to rebuild it."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    torch.save({"state": state, **fields}, path)


def load_model(path: Path) -> dict[str, Any]:
    """Read a file of ``save_model``. The stage has already verified its hash."""
    model: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return model
