"""Snakemake for a person who watches: ``python -m pipeline.workflow.reproduce [ARGUMENT ...]``, which make calls.

It starts ``snakemake --cores all ARGUMENT ...`` and keeps all that Snakemake and the stages print in a log. A terminal
shows one line that moves (jobs done, time left, what runs) and each row's numbers once they are known; a file or a pipe
gets a line a job. A job that fails is shown with what its stage printed last.
"""

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

LOG = Path(".snakemake/log/reproduce.log")
SCORED = re.compile(r"predictions/\w+ on ")  # what the evaluation stage prints of a row
TAIL = 40  # lines of a failed job's log, where its stage gives no error of its own


class Watch:
    """What Snakemake's output says about the run so far."""

    def __init__(self, out: TextIO, clock: float) -> None:
        self.out, self.start = out, clock
        self.terminal = out.isatty()
        self.total = self.done = 0
        self.left: Counter[str] = Counter()  # jobs by rule
        self.names: dict[str, tuple[str, str]] = {}  # rule and name of a job by its id
        self.began: dict[str, float] = {}  # of the jobs that run
        self.took: dict[str, list[float]] = defaultdict(list)  # seconds of the finished jobs by rule
        self.failed: list[tuple[str, list[str]]] = []  # rule and the lines that Snakemake prints about it
        self._block: list[str] = []  # the job that Snakemake is describing
        self._stats = False
        self._shown = ""  # the line that moves, as it stands

    def read(self, line: str, now: float) -> None:
        """Take in a line of the output."""
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
            self.tell(line)

    def _count(self, line: str) -> None:
        """A row of the table of jobs by rule, which ends with their total."""
        match = re.match(r"(\w+) +(\d+)", line)
        if match and match[1] == "total":
            self.total, self._stats = int(match[2]), False
        elif match:
            self.left[match[1]] = int(match[2])

    def _describe(self, line: str, now: float) -> None:
        key, _, value = line.partition(": ")
        if key == "jobid":
            self._block.append(value)
            self.names[value] = (self._block[0], "")
            self.began[value] = now
        elif key == "wildcards" and len(self._block) == 2:
            name = "/".join(part.partition("=")[2] for part in value.split(", "))
            self.names[self._block[1]] = (self._block[0], name)

    def _finish(self, job: str, now: float) -> None:
        rule, name = self.names.get(job, ("", ""))
        seconds = now - self.began.pop(job, now)
        self.done += 1
        self.left[rule] -= 1
        self.took[rule].append(seconds)
        if not self.terminal and rule != "all":
            self.tell(f"[{self.done}/{self.total}] {f'{rule} {name}'.strip()}: done in {seconds:.1f} s")

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        print(f"\r\033[K{text}" if self.terminal else text, file=self.out, flush=True)
        self._shown = ""

    def show(self, now: float) -> None:
        """Draw the line that moves."""
        if not self.terminal:
            return
        running = ", ".join(" ".join(filter(None, self.names[job])) for job in self.began)
        counts = f"{self.done}/{self.total} jobs done" if self.total else "planning"
        text = " | ".join(filter(None, [counts, self._left(now), running]))
        width = os.get_terminal_size(self.out.fileno()).columns or 80
        if text != self._shown:
            print(f"\r\033[K{text[: width - 1]}", end="", file=self.out, flush=True)
        self._shown = text

    def _left(self, now: float) -> str:
        """The time left: each job takes the mean of its rule so far, or of all; as many run at once as did so far."""
        finished = [seconds for times in self.took.values() for seconds in times]
        if not finished or now <= self.start:
            return ""
        mean = sum(finished) / len(finished)
        of = {rule: sum(times) / len(times) for rule, times in self.took.items()}
        spent = sum(now - began for began in self.began.values())
        work = sum(count * of.get(rule, mean) for rule, count in self.left.items()) - spent
        at_once = max(1.0, (sum(finished) + spent) / (now - self.start))
        minutes = max(0, round(max(0.0, work) / at_once / 60))
        return f"about {minutes} min left" if minutes else "less than a minute left"

    def close(self) -> None:
        """Clear the line that moves."""
        if self.terminal:
            print("\r\033[K", end="", file=self.out, flush=True)


def explain(rule: str, lines: list[str]) -> list[str]:
    """What to show of a failed job: its stage's own errors, or the end of its log where it gives none."""
    log = next((line.split()[1].rstrip(",") for line in lines if line.startswith("log: ")), None)
    told = Path(log).read_text().splitlines() if log and Path(log).exists() else []
    own = [line for line in told if line.startswith("error: ")]
    stopped = [line for line in told if line.startswith("stopping on ")]
    return [f"{rule} failed" + (f"; its log is {log}:" if log else ":"), *(own or stopped or told[-TAIL:] or lines)]


def run(arguments: list[str], out: TextIO) -> int:
    """Run Snakemake to its end.

    Returns:
        Its exit status; 128 + the signal's number where this process was asked to stop.
    """
    LOG.parent.mkdir(parents=True, exist_ok=True)
    command = ["snakemake", "--cores", "all", *arguments]
    # In a process group of its own, so that each of its processes gets a signal once, whoever the sender meant.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
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
    with LOG.open("w") as log:
        for line in _lines(process, watch):
            log.write(line)
            log.flush()
            tail.append(line.rstrip())
            watch.read(line.rstrip("\n"), time.monotonic())
    status = process.wait()
    watch.close()
    if received:
        watch.tell(f"stopped, {watch.done} of {watch.total} jobs are done; to resume, run the same command again")
        return 128 + received[0]
    if status:
        watch.tell(f"all that was printed: {LOG}")
    for rule, lines in watch.failed:
        for text in explain(rule, lines):
            watch.tell(text)
    if status and not watch.failed:
        for text in [line for line in tail if line.startswith("error: ")] or tail:
            watch.tell(text)
    return status


def _lines(process: subprocess.Popen[bytes], watch: Watch) -> Iterator[str]:
    """The lines of the output, as they come; the moving line is drawn in between, once a second."""
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
    sys.exit(run(sys.argv[1:], sys.stdout))
