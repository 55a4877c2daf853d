"""Snakemake with a compact progress display, used by ``make reproduce`` and ``wsss run``.

``python -m pipeline.workflow.reproduce [ARGUMENT ...]`` runs ``snakemake --cores all ARGUMENT ...`` and writes the
output of Snakemake and the stages to a log. On a terminal it shows a bar over the jobs with the time left and the
running jobs, and the scores of each row once they are known. In a file or pipe it prints one line per job. It prints
the table of the first rows as soon as they are done. If a job fails, it prints the end of the job's log.
"""

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from pipeline.config.stage_table import STAGES
from pipeline.errors import exit_on_faults

LOG = Path(".snakemake/log/reproduce.log")
AGAIN = "run the same command again"
SCORED = re.compile(
    r"(?:seed_\d+/)?predictions/\w+ on .*miou"
)  # the line with the scores of a row, from the evaluation stage
ADVANCED = re.compile(r"(\w+(?: [^ :]+)?):(?: .*?)? (\d+)/(\d+)\b")  # a job's own progress: JOB: epoch 2/6: loss 0.1
BAR = 20  # characters
_PR_SET_PDEATHSIG = 1
TAIL = 40  # lines to print of a failed job's log if it contains no error message


class Watch:
    """The state of the run, parsed from Snakemake's output, and its display."""

    def __init__(self, out: TextIO, clock: float) -> None:
        self.out, self.start = out, clock
        self.terminal = out.isatty()
        self.total = self.done = 0
        self.left: Counter[str] = Counter()  # remaining jobs by rule
        self.names: dict[str, tuple[str, str]] = {}  # rule and name of a job by its id
        self.first: dict[str, Path] = {}  # output and log of the report on the first rows
        self.began: dict[str, float] = {}  # start times of the running jobs by id
        self.took: dict[str, list[float]] = defaultdict(list)  # seconds of the finished jobs by rule
        self.share: dict[str, float] = {}  # how much of a running job is done, by its label
        self.failed: list[tuple[str, list[str]]] = []  # rule, and the lines that Snakemake prints about it
        self._block: list[str] = []  # rule and id of the job that Snakemake is describing
        self._stats = False
        self._status = ""  # the status line that is shown

    def read(self, line: str, now: float) -> None:
        """Parse a line of the output."""
        if self._stats:
            self._count(line)
        elif line.startswith("Job stats:"):
            self._stats = True
        elif match := re.match(r"(?:local)?rule (\w+):$", line):
            self._block = [match[1]]
        elif match := re.match(r"Error in (?:rule|group) (\w+)", line):
            self._block = []
            self.failed.append((match[1], []))
        elif line.startswith("    ") and self.failed and not self._block:
            self.failed[-1][1].append(line.strip())
        elif line.startswith("    ") and self._block:
            self._describe(line.strip(), now)
        elif match := re.match(r"Finished jobid: (\d+)", line):
            self._finish(match[1], now)
        elif SCORED.match(line):
            self.print_line(line)
        elif match := ADVANCED.match(line):
            self.share[match[1]] = int(match[2]) / max(1, int(match[3]))

    def _count(self, line: str) -> None:
        """Parse a line of the table of jobs by rule, whose last line is the total."""
        match = re.match(r"(\w+) +(\d+)", line)
        if match and match[1] == "total":  # the rule all has no job of its own
            self.total, self._stats = int(match[2]) - self.left.pop("all", 0), False
        elif match:
            self.left[match[1]] = int(match[2])

    def _describe(self, line: str, now: float) -> None:
        key, _, value = line.partition(": ")
        if self._block[0] == "first_report" and key in ("output", "log"):
            self.first[key] = Path(value.split(", ")[0])
        if key == "jobid":
            self._block.append(value)
            self.names[value] = (self._block[0], "")
            self.began[value] = now
        elif key == "wildcards" and len(self._block) == 2:
            name = "".join(part.partition("=")[2] for part in value.split(", "))  # 'seed_2/' and 'base'
            self.names[self._block[1]] = (self._block[0], name)

    def _finish(self, job: str, now: float) -> None:
        rule, name = self.names.get(job, ("", ""))
        seconds = now - self.began.pop(job, now)
        if rule == "all":
            return
        self.done += 1
        self.left[rule] -= 1
        self.took[rule].append(seconds)
        if not self.terminal:
            self.print_line(f"[{self.done}/{self.total}] {f'{rule} {name}'.strip()}: done in {seconds:.1f} s")
        if rule == "first_report" and self.first["log"].exists():
            for text in self.first["log"].read_text().splitlines():
                self.print_line(text)
            self.print_line(f"Report on these rows: {self.first['output']}; the other rows follow")

    def print_line(self, text: str) -> None:
        """Print a permanent line in place of the status line."""
        print(f"\r\033[K{text}" if self.terminal else text, file=self.out, flush=True)
        self._status = ""

    def show(self, now: float) -> None:
        """Draw the status line."""
        if not self.terminal:
            return
        running = ", ".join(map(self._label, self.began))
        counts = f"{self._bar()} {self.done}/{self.total} jobs done" if self.total else "planning"
        text = " | ".join(filter(None, [counts, self._left(now), running]))
        width = os.get_terminal_size(self.out.fileno()).columns or 80
        if text != self._status:
            print(f"\r\033[K{text[: width - 1]}", end="", file=self.out, flush=True)
        self._status = text

    def _label(self, job: str) -> str:
        """Name a job as its stage does: 'classifier base'."""
        return " ".join(filter(None, self.names[job]))

    def _bar(self) -> str:
        """The bar over the jobs, each as long as its stage's ``effort``."""
        left = sum(_effort(rule) * count for rule, count in self.left.items())
        done = sum(_effort(rule) * len(times) for rule, times in self.took.items())
        done += sum(_effort(self.names[job][0]) * self.share.get(self._label(job), 0.0) for job in self.began)
        filled = min(BAR, round(BAR * done / max(done + left, 1e-9)))
        return f"[{'#' * filled}{'-' * (BAR - filled)}]"

    def _left(self, now: float) -> str:
        """Estimate the time left from the durations of jobs and the mean number of parallel jobs.

        A job takes as long as the finished jobs of its rule; or as a running job of its rule, by the share that is
        done; or its stage's ``effort`` times the mean duration per effort of the rules that are known.
        """
        seconds = {rule: sum(times) / len(times) for rule, times in self.took.items()}
        spent = {job: now - began for job, began in self.began.items()}
        for job, elapsed in spent.items():
            if share := self.share.get(self._label(job)):
                seconds.setdefault(self.names[job][0], elapsed / share)
        if not seconds or now <= self.start:
            return ""
        pace = sum(seconds.values()) / max(1e-9, sum(map(_effort, seconds)))
        rest = sum(count * seconds.get(rule, pace * _effort(rule)) for rule, count in self.left.items())
        rest -= sum(spent.values())
        busy = sum(sum(times) for times in self.took.values()) + sum(spent.values())
        parallel = max(1.0, busy / (now - self.start))
        minutes = max(0, round(max(0.0, rest) / parallel / 60))
        return f"about {minutes} min left" if minutes else "less than a minute left"

    def close(self) -> None:
        """Clear the status line."""
        if self.terminal:
            print("\r\033[K", end="", file=self.out, flush=True)


