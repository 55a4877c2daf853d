"""Ctrl-C and SIGTERM: a stage keeps what it has done, says how to resume, leaves no process, exits with 130 or 143."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import interrupts
from pipeline.workflow.stage import run
from stages import index
from tests.project import link_code
from tests.stopping import (
    CLASSIFIER,
    LOG,
    STATUS,
    copy_without,
    group,
    hashes,
    log,
    wait_until,
    wait_until_none_is_left,
)
from tests.voc_tree import make_tree, minimal_params

SALIENCY = Path("results/test/saliency")
TRAINING = ("stages.classifier", "base", "--workers", "2")
BLOCKS = ("stages.saliency", "--workers", "2")
PLAIN, TRAPPED = "tee /dev/null", "(trap '' INT TERM; exec tee /dev/null)"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset, its index, and both stages done without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        link_code(folder)
        params: dict[str, Any] = minimal_params(make_tree(Path("data"), train=160))
        training = {"batch_size": 20, "lr": 0.05, "epochs": 4, "accumulation": 2}
        params["classifiers"]["base"] = {"backbone": {"name": "small"}, "training": training}
        params["saliency"] = {"kind": "fine_grained", "path": None}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        run("index", index.main, [])
        for command in (TRAINING, BLOCKS):
            assert begin(command).wait(120) == 0, log()
    return folder


@pytest.fixture
def project(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same before both stages."""
    project = copy_without(unbroken, tmp_path, CLASSIFIER, SALIENCY)
    monkeypatch.chdir(project)
    return project


def begin(command: Sequence[str], reader: str = PLAIN) -> subprocess.Popen[bytes]:
    """The stage in a process group of its own, as a shell starts it; what it prints goes through ``reader``."""
    LOG.unlink(missing_ok=True)
    options = ("--threads", "1", "--device", "cpu", "--checkpoint-every", "1e9")
    script = f'trap : INT TERM; "$0" -m "$@" 2>&1 | {reader} > {LOG}; exit ${{PIPESTATUS[0]}}'
    return subprocess.Popen(["bash", "-c", script, sys.executable, *command, *options], start_new_session=True)


def stopped(process: subprocess.Popen[bytes], when: Callable[[], object], number: signal.Signals) -> None:
    """Signal the whole group, workers and reader too, as a terminal or a scheduler does; none of it may be left."""
    wait_until(process, when)
    os.killpg(process.pid, number)
    assert process.wait(60) == STATUS[number], log()
    wait_until_none_is_left(process.pid)
    assert "Traceback" not in log()


@pytest.mark.parametrize(("number", "reader"), [(signal.SIGINT, PLAIN), (signal.SIGTERM, TRAPPED)])
def test_a_stopped_training_loses_no_step_and_ends_with_the_same_bytes(
    unbroken: Path, project: Path, number: signal.Signals, reader: str
) -> None:
    stopped(begin(TRAINING, reader), lambda: "epoch 1/" in log(), number)
    if reader == TRAPPED:
        *before, told, saved = log().splitlines()
        assert told.startswith(f"stopping on {number.name}; to resume, run the same command again: python -m stages.")
        assert "classifier base --workers 2 --threads 1" in told
        assert re.fullmatch(r"classifier base: state saved at epoch \d+, step \d+", saved)
        assert all(line.startswith("classifier base: epoch") for line in before)
    assert begin(TRAINING).wait(120) == 0
    resumed = re.match(r"classifier base: resumes from epoch (\d+), step (\d+)", log())
    assert resumed
    epoch, step = map(int, resumed.groups())
    assert step >= 4  # 8 batches are 4 steps an epoch, and one epoch was done
    assert epoch == step // 4 + 1
    assert hashes(CLASSIFIER) == hashes(unbroken / CLASSIFIER)


@pytest.mark.parametrize("number", STATUS)
def test_a_stopped_block_stage_keeps_its_blocks(unbroken: Path, project: Path, number: signal.Signals) -> None:
    stopped(begin(BLOCKS, TRAPPED), lambda: list(SALIENCY.glob(".checkpoint-*/00000.part")), number)
    assert log().splitlines()[-1].startswith(f"stopping on {number.name}; to resume, run the same command again")
    folder = next(SALIENCY.glob(".checkpoint-*"))
    kept = sorted(path.name for path in folder.glob("*.part"))
    assert kept == [f"{number:05d}.part" for number in range(len(kept))]
    assert begin(BLOCKS).wait(120) == 0
    assert hashes(SALIENCY) == hashes(unbroken / SALIENCY)


def test_a_stage_that_is_stopped_while_it_loads_prints_one_line(project: Path) -> None:
    process = begin(TRAINING, TRAPPED)
    stopped(process, lambda: b"libtorch" in stage_maps(process.pid), signal.SIGINT)
    assert len(log().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs pipes that keep each write apart")
def test_a_line_is_written_with_its_end_also_without_buffers() -> None:
    code = "from pipeline import interrupts; interrupts.listen(); print('one', 'line'); print('another', flush=True)"
    reader, writer = os.pipe2(os.O_DIRECT)
    with open(reader, "rb", buffering=0) as packets:
        subprocess.run([sys.executable, "-u", "-c", code], stdout=writer, check=True)
        os.close(writer)
        assert list(iter(lambda: packets.read(4096), b"")) == [b"one line\n", b"another\n"]


def stage_maps(leader: int) -> bytes:
    """The libraries that the group's processes have loaded."""
    found = b""
    for number in group(leader):
        with suppress(OSError):
            found += Path(f"/proc/{number}/maps").read_bytes()
    return found


class TestHandler:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interrupts, "_number", None)
        monkeypatch.setattr(interrupts, "_time", float("-inf"))

    def test_within_deferred_the_next_check_raises(self) -> None:
        done = []

        def work() -> None:
            with interrupts.deferred():
                interrupts._handle(signal.SIGTERM, None)
                done.append("step")
                interrupts.check()
                done.append("one more")

        with pytest.raises(interrupts.Stopped) as caught:
            work()
        assert done == ["step"]
        assert caught.value.code == 143

    def test_a_signal_that_comes_twice_at_once_counts_once(self) -> None:
        """``timeout`` sends its signal to the process and then to its group."""
        with pytest.raises(interrupts.Stopped):
            interrupts._handle(signal.SIGTERM, None)
        interrupts._handle(signal.SIGTERM, None)

    def test_a_second_ctrl_c_does_not_wait_for_the_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done = []

        def work() -> None:
            with interrupts.deferred():
                interrupts._handle(signal.SIGINT, None)
                done.append("step")
                monkeypatch.setattr(interrupts, "_time", interrupts._time - 2)
                interrupts._handle(signal.SIGINT, None)
                done.append("one more")

        with pytest.raises(interrupts.Stopped):
            work()
        assert done == ["step"]
