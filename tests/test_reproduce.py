"""What a person sees of ``make reproduce``: on a terminal, in a file, when a job fails and after Ctrl-C."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.workflow.reproduce import LOG, Watch, failure_report
from tests.project import copy, environment

INDEX = "results/demo/index/index.json"
COMMAND = [sys.executable, "-m", "pipeline.workflow.reproduce", "--", INDEX]
OUTPUT = """Job stats:
job           count
----------  -------
classifier        1
evaluation        2
total             3

[Sat Nov 28 07:42:08 2026]
rule classifier:
    input: results/demo/index/index.json
    jobid: 4
    reason: Missing output files: results/demo/classifiers/base/model.pt
    wildcards: seed=, name=base
classifier base: epoch 1/1: loss 0.6781
Finished jobid: 4 (Rule: classifier)
1 of 3 steps (33%) done
rule evaluation:
    jobid: 5
    wildcards: seed=, name=predictions/oaa
rule evaluation:
    jobid: 6
    wildcards: seed=, name=predictions/cam
predictions/oaa on 150 evaluation images: miou 0.6530, pixel_accuracy 0.9100
Finished jobid: 5 (Rule: evaluation)
""".splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watch(out: io.StringIO, seconds: float) -> Watch:
    found = Watch(out, 0.0)
    for number, line in enumerate(OUTPUT, 1):
        found.read(line, number * seconds)
    return found


def test_without_a_terminal_there_is_a_line_a_job() -> None:
    out = io.StringIO()
    watch(out, 1.0).show(30.0)
    assert out.getvalue().splitlines() == [
        "[1/3] classifier base: done in 4.0 s",
        "predictions/oaa on 150 evaluation images: miou 0.6530, pixel_accuracy 0.9100",
        "[2/3] evaluation predictions/oaa: done in 6.0 s",
    ]


def test_a_job_of_a_further_seed_is_named_as_its_stage_names_it() -> None:
    out = Terminal()
    found = watch(out, 1.0)
    scores = "seed_2/predictions/oaa on 150 evaluation images: miou 0.6, pixel_accuracy 0.9"
    for line in ("rule classifier:", "    jobid: 9", "    wildcards: seed=seed_2/, name=base", scores):
        found.read(line, 30.0)
    assert found.names["9"] == ("classifier", "seed_2/base")
    assert out.getvalue().endswith(f"{scores}\n")


def test_a_terminal_shows_rows_and_one_line_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(out, "fileno", lambda: 1, raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((100, 24)))
    found = watch(out, 60.0)
    found.show(60.0 * len(OUTPUT))
    *rows, moving = out.getvalue().split("\r\033[K")
    assert "".join(rows) == "predictions/oaa on 150 evaluation images: miou 0.6530, pixel_accuracy 0.9100\n"
    # The job that is left takes 6 minutes by its rule's mean, of which 3 have passed; one job at a time did so far.
    assert re.fullmatch(r"\[#+-*\] 2/3 jobs done \| about \d+ min left \| evaluation predictions/cam", moving)
    assert "about 3 min" in moving or "about 4 min" in moving


def test_a_job_that_reports_its_progress_foretells_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before a training ends, its epochs tell how long it takes, and others of its kind."""
    out = Terminal()
    monkeypatch.setattr(out, "fileno", lambda: 1, raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((100, 24)))
    found = Watch(out, 0.0)
    table = ["Job stats:", "job count", "classifier 2", "all 1", "total 3", "rule classifier:", "    jobid: 1"]
    for line in [*table, "    wildcards: seed=, name=base", "classifier other: epoch 9/10: loss 0.1"]:
        found.read(line, 0.0)
    assert found._left(60.0) == ""
    found.read("classifier base: epoch 1/4: loss 0.6", 60.0)
    assert found._left(60.0) == "about 7 min left"  # three more minutes, and four of the other classifier
    found.show(60.0)
    assert out.getvalue().endswith("[##------------------] 0/2 jobs done | about 7 min left | classifier base")
    found.read("classifier base: epoch 3/4: loss 0.2", 240.0)
    assert found._left(240.0) == "about 7 min left"  # it has become slower: 80 + 320 s


