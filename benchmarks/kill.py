"""Compare a training stage that is killed and resumed at random moments with an uninterrupted run.

    python -m benchmarks.kill STAGE NAME [--kills N] [--seed N] [--params FILE ...] [--set JSON] [--threads N]

STAGE is classifier, refinement, affinity or segmentation; its inputs must already be in results/. Both runs work in a
temporary folder with links to the inputs. Prints the sha256 of every output of both runs; the exit status is 1 if any
two differ.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config import params as parameters
from pipeline.stores.files import sha256
from pipeline.workflow.graph import Graph, Job

STAGES = ("classifier", "refinement", "affinity", "segmentation")
EVERY = 0.3  # seconds between checkpoints


class Trial:
    """A training job that runs in its own folder."""

    def __init__(self, job: Job, dataset: Path, folder: Path, options: list[str]) -> None:
        """
        Args:
            job: the training job.
            dataset: the root of its images, as in params.yaml.
            folder: filled with links to the code, the dataset and the job's inputs.
            options: arguments of the stage's command.
        """
        self.job, self.folder = job, folder
        manifests = [path.parent / "manifest.json" for path in job.inputs.values()]
        for path in (Path("pipeline"), Path("stages"), dataset, *job.inputs.values(), *manifests):
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_absolute() and not link.exists():
                link.symlink_to(path.resolve())
        self.command = [sys.executable, "-m", f"stages.{job.stage}", job.name, *options]

    def checkpoint(self) -> int:
        """Modification time of the newest checkpoint in nanoseconds; 0 if there is none."""
        files = [path for path in (self.folder / self.job.folder).glob(".checkpoint-*") if path.suffix == ""]
        try:
            return max((path.stat().st_mtime_ns for path in files), default=0)
        except FileNotFoundError:  # removed in the meantime, since the run has ended
            return 0

    def run(self, kill_after: float | None = None) -> tuple[bool, float]:
        """Start the stage.

        Args:
            kill_after: seconds from this run's first checkpoint to its SIGKILL; None lets it finish.

        Returns:
            Whether it was killed, and the seconds from its first checkpoint to its end.

        Raises:
            RuntimeError: the stage failed without being killed.
        """
        before = self.checkpoint()
        log = self.folder / "log.txt"
        with log.open("a") as file:
            process = subprocess.Popen(self.command, cwd=self.folder, stdout=file, stderr=file, start_new_session=True)
        saved: float | None = None
        while process.poll() is None:
            if saved is None and self.checkpoint() > before:
                saved = time.monotonic()
            if saved is not None and kill_after is not None and time.monotonic() - saved >= kill_after:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.005)
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{' '.join(self.command)} failed:\n{log.read_text()}")
        return process.returncode != 0, time.monotonic() - saved if saved is not None else 0.0

    def hashes(self) -> dict[str, str]:
        """sha256 of each output by its file name."""
        return {path.name: sha256(self.folder / path) for path in self.job.outputs.values()}

    def resumptions(self) -> int:
        """The number of runs that resumed from a checkpoint."""
        return (self.folder / "log.txt").read_text().count("resumes from epoch")


def compare(job: Job, dataset: Path, folder: Path, options: list[str], kills: int, seed: int) -> tuple[Trial, Trial]:
    """Run the job without a kill, and again with ``kills`` kills at moments drawn uniformly from its training.

    Returns:
        The uninterrupted and the killed trial, both finished.
    """
    options = [*options, "--checkpoint-every", str(EVERY)]
    whole = Trial(job, dataset, folder / "whole", options)
    _, seconds = whole.run()
    print(f"uninterrupted: {seconds:.1f} s from the first checkpoint to the end", flush=True)
    killed = Trial(job, dataset, folder / "killed", options)
    moments = np.sort(np.random.default_rng(seed).uniform(0, max(0.1, seconds - kills * EVERY), kills))
    for after in np.diff(moments, prepend=0.0).tolist():
        was_killed, _ = killed.run(after)
        print(f"killed {after:.2f} s after a checkpoint" if was_killed else "done before the kill", flush=True)
        if not was_killed:
            return whole, killed
    killed.run()
    return whole, killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("name")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--params", nargs="+", default=["params.yaml"])
    parser.add_argument("--set", default="{}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    files = [Path(name).resolve() for name in arguments.params]
    params = parameters.load(files, json.loads(arguments.set))
    options = ["--params", *map(str, files), "--set", arguments.set, "--threads", str(arguments.threads)]
    with tempfile.TemporaryDirectory() as folder:
        job = Graph(params).find(arguments.stage, arguments.name)
        root = Path(params.dataset.root)
        whole, killed = compare(job, root, Path(folder), options, arguments.kills, arguments.seed)
        expected, actual = whole.hashes(), killed.hashes()
        print(f"{job.label}: resumed {killed.resumptions()} times")
    for name, value in expected.items():
        print(f"{name:<14} {value}\n{'':<14} {actual[name]}  {'same' if actual[name] == value else 'DIFFERENT'}")
    sys.exit(expected != actual)


if __name__ == "__main__":
    main()
