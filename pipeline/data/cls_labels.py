"""Safe reader of cls_labels.npy (psa, irn): a pickled dict {image id: float32[K]}, read without executing its code.

numpy would execute whatever the pickle contains. Here the few constructors that such a file needs are replaced by
plain records, and any other name in the pickle is refused.
"""

import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.stores.files import read_regular

_NUMBERS = {"b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"}


class _Dtype:
    """Stand-in for numpy.dtype that records its name and byte order."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name
        self.order: Any = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stand-in for numpy.ndarray: shape, dtype and bytes (a list for the object array around the dict)."""

    shape: Any = None
    dtype: Any = None
    data: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.data = state


def _array(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes, which pickle protocols below 3 store as latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _numbers(dtype, data)[0].item()


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it would run {module}.{name}, which does not belong in a label file")
        return _KNOWN[module, name]


def _numbers(dtype: Any, data: Any) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype) or dtype.name not in _NUMBERS or not isinstance(data, bytes):
        raise ValueError("it holds something other than numeric arrays")
    order = dtype.order if dtype.order in ("<", ">", "|") else "<"
    return np.frombuffer(data, np.dtype(order + dtype.name))


def load(path: Path) -> dict[str | int, NDArray[Any]]:
    """Load a dict from a file name, id (psa: '2007_000032') or number (irn: 2007000032) to a vector of K values.

    A value is positive where the class is present. Damaged bytes can exhaust the memory: see ``stores.isolated``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, is not such a dict, or contains anything but numeric arrays.
    """
    data = read_regular(path)
    try:
        return _content(BytesIO(data))
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise ValueError(f"not a label file like cls_labels.npy: {error or type(error).__name__}") from None


def _content(file: BinaryIO) -> dict[str | int, NDArray[Any]]:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if shape != () or dtype.kind != "O":
        raise ValueError("it holds an array, not a dict")
    outer = _Unpickler(file).load()
    content = outer.data[0] if isinstance(outer, _Array) and isinstance(outer.data, list) and outer.data else None
    if not isinstance(content, dict):
        raise ValueError("it does not hold a dict")
    vectors = {}
    for key, value in content.items():
        if not isinstance(key, str | int) or not isinstance(value, _Array):
            raise ValueError(f"entry {key!r:.80} is not an image id with an array")
        vectors[key] = _numbers(value.dtype, value.data)
    return vectors