def _effort(rule: str) -> float:
    """How long a job takes relative to those of other rules."""
    return STAGES[rule].effort if rule in STAGES else 0.0


def failure_report(rule: str, lines: list[str]) -> list[str]:
    """Return the lines to print about a failed job: the error messages in its log or, failing that, its end."""
    log = next((line.split()[1].rstrip(",") for line in lines if line.startswith("log: ")), None)
    printed = Path(log).read_text().splitlines() if log and Path(log).exists() else []
    errors = [line for line in printed if line.startswith("error: ")]
    stopped = [line for line in printed if line.startswith("stopping on ")]
    return [
        f"{rule} failed" + (f"; its log is {log}:" if log else ":"),
        *(errors or stopped or printed[-TAIL:] or lines),
    ]


def run(arguments: list[str], out: TextIO, log_file: Path = LOG, again: str = AGAIN) -> int:
    """Run Snakemake and show its progress.

    Args:
        arguments: of Snakemake.
        log_file: the file for all its output.
        again: what to do after an interruption, such as 'run the same command again'.

    Returns:
        Snakemake's exit status, or 128 + the signal's number if this process received a signal.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", *arguments]
    # The rules start `python`, which must be this one even if its environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # A process group of its own ensures that each process gets a signal once, whether it was sent to one or to all.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path},
        process_group=0,
        preexec_fn=_end_with_parent,
    )
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        os.killpg(process.pid, signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forward)
    watch, tail = Watch(out, time.monotonic()), deque[str](maxlen=TAIL)
    assert process.stdout is not None
    with log_file.open("wb", buffering=0) as log:
        logged = True
        for line in _lines(process, watch):
            try:
                if logged:
                    log.write(line.encode())
            except OSError as error:  # the stages report a full disk themselves
                logged = False
                watch.print_line(f"warning: {log_file}: {error.strerror}; the rest of the output is not logged")
            tail.append(line.rstrip())
            watch.read(line.rstrip("\n"), time.monotonic())
    status = process.wait()
    watch.close()
    if received:
        watch.print_line(f"stopped, {watch.done} of {watch.total} jobs done; to resume, {again}")
        return 128 + received[0]
    if status:
        watch.print_line(f"the whole output is in {log_file}; once the fault is corrected, to go on, {again}")
    for rule, lines in watch.failed:
        for text in failure_report(rule, lines):
            watch.print_line(text)
    if status and not watch.failed:
        for text in [line for line in tail if line.startswith("error: ")] or tail:
            watch.print_line(text)
    return status


def _end_with_parent() -> None:
    """Let the kernel kill this process if its parent is killed. Snakemake would keep its lock on the folder otherwise.

    A stage that runs ends at its next line of output; the next run waits for it, and goes on from its saved state.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _lines(process: subprocess.Popen[bytes], watch: Watch) -> Iterator[str]:
    """Yield the lines of the output as they arrive, and redraw the status line every second."""
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        if ready:
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace") + "\n"
        watch.show(time.monotonic())
    if rest:
        yield rest.decode(errors="replace")


if __name__ == "__main__":
    with exit_on_faults():
        sys.exit(run(["--cores", "all", *sys.argv[1:]], sys.stdout))
