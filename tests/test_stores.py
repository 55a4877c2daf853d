"""Raster stores, hashes, atomic writes and manifests."""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.stores import files, manifest, raster
from pipeline.stores.raster import RasterStore, RasterWriter, write_store

Rows = list[tuple[str, int, NDArray[np.uint8]]]


def rows(count: int = 12) -> Rows:
    """Random rasters of varying size: zero to three for each of ``count`` images."""
    random = np.random.default_rng(0)
    return [
        (f"image {number}", class_id, random.integers(0, 256, random.integers(1, 30, 2)).astype(np.uint8))
        for number in range(count)
        for class_id in range(1, 1 + number % 4)
    ]


def write(path: Path, content: Rows, count: int = 12) -> RasterStore:
    with RasterWriter(path, "test") as writer:
        for number in range(count):
            writer.add_image(f"image {number}")
            for image_id, class_id, values in content:
                if image_id == f"image {number}":
                    writer.append(image_id, values, class_id)
    return RasterStore(path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make writes fail beyond this number of bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_in_child(store: RasterStore, queue: Any) -> None:
    inherited = store._handle
    queue.put((store.get("image 3", 2).tolist(), store._handle is inherited))


class TestRasters:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        content = rows()
        store = write(tmp_path / "maps.h5", content)
        assert store.kind == "test"
        assert list(store) == [f"image {number}" for number in range(12)]
        assert len(store) == len(content) == 18
        for image_id, class_id, values in content:
            found = store.get(image_id, class_id)
            assert found.dtype == np.uint8
            assert found.tolist() == values.tolist()
            assert store.maps(image_id)[class_id].tolist() == values.tolist()
        assert store.classes("image 7") == list(store.maps("image 7")) == [1, 2, 3]

    def test_small_buffers_give_the_same_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The values do not depend on how often the writer empties its buffer."""
        content = rows()
        whole = write(tmp_path / "whole.h5", content)
        monkeypatch.setattr(raster, "BUFFER", 500)
        pieces = write(tmp_path / "pieces.h5", content)
        for image_id, class_id, _ in content:
            assert whole.get(image_id, class_id).tolist() == pieces.get(image_id, class_id).tolist()

    def test_none_and_unknown_differ(self, tmp_path: Path) -> None:
        store = write(tmp_path / "maps.h5", rows())
        assert "image 4" in store
        assert store.maps("image 4") == {}
        assert store.classes("image 4") == []
        assert "image 99" not in store
        with pytest.raises(KeyError, match=r"maps\.h5 has no image image 99"):
            store.maps("image 99")
        with pytest.raises(KeyError, match=r"maps\.h5 has no class 3 of image image 1"):
            store.get("image 1", 3)

    def test_an_empty_store_is_valid(self, tmp_path: Path) -> None:
        with RasterWriter(tmp_path / "maps.h5", "test"):
            pass
        store = RasterStore(tmp_path / "maps.h5")
        assert len(store) == 0
        assert list(store) == []

    def test_same_content_same_bytes(self, tmp_path: Path) -> None:
        for name in ("one.h5", "other.h5"):
            write(tmp_path / name, rows())
        assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "other.h5").read_bytes()

    def test_views_are_stored_as_they_look(self, tmp_path: Path) -> None:
        values = np.arange(12, dtype=np.uint8).reshape(3, 4)
        with RasterWriter(tmp_path / "maps.h5", "test") as writer:
            writer.append("a", values[::-1, ::-1].T)
        assert RasterStore(tmp_path / "maps.h5").get("a").tolist() == values[::-1, ::-1].T.tolist()

    @pytest.mark.parametrize("values", [np.zeros((2, 3), np.float32), np.zeros((1, 2, 3), np.uint8)])
    def test_other_than_2d_uint8_is_refused(self, tmp_path: Path, values: Any) -> None:
        with RasterWriter(tmp_path / "maps.h5", "test") as writer, pytest.raises(ValueError, match="2-D uint8, not"):
            writer.append("a", values)

    @pytest.mark.parametrize("size", [0, 1, 1000, 5000, 60_000, 100_000])
    def test_a_full_disk_is_an_error_with_the_files_name(self, tmp_path: Path, size: int) -> None:
        """Files of limited size stand in for a full disk; tests/test_faults.py fills one."""
        path = tmp_path / "maps.h5"
        noise = np.random.default_rng(0).integers(0, 256, (400, 300)).astype(np.uint8)
        table = np.array([[0, *noise.shape, 0, 0]])
        with files_of_at_most(size):
            with pytest.raises(OSError, match="File too large") as caught:
                write(path, [("image 0", 0, noise)])
            assert caught.value.filename == str(path)
            with pytest.raises(OSError, match="File too large") as caught:
                write_store(path, "maps", ["a"], table, noise.reshape(-1))
            assert caught.value.filename == str(path)

    def test_a_full_disk_ends_the_work_early(self, tmp_path: Path) -> None:
        """As soon as the buffer is written, not when the store is complete."""
        noise = np.random.default_rng(0).integers(0, 256, (raster.BUFFER >> 12, 1 << 11)).astype(np.uint8)
        appended: list[int] = []

        def fill() -> None:
            with RasterWriter(tmp_path / "maps.h5", "test") as writer:
                for number in range(9):
                    writer.append(str(number), noise)
                    appended.append(number)

        with files_of_at_most(1 << 20), pytest.raises(OSError, match="File too large"):
            fill()
        assert appended == [0]

    def test_rows_of_an_image_must_be_contiguous(self, tmp_path: Path) -> None:
        one = np.zeros((1, 1), np.uint8)
        with RasterWriter(tmp_path / "maps.h5", "test") as writer:
            writer.append("a", one)
            writer.add_image("b")
            with pytest.raises(ValueError, match="rows of image a must be contiguous"):
                writer.append("a", one, 2)

    @pytest.mark.parametrize("content", [b"", b"text", None])
    def test_another_file_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "maps.h5"
        if content is None:
            with h5py.File(path, "w") as file:
                file["other"] = 1
        else:
            path.write_bytes(content)
        with pytest.raises(PipelineError, match=r"maps\.h5: not a raster store .*; run its stage again"):
            RasterStore(path)

    def test_a_forked_process_reads_by_a_handle_of_its_own(self, tmp_path: Path) -> None:
        store = write(tmp_path / "maps.h5", rows())
        expected = store.get("image 3", 2).tolist()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=read_in_child, args=(store, queue))
        child.start()
        assert queue.get(timeout=20) == (expected, False)
        child.join(20)
        assert child.exitcode == 0
        assert store.get("image 3", 2).tolist() == expected


class TestWholeStore:
    """A store written at once: rasters of 2 x 3 and 1 x 4 cells (images 'c', 'a') and three cells in no raster."""

    IDS = ("c", "empty", "a")
    VALUES = np.arange(100, 117, dtype=np.uint8)
    ROWS = np.array([(11, 2, 3, 0, 7), (0, 1, 4, 0, 9), (7, 1, 4, 2, 300)], np.int64)

    def whole(self, path: Path) -> RasterStore:
        write_store(path, "test", self.IDS, self.ROWS, self.VALUES)
        return RasterStore(path)

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        store = self.whole(tmp_path / "maps.h5")
        assert store.kind == "test"
        assert list(store) == list(self.IDS)
        assert len(store) == 3
        assert {key: values.tolist() for key, values in store.maps("c").items()} == {
            7: [[111, 112, 113], [114, 115, 116]],
            9: [[100, 101, 102, 103]],
        }
        assert store.maps("empty") == {}
        assert store.get("a", 300).tolist() == [[107, 108, 109, 110]]

    def test_it_equals_a_writers_store_except_for_the_compression(self, tmp_path: Path) -> None:
        self.whole(tmp_path / "whole.h5")
        with RasterWriter(tmp_path / "written.h5", "test") as writer:
            writer.append("c", self.VALUES[11:].reshape(2, 3), 7)
            writer.append("c", self.VALUES[:4].reshape(1, 4), 9)
            writer.add_image("empty")
            writer.append("a", self.VALUES[7:11].reshape(1, 4), 300)
        with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(tmp_path / "written.h5") as written:
            assert whole["values"].compression is None
            assert written["values"].compression == "gzip"
            assert dict(whole.attrs) == dict(written.attrs)
            assert whole.keys() == written.keys()
            for name in whole.keys() - {"values", "offset"}:
                assert whole[name].dtype == written[name].dtype
                assert whole[name][:].tolist() == written[name][:].tolist()
        one, other = RasterStore(tmp_path / "whole.h5"), RasterStore(tmp_path / "written.h5")
        for name in self.IDS:
            assert {k: v.tolist() for k, v in one.maps(name).items()} == {
                k: v.tolist() for k, v in other.maps(name).items()
            }

    def test_an_id_is_found_in_any_order(self, tmp_path: Path) -> None:
        ids = ["b", "é", "a", "ab", "B", "\U0001f600", "z"]
        rows = np.array([(number, 1, 1, number, 0) for number in range(len(ids))], np.int64)
        write_store(tmp_path / "maps.h5", "test", ids, rows, np.arange(len(ids), dtype=np.uint8))
        store = RasterStore(tmp_path / "maps.h5")
        assert [store.get(name).item() for name in ids] == list(range(len(ids)))
        for unknown in ("", "c", "aa", "bb", "A", "zz", "zzzzzzz", "\U0001f601", "\ud800"):
            assert unknown not in store
            with pytest.raises(KeyError, match="no image "):
                store.get(unknown)

    def test_an_image_takes_few_bytes_of_memory(self, tmp_path: Path) -> None:
        ids = [f"image_{number:07d}" for number in range(20_000)]
        rows = np.array([(number, 1, 1, number, 0) for number in range(len(ids))], np.int64)
        write_store(tmp_path / "maps.h5", "test", ids, rows, np.zeros(len(ids), np.uint8))
        tracemalloc.start()
        store = RasterStore(tmp_path / "maps.h5")
        assert all(name in store for name in ids)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held / len(ids) < 64  # the columns and the id have 31 bytes, the order and the first row 8 each

    def test_an_empty_store_is_valid(self, tmp_path: Path) -> None:
        write_store(tmp_path / "maps.h5", "test", [], np.zeros((0, 5), np.int64), np.zeros(0, np.uint8))
        assert list(RasterStore(tmp_path / "maps.h5")) == []

    def test_same_content_same_bytes_and_a_flipped_bit_is_refused(self, tmp_path: Path) -> None:
        for name in ("one.h5", "other.h5"):
            self.whole(tmp_path / name)
        path = tmp_path / "one.h5"
        content = path.read_bytes()
        assert content == (tmp_path / "other.h5").read_bytes()
        manifest.write(tmp_path, stage="classifier x", outputs={"one.h5": files.sha256(path)})
        assert manifest.verify(path) == hashlib.sha256(content).hexdigest()
        place = content.index(self.VALUES.tobytes())  # uncompressed and contiguous
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert RasterStore(path).get("c", 9)[0, 0] == 101  # HDF5 itself does not notice
        with pytest.raises(PipelineError, match="damaged or changed by hand"):
            manifest.verify(path)


class TestFiles:
    def test_sha256_is_the_standards(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_atomic_publishes_only_complete_files(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.txt"
        with files.atomic(path) as temporary:
            temporary.write_text("first")
            assert not path.exists()
            assert temporary.parent == path.parent  # a rename within one file system
        assert path.read_text() == "first"

        def unfinished() -> None:
            with files.atomic(path) as temporary:
                temporary.write_text("second, unf")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            unfinished()
        assert path.read_text() == "first"

    def test_only_regular_files_are_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "loop").symlink_to("loop")
        for path in (tmp_path / "fifo", tmp_path / "loop", tmp_path, Path("/dev/zero"), tmp_path / "none"):
            with pytest.raises(OSError, match=re.escape(str(path))):
                files.read_regular(path)


class TestManifest:
    def published(self, folder: Path) -> Path:
        path = folder / "model.pt"
        path.write_bytes(bytes(range(200)))
        manifest.write(folder, stage="classifier x", outputs={"model.pt": files.sha256(path)})
        return path

    def test_it_has_the_fields_and_versions(self, tmp_path: Path) -> None:
        self.published(tmp_path)
        found = manifest.read(tmp_path)
        assert found is not None
        assert found["stage"] == "classifier x"
        assert {"python", "torch", "numpy", "h5py"} <= set(found["versions"])
        text = (tmp_path / "manifest.json").read_text()
        assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"

    def test_an_intact_file_passes(self, tmp_path: Path) -> None:
        path = self.published(tmp_path)
        assert manifest.verify(path) == hashlib.sha256(bytes(range(200))).hexdigest()

    @pytest.mark.parametrize("bit", [0, 7, 799, 1599])
    def test_one_flipped_bit_is_refused_with_both_hashes(self, tmp_path: Path, bit: int) -> None:
        path = self.published(tmp_path)
        expected = files.sha256(path)
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(PipelineError) as caught:
            manifest.verify(path)
        (line,) = caught.value.lines
        assert line == (
            f"{path}: damaged or changed by hand: sha256 is {files.sha256(path)}, its manifest says {expected}; "
            f"delete {path} and run its stage again"
        )

    def test_a_file_without_a_manifest_entry_passes(self, tmp_path: Path) -> None:
        path = tmp_path / "own.h5"
        path.write_bytes(b"a user's own")
        assert manifest.verify(path) == files.sha256(path)
        self.published(tmp_path)
        assert manifest.verify(path) == files.sha256(path)
        (tmp_path / "manifest.json").write_text('{"name": "of some other program"}')
        assert manifest.verify(path) == files.sha256(path)

    @pytest.mark.parametrize("content", [None, "", '{"stage": "cla', "[1, 2]"])
    def test_an_incomplete_manifest_reads_as_none(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        assert manifest.read(tmp_path) is None

    def test_a_file_that_a_stage_must_have_published_needs_an_entry(self, tmp_path: Path) -> None:
        path = self.published(tmp_path)
        assert manifest.verify(path, required=True) == files.sha256(path)
        manifest.remove(tmp_path)
        manifest.remove(tmp_path)  # there is none to remove
        with pytest.raises(PipelineError) as caught:
            manifest.verify(path, required=True)
        assert caught.value.lines == (f"{path}: has no manifest, since its stage was interrupted; run its stage again",)
