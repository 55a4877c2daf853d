"""Reads state dicts from files, also from the checkpoints in which public code wraps them."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError

# Keys under which public code saves a state dict, most specific first; 'state' is that of model.pt.
WRAPPERS = ("state", "state_dict", "model_state_dict", "model_state", "model", "network", "net", "backbone", "encoder")
DEPTH = 3  # maximum number of nested wrappers
FIX = "save one with torch.save(model.state_dict(), ...)"
# First bytes of files that are often mistaken for weights.
_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"<", "a web page, which some servers send instead of a large file; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with git lfs pull"),
    (b"\x12\x01\x00\x00\x00\x00\x00\x00", "MXNet parameters; convert them to a PyTorch state dict"),
    (b"\x89HDF", "HDF5, as Keras writes it; convert it to a PyTorch state dict"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
)
_SAFETENSORS = re.compile(rb"^.{6}\x00\x00\{", re.DOTALL)  # 64-bit length of the header, then JSON
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file that torch.save or numpy.savez wrote; usual wrappers around it are opened.

    Only tensors, arrays and plain Python values are unpickled, so that a file cannot run code.

    Raises:
        PipelineError: the file is missing or damaged, or it does not hold exactly one state dict that can be used.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise PipelineError(f"{path}: contains no state dict but a {type(content).__name__}; {FIX}")
    found = dict(_state_dicts(content, ()))
    if not found:
        raise PipelineError(f"{path}: contains no state dict but {_describe(content)}; {FIX}")
    best = min(map(_rank, found))
    chosen = [place for place in found if _rank(place) == best]
    if len(chosen) > 1:
        names = ", ".join(".".join(place) for place in chosen[:5])
        raise PipelineError(
            f"{path}: contains {len(chosen)} state dicts ({names}); {FIX.replace('one', 'one of them')}"
        )
    return {name: torch.as_tensor(value) for name, value in found[chosen[0]].items()}


def _rank(place: tuple[str, ...]) -> tuple[int, ...]:
    """Order of preference among state dicts: known wrappers before others, in the order of WRAPPERS."""
    return tuple(WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS) for key in place)


def _state_dicts(content: Mapping[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the mappings of names to tensors or arrays inside ``content``, with the keys that lead to them."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and _is_tensor(value)}
    inner = (
        [] if len(place) == DEPTH else [(key, value) for key, value in content.items() if isinstance(value, Mapping)]
    )
    nested = [found for key, value in inner if isinstance(key, str) for found in _state_dicts(value, (*place, key))]
    if tensors and not nested:
        yield place, tensors
    yield from nested


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _describe(content: Mapping[Any, Any]) -> str:
    keys = [f"{key} ({type(value).__name__})" for key, value in list(content.items())[:5]]
    return f"the keys {', '.join(keys)}{', ...' if len(content) > 5 else ''}" if keys else "an empty mapping"


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(32)
        for magic, kind in _FORMATS:
            if start.startswith(magic):
                raise PipelineError(f"{path}: is {kind}")
        if _SAFETENSORS.match(start):
            raise PipelineError(
                f"{path}: is a safetensors file; convert it with torch.save(safetensors.torch.load_file(...), ...)"
            )
        if zipfile.is_zipfile(path) and _is_npz(path):
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PipelineError(f"{path}: is missing; set backbone.weights to a file, 'imagenet' or null") from None
    except PipelineError:
        raise
    except Exception as error:  # damaged files raise many types, from UnpicklingError to AssertionError
        if named := _GLOBAL.search(str(error)):
            raise PipelineError(
                f"{path}: contains more than tensors ({named[1]}), which is not unpickled, since it could run code; "
                "load it where you trust it, and use torch.save(model.state_dict(), ...)"
            ) from None
        raise PipelineError(
            f"{path}: is damaged or contains more than tensors; use torch.save(model.state_dict(), ...)"
        ) from error


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _numpy_globals() -> list[Any]:
    """The functions and classes that pickled arrays of numbers name; none of them runs other code."""
    reconstruct = np.array(0).__reduce__()[0]  # numpy.core.multiarray._reconstruct, or numpy._core's
    kinds = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")
    return [
        reconstruct,
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


_NUMPY = _numpy_globals()
