"""Block-wise computation: order, resumption after a kill, damaged parts, and workers that exit with their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.stores.blocks import Row, parallel, write_blocks
from pipeline.stores.raster import RasterStore, RasterWriter


@dataclass(frozen=True)
class Item:
    id: str
    size: tuple[int, int] = (2, 3)


ITEMS = [Item(f"image{number}") for number in range(10)]


class Compute:
    """Returns two rasters per image, last image first, and none for image3; fails once, at image ``dies_at``."""

    def __init__(self, dies_at: str | None = None) -> None:
        self.dies_at = dies_at
        self.seen: list[str] = []

    def __call__(self, block: Sequence[Item]) -> Iterator[Row]:
        for item in reversed(block):
            if item.id == self.dies_at:
                raise KeyboardInterrupt
            self.seen.append(item.id)
            if item.id != "image3":
                value = int(item.id[5:])
                yield item.id, 1, np.full((2, 3), value, np.uint8)
                yield item.id, 2, np.full((value + 1, 1), 255, np.uint8)


def write(folder: Path, compute: Compute, size: int = 3) -> Path:
    path = folder / "maps.h5"
    with RasterWriter(path, "maps") as writer:
        write_blocks(ITEMS, compute, writer, folder / "parts", size)
    return path


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.part"))


def test_rows_come_back_in_the_images_order(tmp_path: Path) -> None:
    store = RasterStore(write(tmp_path, Compute()))
    assert list(store) == [item.id for item in ITEMS]
    assert store.classes("image3") == []
    assert store.classes("image4") == [1, 2]
    assert store.get("image4", 1).tolist() == [[4, 4, 4], [4, 4, 4]]
    assert store.get("image4", 2).shape == (5, 1)


def test_resumes_after_a_kill_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = write(tmp_path / "whole", Compute())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", Compute(dies_at="image7"))
    assert parts(tmp_path / "killed") == ["00000.part", "00001.part"]
    again = Compute()
    killed = write(tmp_path / "killed", again)
    assert sorted(again.seen) == ["image6", "image7", "image8", "image9"]
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_part_is_computed_again(tmp_path: Path, harm: str) -> None:
    """With a bit flipped in any part of the file, its checksum and the headers of its archive included."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Compute(dies_at="image7"))
    part = next(tmp_path.rglob("00001.part"))
    content = part.read_bytes()
    for place in range(0, len(content), 7) if harm == "flip" else [0]:
        flipped = content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]
        part.write_bytes({"flip": flipped, "cut": content[:-40], "empty": b""}[harm])
        again = Compute()
        values = RasterStore(write(tmp_path, again)).get("image5", 1)
        assert {"image3", "image4", "image5"} <= set(again.seen)
        assert "image2" not in again.seen
        assert values[0, 0] == 5


def test_parts_of_other_blocks_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Compute(dies_at="image7"), size=3)
    again = Compute()
    store = RasterStore(write(tmp_path, again, size=4))
    assert len(again.seen) == len(ITEMS)
    assert store.get("image9", 1)[0, 0] == 9


def test_a_row_of_a_foreign_image_is_refused(tmp_path: Path) -> None:
    with (
        RasterWriter(tmp_path / "maps.h5", "maps") as writer,
        pytest.raises(ValueError, match="foreign has a raster but is not"),
    ):
        write_blocks(ITEMS, lambda block: [("foreign", 0, np.zeros((1, 1), np.uint8))], writer, tmp_path / "parts")


def test_progress_advances_while_a_block_is_computed(tmp_path: Path) -> None:
    events: list[str] = []

    def progress(items: Sequence[Item]) -> Iterator[Item]:
        for number, item in enumerate(items, 1):
            yield item
            events.append(f"done {number}")

    def compute(block: Sequence[Item]) -> Iterator[Row]:
        for item in block:
            events.append(item.id)
            yield item.id, 0, np.zeros((1, 1), np.uint8)

    with RasterWriter(tmp_path / "maps.h5", "maps") as writer:
        write_blocks(ITEMS[:3], compute, writer, tmp_path / "parts", progress=progress)
    assert events == ["image0", "image1", "done 1", "image2", "done 2", "done 3"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        cv2.error("OpenCV(4.13.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 36000000 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_shortage_of_memory_names_the_largest_image_and_the_parameters(tmp_path: Path, error: Exception) -> None:
    def compute(block: Sequence[Item]) -> Iterator[Row]:
        raise error

    items = [*ITEMS, Item("photo", (3000, 4000))]
    with RasterWriter(tmp_path / "maps.h5", "maps") as writer, pytest.raises(PipelineError) as caught:
        write_blocks(items, compute, writer, tmp_path / "parts")
    assert caught.value.lines == (
        "photo (4000x3000 pixels, the largest of a block of 11): out of memory; "
        "reduce dataset.working_megapixels, or the scales (test.scales or the block's)",
    )


def test_other_errors_are_not_taken_for_a_shortage(tmp_path: Path) -> None:
    def compute(block: Sequence[Item]) -> Iterator[Row]:
        raise RuntimeError("a bug")

    with RasterWriter(tmp_path / "maps.h5", "maps") as writer, pytest.raises(RuntimeError, match="a bug"):
        write_blocks(ITEMS, compute, writer, tmp_path / "parts")


def test_processes_preserve_the_order() -> None:
    with parallel("test", 2) as each:
        assert list(each(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_workers_exit_with_a_killed_parent() -> None:
    code = (
        "import os\n"
        "from pipeline.stores.blocks import parallel\n"
        "if __name__ == '__main__':\n"
        "    with parallel('test', 1) as each:\n"
        "        print(*each(eval, ['__import__(\"os\").getpid()']), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=20)
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")
