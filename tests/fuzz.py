"""Damaged versions of every file that a user supplies. A reader may only succeed or report the fault in one line.

``python -m tests.fuzz [--cases 10000] [READER ...]`` runs many cases and counts their outcomes; ``tests/test_fuzz.py``
runs a few. A case is a valid file with random edits of its bytes or of its structure.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from pipeline.config import params
from pipeline.config.dataset import Dataset
from pipeline.data.checks import mask_values, saliency_values
from pipeline.data.class_file import read_classes
from pipeline.data.complete import InvalidFile
from pipeline.data.faults import Faults
from pipeline.data.index import Index
from pipeline.data.lists import read_list
from pipeline.data.tags import collect, read_tags
from pipeline.errors import PipelineError
from pipeline.stores import isolated, manifest
from pipeline.stores.raster import RasterWriter, open_foreign
from tests import damage
from tests.voc_tree import image_size, make_index, minimal_params

PIXELS = 10**6
PHOTOS = {name: f"{name}.jpg" for name in damage.IDS}
ROUND = 500  # cases of a run of hypothesis

Read = Callable[[Path], list[str]]  # returns the lines that report faults; none if the file was read


# Valid files


def _array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def _picture(kind: str, *options: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    return bytes(cv2.imencode(kind, cv2.blur(pixels, (3, 3)), list(options))[1].tobytes())


def _grey(mode: str) -> bytes:
    file = io.BytesIO()
    picture = Pillow.fromarray((np.arange(24 * 32).reshape(24, 32) // 99).astype(np.uint8), "L")
    (picture.convert("P") if mode == "P" else picture).save(file, "PNG")
    return file.getvalue()


def _store(folder: Path) -> bytes:
    path = folder / "maps.h5"
    with RasterWriter(path, "saliency") as writer:
        for number, name in enumerate(damage.IDS):
            writer.append(name, np.full((4 + number, 5), number, np.uint8))
    return path.read_bytes()


def _weights(**options: Any) -> bytes:
    import torch

    from tests.networks import build

    file = io.BytesIO()
    torch.save(build("small").state_dict(), file, **options)
    return file.getvalue()


def _xml(encoding: str) -> bytes:
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation><object><name>cat</name></object></annotation>'
    return text.encode(encoding)


_vector = np.array([1, 0, 0, 1], np.float32)
_TAGS = {"img_000.jpg": [1, "cat"], "img 1 north": ["potted plant"], "2007_000032": [], "000000000139": [4]}


def _seeds(name: str, folder: Path) -> tuple[str, list[bytes]]:
    """The name of a reader's file and its valid contents."""
    if name == "index":
        return "index.json", [make_index(folder / "tree", train=1, evaluation=1, size=(8, 8)).read_bytes()]
    if name == "manifest":
        outputs = {"index.json": hashlib.sha256(b"{}").hexdigest()}
        manifest.write(folder, stage="index", params={}, inputs={"a": "0"}, outputs=outputs, code="0")
        return "manifest.json", [(folder / "manifest.json").read_bytes()]
    if name == "params":
        small = minimal_params(Dataset(str(folder)))
        return "params.yaml", [yaml.safe_dump(small, default_flow_style=flow).encode() for flow in (False, None)]
    if name == "weights":
        return "model.pt", [_weights(), _weights(_use_new_zipfile_serialization=False)]
    if name == "store":
        return "maps.h5", [_store(folder)]
    return _CONTENTS[name]


