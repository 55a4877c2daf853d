"""A generated dataset: any change of its files is noticed and undone, and no other file is touched."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

from pipeline.config.dataset import Dataset
from pipeline.workflow.graph import Job
from tests.jobs import command, graph, outdated, perform, refused
from tests.project import link_code
from tests.voc_tree import minimal_params

DATA = Path("data")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    demo = {"train": 3, "evaluation": 2, "size": 48}
    dataset = Dataset("data", "classes.txt", masks="SegmentationClass")
    params = minimal_params(dataset, DATA / "Saliency")
    params["dataset"] |= {"demo": demo}
    Path("params.yaml").write_text(yaml.safe_dump(params))


def job() -> Job:
    return graph().find("demo")


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass", "Saliency", "."])
@pytest.mark.parametrize("harm", ["deleted", "damaged", "added"])
def test_a_change_of_the_demo_is_stale_and_undone(folder: str, harm: str) -> None:
    assert not graph().missing()  # the maps are to be generated with the dataset
    perform(job())
    perform(graph().find("index"))
    assert not {"demo", "index"} & outdated()
    content = {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
    path = sorted(file for file in (DATA / folder).iterdir() if file.is_file())[1]
    if harm == "deleted":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"#")
    else:
        path.with_name("added.png").touch()
    assert {"demo", "index"} <= outdated()
    perform(job())
    assert content == {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
    assert not {"demo", "index"} & outdated()


def test_what_is_right_already_is_left_alone() -> None:
    """Another experiment with the same demo may be reading it."""
    perform(job())
    times = {path: path.stat().st_mtime_ns for path in DATA.rglob("*") if path.is_file()}
    perform(job(), force=True)
    assert times == {path: path.stat().st_mtime_ns for path in DATA.rglob("*") if path.is_file()}


def test_a_failed_write_of_an_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, None))
    (line,) = refused(job())
    assert line.startswith("data/JPEGImages/demo_00000.jpg: OpenCV cannot encode it; ")
    monkeypatch.undo()
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "demo_00002.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    os.chdir(DATA.absolute().parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            perform(job())
    assert "demo" in outdated()


@pytest.mark.parametrize("root", ["a mount point", "a link"])
def test_the_root_itself_is_never_replaced(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point cannot be renamed, nor removed; a rename would replace a link."""
    if root == "a link":
        Path("disk").mkdir()
        DATA.symlink_to("disk")

    def busy(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*paths: Any, **options: Any) -> Any:
            if any(os.path.basename(str(path)).strip(".").split(".")[0] == "data" for path in paths):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            return real(*paths, **options)

        return call

    for name in ("rename", "replace", "rmdir", "unlink", "remove"):
        monkeypatch.setattr(os, name, busy(name))
    for _ in range(2):
        perform(job(), force=True)
    assert DATA.is_symlink() == (root == "a link")
    assert "demo" not in outdated()


def test_killed_halfway_it_is_generated_again() -> None:
    perform(job())
    content = {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
    shutil.rmtree(DATA / "JPEGImages")
    code = "import os, signal, stages.demo as d, pipeline.data.demo as g\n"
    code += "real, calls = g._put, []\n"
    code += "def write(*a):\n real(*a); calls.append(1)\n"
    code += " if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "g._put = write\nd.run('demo', d.main, ['--force'])"
    assert command("-c", code).returncode == -signal.SIGKILL
    assert "demo" in outdated()
    (line,) = refused(graph().find("index"))
    assert line == "data: is not finished; run the stage demo (again)"
    perform(job())
    assert content == {path: path.read_bytes() for path in DATA.rglob("*") if path.is_file()}