def test_the_table_of_the_first_rows_is_printed_when_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.log").write_text("  method (%)\n> cam\n")
    out = io.StringIO()
    found = Watch(out, 0.0)
    for line in (
        "rule first_report:",
        "    input: results/demo/index/index.json",
        "    output: results/demo/first/report.html, results/demo/first/metrics.json",
        "    log: first.log",
        "    jobid: 9",
        "Finished jobid: 9 (Rule: first_report)",
    ):
        found.read(line, 2.0)
    assert out.getvalue().splitlines()[1:] == [
        "  method (%)",
        "> cam",
        "Report on these rows: results/demo/first/report.html; the other rows follow",
    ]


def test_a_failed_job_is_explained_by_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.log").write_text("index: images checked: 2/9\nerror: a.png: damaged; replace it\nerror: b.png: missing\n")
    Path("two.log").write_text("".join(f"line {number}\n" for number in range(100)))
    at = "log: {} (check log file(s) for error details)"
    heading = "index failed; its log is {}:"
    expected = [heading.format("one.log"), "error: a.png: damaged; replace it", "error: b.png: missing"]
    assert failure_report("index", [at.format("one.log")]) == expected
    assert failure_report("index", [at.format("two.log")])[-1] == "line 99"
    assert failure_report("all", ["message: no log"]) == ["all failed:", "message: no log"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = copy(tmp_path / "project", git=False)
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"(train|evaluation): (600|150)\b", r"\1: 9", params))
    return folder


def on_a_terminal(folder: Path, command: list[str]) -> tuple[int, str]:
    """Exit status, and what a terminal of 80 columns got."""
    mine, its = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=its, stderr=its, stdin=its)
    os.close(its)
    found = b""
    while True:
        try:
            data = os.read(mine, 4096)
        except OSError:  # its other end is closed
            break
        if not data:
            break
        found += data
    os.close(mine)
    return process.wait(60), found.decode()


def test_reproduce_on_a_terminal_then_in_a_pipe(project: Path) -> None:
    status, text = on_a_terminal(project, COMMAND)
    assert status == 0, text
    assert "/2 jobs done" in text
    assert "reason" not in text
    assert "\n" not in text.replace("\r\n", "").strip()
    assert "reason: Missing output files" in (project / LOG).read_text()
    command = [*COMMAND[:3], "--force", *COMMAND[3:]]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
    assert re.fullmatch(r"\[1/1\] index: done in [\d.]+ s\n", done.stdout)


def test_an_error_comes_out_whole_and_last(project: Path) -> None:
    (project / "stages/demo.py").write_text("raise SystemExit('error: the disk is full; make room')\n")
    status, text = on_a_terminal(project, COMMAND)
    assert status == 1
    *_, log, heading, error = [line.rpartition("\033[K")[2] for line in text.rstrip("\r\n").split("\r\n")]
    assert heading == "demo failed; its log is results/demo/logs/dataset.log:"
    assert error == "error: the disk is full; make room"
    assert log == f"the whole output is in {LOG}; once the fault is corrected, to go on, run the same command again"


def test_a_full_disk_ends_the_log_and_not_the_run(project: Path) -> None:
    (project / LOG).parent.mkdir(parents=True)
    (project / LOG).symlink_to("/dev/full")
    done = subprocess.run(COMMAND, cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warning = f"warning: {LOG}: No space left on device; the rest of the output is not logged"
    assert done.stdout.splitlines().count(warning) == 1
    assert "[2/2] index: done" in done.stdout


def test_wrong_params_come_out_whole(project: Path) -> None:
    with (project / "params.yaml").open("a") as file:
        file.write("sede: 1\n")
    done = subprocess.run(COMMAND, cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "error: params.yaml: sede: unknown key; did you mean seed?"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_no_process(project: Path, number: signal.Signals, status: int) -> None:
    (project / "stages/demo.py").write_text("import pathlib, time\npathlib.Path('began').touch()\ntime.sleep(600)\n")
    process = subprocess.Popen(COMMAND, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (project / "began").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == status
    assert out.splitlines() == ["stopped, 0 of 2 jobs done; to resume, run the same command again"]
    assert "stopping on SIGINT; to resume" in (project / LOG).read_text()
    left = [path for path in Path("/proc").glob("[0-9]*/cwd") if is_at(path, project)]
    assert not left


def is_at(link: Path, folder: Path) -> bool:
    try:
        return link.resolve() == folder.resolve()
    except OSError:
        return False
