"""Strategies that damage valid files, by their bytes or by their structure."""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import strategies as st

IDS = ("img_000", "img 1 north", "2007_000032", "000000000139")
CLASSES = ("cat", "dog", "potted plant", "fish, small")

TOKENS = {
    "json": [b"[" * 3000, b'{"a":' * 3000, b"1e999", b"NaN", b"true", b"9" * 5000, b'"\\ud800"', b'"\\u0000"', b"null"],
    "csv": [b'"', b"\n", b",", b"x" * 140_000, b"\0", b"9" * 5000],
    "txt": [b" ", b"\n", b"\0", b"-1", b"9" * 5000, b"\xe2\x80\xa8", b".jpg", b"\\"],
    "xml": [b"<a>" * 5000, b'<!DOCTYPE a [<!ENTITY b "c">]>', b"&b;", b"utf-16", b"hex", b"idna", b"\0", b"&#0;"],
    "npy": [b"(", b"}", b"\x85", b"\x94r\xff\xff\xff\x7f", b"cos\nsystem\n", b"\x8e" + b"\xff" * 8, b"F", b"R", b"."],
    "params": [
        b"&a [*a]",
        b"*a",
        b"2024-99-99",
        b"!!binary x",
        b"? [a]\n: b",
        b"{",
        b"[" * 3000,
        b"\t",
        b"!!python/name:os",
    ],
    "image": [
        b"\xff\xd9",
        b"\xff\xd8",
        b"\xff\xc2",
        b"\xff\xda",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"IDAT",
        b"IEND",
    ],
    "binary": [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"TREE", b"SNOD", b"HEAP", b"PK\x01\x02", b"\x80"],
}
TOKENS |= dict.fromkeys(("list", "classes"), TOKENS["txt"]) | dict.fromkeys(("index", "manifest"), TOKENS["json"])
TOKENS |= dict.fromkeys(("coco", "studio", "records"), TOKENS["json"]) | {"cvat": TOKENS["xml"], "table": TOKENS["csv"]}
TOKENS |= dict.fromkeys(("mask", "saliency", "jpg", "png"), TOKENS["image"])
TOKENS |= dict.fromkeys(("store", "weights"), TOKENS["binary"])

edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "delete", "repeat", "token", "random", "zero")),
        st.floats(0, 1, exclude_max=True),  # place
        st.integers(0, 255),
        st.integers(1, 64),  # length
    ),
    min_size=1,
    max_size=6,
)


def damage(data: bytes, edits: list[tuple[str, float, int, int]], tokens: list[bytes]) -> bytes:
    for kind, place, byte, length in edits:
        at = int(place * len(data))
        end = at + length
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << byte % 8)]) + data[at + 1 :] if data else data
        elif kind == "cut":
            data = data[:at]
        elif kind == "delete":
            data = data[:at] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[at:end] * (1 + byte % 4) + data[end:]
        elif kind == "token":
            data = data[:at] + tokens[byte % len(tokens)] + data[at + (length if byte % 2 else 0) :]
        else:
            filling = bytes(length) if kind == "zero" else bytes((byte * n + length) % 256 for n in range(length))
            data = data[:at] + filling + data[end:]
    return data


number = st.one_of(
    st.integers(-5, 300), st.sampled_from((2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400)), st.floats()
)
value = st.recursive(
    st.one_of(st.none(), st.booleans(), number, st.text(max_size=9), st.sampled_from((*IDS, *CLASSES, "a.jpg", ""))),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


def replaced(tree: Any, path: list[int], value: Any) -> Any:
    """Replace one value of a tree of mappings and lists; the numbers choose the branch at each level."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    if isinstance(tree, list):
        at = path[0] % len(tree)
        return [*tree[:at], replaced(tree[at], path[1:], value), *tree[at + 1 :]]
    key = list(tree)[path[0] % len(tree)]
    return {**tree, key: replaced(tree[key], path[1:], value)}


def with_checksums(data: bytes, kind: str) -> bytes:
    """Correct the checksums of a damaged PNG or zip file, so that the damage reaches the decoder."""
    if kind == "weights":
        try:
            source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
            with zipfile.ZipFile(target, "w") as packed:
                for info in source.infolist():
                    start = info.header_offset + 30 + len(info.filename) + len(info.extra)
                    packed.writestr(info.filename, data[start : start + info.file_size])
            return target.getvalue()
        except Exception:
            return data
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data = data[:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end])) + data[end + 4 :]
        at = end + 4
    return data


def store_of(columns: dict[str, Any], folder: Path) -> bytes:
    """A store with other columns: any numbers, lengths and types."""
    path = folder / "structured.h5"
    with h5py.File(path, "w") as file:
        file.attrs["kind"] = "saliency"
        for name, (values, dtype, shape) in columns.items():
            if shape is not None:
                file.create_dataset(name, shape, dtype, chunks=True, compression="gzip")
            else:
                with np.errstate(all="ignore"):
                    file[name] = np.array(values, "i8").astype(dtype)
    return path.read_bytes()


columns = st.fixed_dictionaries(
    {
        name: st.tuples(
            st.lists(st.one_of(st.integers(0, 30), st.sampled_from((-1, 2**31 - 1, 2**62))), max_size=4),
            st.sampled_from((dtype, dtype, dtype, "f8", "S3", "i1")),
            st.sampled_from((None, None, None, (3,), (2, 2), (2**40,), (2**33,))),
        )
        for name, dtype in (
            ("values", "u1"),
            ("offset", "i8"),
            ("height", "i4"),
            ("width", "i4"),
            ("image", "i4"),
            ("class_id", "i2"),
            ("image_ids", "S3"),
        )
    }
)