_BOX = {"type": "rectanglelabels", "value": {"x": 1.5, "rectanglelabels": ["cat"]}}
_COCO = {
    "images": [{"id": 1, "file_name": "img_000.jpg"}, {"id": "2", "file_name": "x/2007_000032.png"}],
    "annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}, {"image_id": "2", "category_id": 4}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "fish, small"}],
}
_STUDIO = [
    {"data": {"image": "/data/upload/1/0123abcd-img_000.jpg"}, "annotations": [{"result": [_BOX]}]},
    {"data": {"image": "/data/local-files/?d=x%2F2007_000032.png"}, "annotations": [{"result": []}]},
]
_CVAT = b"""<annotations><meta><task><labels><label><name>cat</name></label></labels></task></meta>
<image name="img_000.jpg"><tag label="cat"/><box label="dog" xtl="1"/></image>
<image name="2007_000032.png"/></annotations>"""
_ROWS = b"img_000.jpg,1,2,3,4,cat\nimg_000.jpg,1,2,3,4,dog\n2007_000032.jpg,,,,,\n"
_COLUMNS = b"filename;cat;dog;potted plant\nimg_000.jpg;1;0;x\n2007_000032.jpg;FALSE;;1.0\n"
_JSON_TAGS = ("json", "coco", "studio", "records")  # readers whose values are replaced as well
_CONTENTS = {
    "coco": ("tags.json", [json.dumps(_COCO).encode()]),
    "studio": ("tags.json", [json.dumps(_STUDIO).encode()]),
    "records": ("tags.json", [json.dumps([{"file": name, "tags": tags} for name, tags in _TAGS.items()]).encode()]),
    "cvat": ("annotations.xml", [_CVAT]),
    "table": ("tags.csv", [_ROWS, _COLUMNS, _COLUMNS.decode().encode("utf-16")]),
    "json": ("tags.json", [json.dumps(_TAGS).encode(), json.dumps(_TAGS, indent=1).encode("utf-8-sig")]),
    "csv": ("tags.csv", [b'filename,tags\nimg_000.jpg,cat dog\nimg 1 north,"fish, small;cat"\n2007_000032,\n']),
    "txt": ("tags.txt", [b"img_000 0 1\nimg 1 north potted plant\r\n2007_000032\n"]),
    "npy": ("tags.npy", [_array({"img_000.jpg": _vector, 139: _vector}), _array({2007000032: _vector > 0})]),
    "xml": ("img_000.xml", [_xml("utf-8"), _xml("utf-16"), _xml("gb2312"), _xml("shift_jis"), _xml("latin1")]),
    "list": ("train.txt", [b"img_000\nimg 1 north\r\n", b"/JPEGImages/img_000.jpg /Masks/img_000.png\na 0 3\n"]),
    "classes": ("classes.txt", [b"cat\ndog\n", b"__ignore__\n_background_\ncat\n", "Käfer\n猫\n".encode()]),
    "mask": ("mask.png", [_grey("P"), _grey("L")]),
    "saliency": ("map.png", [_grey("L")]),
    "jpg": ("image.jpg", [_picture(".jpg"), _picture(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)]),
    "png": ("image.png", [_picture(".png"), _grey("P")]),
}


Case = tuple[Any, ...]  # how to damage a file, and the numbers and values that it takes


@dataclass(frozen=True)
class Reader:
    """A reader, the valid contents of its file, and the strategy of their damages.

    A case holds no content of a file: hypothesis keeps all cases of a run, and formats what a strategy holds.
    """

    name: str
    file: str
    seeds: list[bytes]
    cases: st.SearchStrategy[Case]
    read: Read
    folder: Path

    def damaged(self, case: Case) -> bytes:
        """The content of a damaged file."""
        match case:
            case ("edited" | "corrected" as kind, number, edits):
                data = damage.damage(self.seeds[number], edits, damage.TOKENS[self.name])
                return damage.with_checksums(data, self.name) if kind == "corrected" else data
            case ("replaced", path, value):
                if self.name == "params":
                    return yaml.safe_dump(damage.replaced(yaml.safe_load(self.seeds[0]), path, value)).encode()
                return json.dumps(damage.replaced(json.loads(self.seeds[0]), path, value)).encode()
            case ("stored", columns):
                return damage.store_of(columns, self.folder)
            case ("pickled", values):
                return _array(values)
        raise ValueError(f"unknown case {case}")


def names() -> list[str]:
    """Names of all readers."""
    return list(_READS)


def reader(name: str, folder: Path) -> Reader:
    """A reader with its strategy of damaged files. Valid files are written to ``folder``."""
    file, seeds = _seeds(name, folder)
    return Reader(name, file, seeds, _cases(name, len(seeds)), _READS[name], folder)


def _cases(name: str, count: int) -> st.SearchStrategy[Case]:
    kinds = ("edited", "corrected") if name in ("mask", "saliency", "png", "weights") else ("edited",)
    edited = st.tuples(st.sampled_from(kinds), st.integers(0, count - 1), damage.edits)
    if name in (*_JSON_TAGS, "index", "manifest", "params"):
        return edited | st.tuples(st.just("replaced"), st.lists(st.integers(0, 9), max_size=6), damage.value)
    if name == "store":
        return edited | st.tuples(st.just("stored"), damage.columns)
    if name == "npy":
        texts = st.dictionaries(st.text(max_size=5) | damage.number, damage.value)
        return edited | st.tuples(st.just("pickled"), texts)
    return edited


# Readers


def _tags(path: Path) -> list[str]:
    faults = Faults()
    read_tags(path, damage.CLASSES, PHOTOS, faults)
    lines = faults.lines()
    collect(path, PHOTOS, faults := Faults())
    return lines + faults.lines()


