"""User-supplied HDF5 stores: damaged, contradictory, hanging or enormous ones are refused in one line."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.config.dataset import Saliency
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores import isolated
from pipeline.stores.raster import RasterStore, RasterWriter, open_foreign
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import execute
from stages import saliency
from tests.trained import command
from tests.voc_tree import make_index

IDS = ("img_000", "img_001")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "maps.h5"
    with RasterWriter(path, "saliency") as writer:
        for number, name in enumerate(IDS):
            writer.append(name, np.full((24, 32), number, np.uint8))
    return path


def replaced(name: str, values: Any, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=values, **options)

    return change


def huge(name: str, dtype: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, (2**40,), dtype, chunks=(2**16,), compression="gzip")

    return change


def linked(file: h5py.File) -> None:
    del file["values"]
    file["values"] = h5py.ExternalLink("other.h5", "values")


def stored_elsewhere(file: h5py.File) -> None:
    del file["values"]
    file.create_dataset("values", (1536,), "u1", external=[("/etc/passwd", 0, 1536)])


def virtual(file: h5py.File) -> None:
    del file["values"]
    layout = h5py.VirtualLayout((1536,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "values", (1536,))
    file.create_virtual_dataset("values", layout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced("offset", [0, 2**62]), "its rasters lie outside of the 1536 stored values, or overlap"),
        (replaced("offset", [0, -1]), "its rasters lie outside"),
        (replaced("height", np.array([24, 25], "i4")), "its rasters lie outside"),
        (replaced("height", np.array([2**31 - 1, 1], "i4")), "height and width are not those of rasters"),
        (replaced("width", np.array([-32, 32], "i4")), "height and width are not those of rasters"),
        (replaced("height", np.array([24], "i4")), "all input arrays must have the same shape"),
        (replaced("image", np.array([1, 0], "i4")), "image is not a sorted column"),
        (replaced("image", np.array([0, 2], "i4")), "image is not a sorted column"),
        (replaced("image_ids", np.array([b"a", b"a"])), "image_ids has an id twice"),
        (replaced("image_ids", np.array([b"\xff", b"a"])), "codec can't decode"),
        (replaced("image_ids", [1, 2]), "image_ids is int64, not S"),
        (replaced("values", np.zeros(1536)), "values is float64, not u1"),
        (replaced("values", np.zeros((2, 768), "u1")), "values is not a one-dimensional dataset"),
        (lambda file: file.__delitem__("values"), "values is missing or a link"),
        (lambda file: file.attrs.__delitem__("kind"), "kind"),
        (huge("values", "u1"), "values has 1099511627776 bytes, most of which are not stored"),
        (huge("offset", "i8"), "offset has 8796093022208 bytes, most of which are not stored"),
        (huge("image_ids", "S64"), "image_ids has"),
        (linked, "values is missing or a link"),
        (stored_elsewhere, "values is not a one-dimensional dataset of this file"),
        (virtual, "values is not a one-dimensional dataset of this file"),
    ],
)
def test_a_contradictory_store_is_one_line(store: Path, change: Callable[[h5py.File], None], said: str) -> None:
    assert list(open_foreign(store)) == list(IDS)
    with h5py.File(store, "r+") as file:
        change(file)
    for read in (open_foreign, RasterStore):
        with pytest.raises(PipelineError) as caught:
            read(store)
        (line,) = caught.value.lines
        assert line.startswith(f"{store}: not a raster store (")
        assert said in line


def test_damaged_pixels_are_found_before_the_store_is_used(store: Path) -> None:
    data = bytearray(store.read_bytes())
    with h5py.File(store) as file:
        chunk = file["values"].id.get_chunk_info(0)
    data[chunk.byte_offset + 2] ^= 255
    store.write_bytes(data)
    RasterStore(store)  # its columns are sound
    with pytest.raises(PipelineError, match=r"maps\.h5: damaged raster store \(.*; run its stage again"):
        open_foreign(store)


def saliency_job(tmp_path: Path, store: Path) -> Job:
    index = make_index(tmp_path / "voc", saliency=False, train=2, evaluation=1)
    block = Saliency("store", str(store))
    return Job("saliency", "", {"index": index, "store": store}, {"maps": tmp_path / "out/maps.h5"}, {}, block)


def test_a_store_that_crashes_the_reader_ends_the_stage_with_one_line(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = saliency_job(tmp_path, store)
    execute(job, saliency.main, Runtime())
    parent = os.getpid()
    monkeypatch.setattr(
        RasterStore, "read_all", lambda self: os.getpid() != parent and os.kill(os.getpid(), signal.SIGSEGV)
    )
    with pytest.raises(PipelineError) as caught:
        execute(job, saliency.main, Runtime(), force=True)
    assert caught.value.lines == (
        f"{store}: damaged: reading it ended the process (SIGSEGV); run its stage again, or copy it again",
    )
    files = {job.inputs["index"]: tmp_path / "mine/index/index.json", store: tmp_path / "mine/maps/maps.h5"}
    for source, copy in files.items():
        copy.parent.mkdir(parents=True)
        shutil.copy(source, copy)
    assert command("export", files[store], "--formats", "probabilities") == 1
    assert "maps.h5: damaged: reading it ended the process (SIGSEGV)" in capsys.readouterr().err


def test_a_store_that_hangs_the_reader_is_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "SECONDS", 0.5)
    monkeypatch.setattr(RasterStore, "read_all", lambda self: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(PipelineError, match=r"maps\.h5: damaged: reading it did not end within 1 s"):
        open_foreign(store)
    assert time.monotonic() - start < 20


def test_a_map_of_another_size_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.h5"
    with RasterWriter(path, "saliency") as writer:
        for name in IDS:
            writer.append(name, np.zeros((12, 32), np.uint8))
    job = saliency_job(tmp_path, path)
    monkeypatch.setattr(RasterStore, "get", None)
    with pytest.raises(PipelineError) as caught:
        execute(job, saliency.main, Runtime())
    assert [line[len(str(path)) :] for line in caught.value.lines] == [
        f": image {name}: is 32x12, but its image is 32x24; resize the saliency map" for name in IDS
    ]


class TestIsolated:
    def test_values_and_errors_come_back(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"12345")
        assert isolated.call(len_of, path) == 5
        with pytest.raises(FileNotFoundError):
            isolated.call(len_of, tmp_path / "none")

    def test_memory_is_limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(isolated, "MEMORY", 1 << 28)
        with pytest.raises(MemoryError):
            isolated.call(greedy, tmp_path)

    def test_a_process_that_leaves_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(isolated.Failed, match="exit status 3"):
            isolated.call(leave, tmp_path)


def len_of(path: Path) -> int:
    return len(path.read_bytes())


def greedy(path: Path) -> int:
    return len(bytearray(1 << 32))  # no heap that the process inherits has that much free


def leave(path: Path) -> None:
    os._exit(3)
