"""A training stage, killed at random moments and started again until it is done, against an unbroken run of it.

    python -m benchmarks.kill STAGE NAME [--kills N] [--seed N] [--params FILE ...] [--set JSON] [--threads N]

STAGE is classifier, refinement, affinity or segmentation; its inputs must lie in results/ already. Both runs work in a
temporary folder, on links to the inputs. Prints the sha256 of every output of both; the exit status is 1 where any two
differ.
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
    """One job as commands in a folder of its own."""

    def __init__(self, job: Job, dataset: Path, folder: Path, options: list[str]) -> None:
        """
        Args:
            job: the training.
            dataset: its images' root, as params.yaml names it.
            folder: made here, with links to the code, the dataset and the job's inputs.
            options: of the stage's command.
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
        """When the checkpoint was last written; 0 where there is none."""
        found = [path for path in (self.folder / self.job.folder).glob(".checkpoint-*") if path.suffix == ""]
        try:
            return max((path.stat().st_mtime_ns for path in found), default=0)
        except FileNotFoundError:  # removed meanwhile: the run is done
            return 0

    def run(self, kill_after: float | None = None) -> tuple[bool, float]:
        """Start the stage.

        Args:
            kill_after: seconds from this run's first checkpoint to its SIGKILL; None: let it end.

        Returns:
            Whether it was killed, and the seconds from its first checkpoint to its end.

        Raises:
            RuntimeError: it failed by itself.
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
        """sha256 by the outputs' names."""
        return {path.name: sha256(self.folder / path) for path in self.job.outputs.values()}

    def resumptions(self) -> int:
        """How often a run took up a checkpoint."""
        return (self.folder / "log.txt").read_text().count("goes on from epoch")


def compare(job: Job, dataset: Path, folder: Path, options: list[str], kills: int, seed: int) -> tuple[Trial, Trial]:
    """Run the job unbroken, and once more with ``kills`` kills at moments drawn uniformly from its training.

    Returns:
        The two, both done.
    """
    options = [*options, "--checkpoint-every", str(EVERY)]
    unbroken = Trial(job, dataset, folder / "unbroken", options)
    _, seconds = unbroken.run()
    print(f"unbroken: {seconds:.1f} s from the first checkpoint to the end", flush=True)
    killed = Trial(job, dataset, folder / "killed", options)
    moments = np.sort(np.random.default_rng(seed).uniform(0, max(0.1, seconds - kills * EVERY), kills))
    for after in np.diff(moments, prepend=0.0).tolist():
        was_killed, _ = killed.run(after)
        print(f"killed {after:.2f} s after a checkpoint" if was_killed else "done before the kill", flush=True)
        if not was_killed:
            return unbroken, killed
    killed.run()
    return unbroken, killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("name")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--params", nargs="+", default=["params.yaml"])
    parser.add_argument("--set", default="{}")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    files = [Path(name).resolve() for name in given.params]
    params = parameters.load(files, json.loads(given.set))
    options = ["--params", *map(str, files), "--set", given.set, "--threads", str(given.threads)]
    with tempfile.TemporaryDirectory() as folder:
        job = Graph(params).find(given.stage, given.name)
        root = Path(params.dataset.root)
        unbroken, killed = compare(job, root, Path(folder), options, given.kills, given.seed)
        expected, found = unbroken.hashes(), killed.hashes()
        print(f"{job.label}: resumed {killed.resumptions()} times")
    for name, value in expected.items():
        print(f"{name:<14} {value}\n{'':<14} {found[name]}  {'same' if found[name] == value else 'DIFFERENT'}")
    sys.exit(expected != found)


if __name__ == "__main__":
    main()