def _annotations(path: Path) -> list[str]:
    faults = Faults()
    read_tags(path.parent, damage.CLASSES, PHOTOS, faults)
    return faults.lines()


def _list(path: Path) -> list[str]:
    faults = Faults()
    read_list(path, faults, {name: f"{name}.jpg" for name in damage.IDS})
    return faults.lines()


def _classes(path: Path) -> list[str]:
    faults = Faults()
    read_classes(path.parent, path.name, faults)
    return faults.lines()


def _decoded(decode: Callable[[bytes, int], Any]) -> Read:
    def read(path: Path) -> list[str]:
        try:
            decode(path.read_bytes(), PIXELS)
        except InvalidFile as error:
            return [f"{path}: {error}"]
        return []

    return read


def _attempted(function: Callable[[Path], Any]) -> Read:
    def read(path: Path) -> list[str]:
        try:
            function(path)
        except PipelineError as error:
            return error.lines
        return []

    return read


def _open(path: Path) -> None:
    store = open_foreign(path)
    for name in store:
        store.maps(name)


def _load_weights(path: Path) -> None:
    from pipeline.networks.weights import load_weights
    from tests.networks import build

    load_weights(build("small"), str(path))


def _index(path: Path) -> None:
    index = Index(path)
    for split in ("train", "evaluation"):
        list(index.images(split))


_READS: dict[str, Read] = {
    **dict.fromkeys((*_JSON_TAGS, "cvat", "csv", "table", "txt", "npy"), _tags),
    "xml": _annotations,
    "list": _list,
    "classes": _classes,
    "params": _attempted(lambda path: params.load([path], resolve=True)),
    "mask": _decoded(mask_values),
    "saliency": _decoded(saliency_values),
    "jpg": _decoded(image_size),
    "png": _decoded(image_size),
    "store": _attempted(_open),
    "weights": _attempted(_load_weights),
    "index": _attempted(_index),
    "manifest": _attempted(lambda path: (manifest.read(path.parent), manifest.verify(path.parent / "index.json"))),
}


def check(reader: Reader, folder: Path, data: bytes) -> str:
    """Read one damaged file and return the outcome: 'read' or 'refused'.

    Raises:
        AssertionError: a line does not name the file, or contains a line break.
        Exception: whatever the reader raises that users would see as a traceback.
    """
    place = folder / reader.name
    place.mkdir(exist_ok=True)
    path = place / reader.file
    path.write_bytes(data)
    if reader.name == "manifest":
        (place / "index.json").write_bytes(b"{}")
    lines = reader.read(path)
    for line in lines:
        assert line.isprintable(), repr(line)
        assert str(place) in line or line.startswith("... and "), line
    return "refused" if lines else "read"


# The long run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--cases", type=int, default=10_000)
    options = parser.parse_args()
    isolated.SECONDS = 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [reader(name, folder) for name in options.readers or names()]
        for one in chosen:
            check(one, folder, b"")  # imports what the reader needs
        isolated.limit_memory(6 << 30)
        for one in chosen:
            _run(one, folder, options.cases)


def _run(reader: Reader, folder: Path, cases: int) -> None:
    """Run the cases in rounds, since hypothesis holds what it draws for every case of a run in memory."""
    outcomes: Counter[str] = Counter()
    bugs: dict[str, tuple[bytes, str]] = {}
    times: list[float] = []
    start = time.monotonic()

    def run(case: Case) -> None:
        data = reader.damaged(case)
        before = time.monotonic()
        try:
            outcome = check(reader, folder, data)
        except Exception as error:
            outcome = "bug"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            bugs.setdefault(key, (data, "".join(traceback.format_exception(error)[-6:])))
        outcomes[outcome] += 1
        times.append(time.monotonic() - before)

    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg and libpng print warnings
    limits = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    try:
        for done in range(0, cases, ROUND):
            round_ = settings(max_examples=min(ROUND, cases - done), **limits)
            seed(done)(round_(given(reader.cases)(run)))()
    finally:
        os.dup2(stderr, 2)
    seconds = time.monotonic() - start
    slow = f"slowest {max(times):.2f} s, {sum(each > 1 for each in times)} above 1 s"
    print(f"{reader.name}: {dict(outcomes)} in {seconds:.0f} s, {slow}", flush=True)
    for key, (data, text) in bugs.items():
        kept = Path(tempfile.gettempdir()) / f"fuzz-{reader.name}-{zlib.crc32(data):08x}"
        kept.write_bytes(data)
        print(f"  {key} ({kept})\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
