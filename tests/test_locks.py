"""File systems without locks: each lock warns once about the lost protection, and work continues."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.stores import locks
from pipeline.workflow import snakemake
from pipeline.workflow.stage import run
from stages import index
from tests.project import ROOT, link_code
from tests.voc_tree import make_tree, minimal_params

NUMBERS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_warned", set())


@pytest.fixture(params=NUMBERS)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(request.param, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_missing_lock_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "lock").open("a") as file:
        assert {locks.take(file, "cards may be shared", wait=wait) for wait in (True, False)} == {locks.Lock.NONE}
    line = f"warning: {tmp_path}/lock: the file system has no locks (No locks available): cards may be shared\n"
    assert capsys.readouterr().err == line


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "lock").open("a") as file, pytest.raises(OSError, match="Input/output"):
        locks.take(file, "")


def test_locks_between_open_files(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open("a") as other:
        assert locks.take(one, "", shared=True) is locks.take(other, "", shared=True) is locks.Lock.HELD
        assert locks.take(one, "") is locks.Lock.BUSY


@pytest.mark.usefixtures("no_locks")
def test_a_stage_runs_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(minimal_params(make_tree(Path("data")))))
    run("index", index.main, [])
    assert Path("results/test/index/index.json").exists()
    assert "two processes could run the same block at the same time" in capsys.readouterr().err


@pytest.mark.usefixtures("no_locks")
def test_locks_of_a_snakemake_that_may_be_alive_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locks").mkdir()
    snakemake._drop_dead_locks(tmp_path)
    assert (tmp_path / "locks").exists()
    assert capsys.readouterr().err.count("run snakemake --unlock") == 1


def test_stores_need_no_locks(tmp_path: Path) -> None:
    """HDF5 calls flock from C, so the test overrides it with a preloaded library."""
    library = tmp_path / "nolock.so"
    source = "#include <errno.h>\nint flock(int file, int operation) { errno = ENOLCK; return -1; }\n"
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=source, text=True, check=True)
    code = (
        "import sys, numpy, pathlib\n"
        "from pipeline.stores.raster import RasterStore, RasterWriter, write_store\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with RasterWriter(path, 'maps') as writer: writer.append('a', numpy.ones((2, 2), numpy.uint8))\n"
        "assert RasterStore(path).get('a').sum() == 4\n"
        "write_store(path, 'maps', ['b'], numpy.array([[0, 1, 2, 0, 0]]), numpy.ones(2, numpy.uint8))\n"
        "assert RasterStore(path).get('b').sum() == 2\n"
    )
    environment = {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "maps.h5")], env=environment, check=True)
