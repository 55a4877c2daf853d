"""Checkpoints and models as files that are whole, unharmed and hold nothing but tensors and plain values."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import PipelineError
from pipeline.stores.files import atomic

_DIGEST = 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` behind its own sha256, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(payload).hexdigest().encode())
        file.write(payload)


def load(path: Path) -> dict[str, Any] | None:
    """The state in ``path``, or None where there is no such file.

    Raises:
        PipelineError: the bytes are not those that were saved.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    expected, payload = content[:_DIGEST].decode("latin-1"), content[_DIGEST:]
    found = hashlib.sha256(payload).hexdigest()
    if found != expected:
        raise PipelineError(
            f"{path}: damaged checkpoint: sha256 is {found}, saved as {expected}; delete it to start over"
        )
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def save_model(path: Path, network: torch.nn.Module, **fields: Any) -> None:
    """Write a trained network's weights on the CPU with what is needed to build it again."""
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    torch.save({"state": state, **fields}, path)


def load_model(path: Path) -> dict[str, Any]:
    """What ``save_model`` wrote. The stage frame has checked its hash."""
    model: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return model
