"""Every stage under faults: whatever happens, what is published is whole and belongs to its params.

The stages come from the stage table and their blocks from params.yaml: a new stage needs no entry here if a row of
params.yaml runs it. The suite takes a sample of the faults. WSSS_FAULTS=4 takes about four times as many, and further
kinds; WSSS_FAULTS=inf takes all of them.
"""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import chdir
from itertools import product
from pathlib import Path
from typing import TypeVar

import pytest

from pipeline.config.stage_table import STAGES
from pipeline.workflow.graph import Job
from tests.faults import SOURCES, TABLES, Fault, Outcome, Project, Server, contents, small_params

_T = TypeVar("_T")
MORE = float(os.environ.get("WSSS_FAULTS", "1"))
TEMPORARY = r"(^|/)\.[^/]*(checkpoint|\.partial$)"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Project]]:
    """The project in which each stage runs."""
    server, found = Server(), {}
    raw = small_params()
    for name in (*SOURCES, "", "table"):
        folder = tmp_path_factory.mktemp("faults") / (name or "demo")
        folder.mkdir()
        if name == "table":
            found[name] = Project(folder, {**raw, "rows": None, "tables": TABLES}, server)
        elif name:
            value, put = SOURCES[name]
            with chdir(folder):
                put()
            dataset = {**raw["dataset"], "root": "data/made", "demo": None, name: value}
            found[name] = Project(folder, {**raw, "dataset": dataset}, server, (name,))
        else:
            project = Project(folder, raw, server)
            found |= dict.fromkeys(project.jobs, project)
    yield found
    server.close()
    for project in found.values():
        assert contents(project.folder) == project.files, "a stage wrote to a published file instead of replacing it"


def sample(items: Sequence[_T], count: int) -> list[_T]:
    """``count`` of them, or ``MORE`` times as many, evenly spread."""
    count = int(min(len(items), count * MORE))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def those(accesses: list[str], start: str) -> list[int]:
    """The numbers of the accesses that start so."""
    return [number for number, access in enumerate(accesses, 1) if access.startswith(start)]


def files_of(folder: Path, path: Path) -> list[Path]:
    """The file, or all files below the folder, relative to ``folder``."""
    whole = folder / path
    files = [whole] if whole.is_file() else [file for file in whole.rglob("*") if file.is_file()]
    return sorted(file.relative_to(folder) for file in files)


def largest(project: Project, job: Job) -> int:
    """The bytes of the largest file that the job writes."""
    files = [file for path in job.outputs.values() for file in files_of(project.folder, path)]
    return max((project.folder / file).stat().st_size for file in files)


def one_line(run: Outcome, named: str = "") -> str:
    """Say how a run differs from one that ends with a line that names a file and a fix; empty if it does not."""
    lines = run.error.splitlines()
    if run.status == 1 and len(lines) == 1 and re.fullmatch(r"error: .+: .+; .+", lines[0]) and named in lines[0]:
        return ""
    return f"it ends with {run.status}: {run.error}"


class Cases:
    """The outcomes of faults: what is wrong after each, empty if nothing is."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str]] = []

    def add(self, fault: str, wrong: str) -> None:
        self.outcomes.append((fault, wrong))

    def check(self) -> None:
        wrong = [f"{fault}: {why}" for fault, why in self.outcomes if why]
        print(f"{len(self.outcomes)} faults, {len(wrong)} with a wrong outcome")
        assert self.outcomes
        assert not wrong, "\n".join(wrong)


STAGE = pytest.mark.parametrize("stage", STAGES)


@STAGE
def test_a_block_runs_every_stage(projects: dict[str, Project], stage: str) -> None:
    """A stage that this refuses needs a block in a row of params.yaml or in faults.PARAMS, or an entry in SOURCES."""
    assert stage in projects
    assert projects[stage].runs[stage].status == 0


@STAGE
def test_killed_at_any_access(projects: dict[str, Project], stage: str) -> None:
    project = projects[stage]
    job = project.jobs[stage]
    accesses, size = project.accesses(job), largest(project, job)
    faults = [Fault(number) for number in sample(those(accesses, "change "), 3)]
    faults += [Fault(size=size * part // 8, fatal=True) for part in sample(range(8), 1)]
    cases = Cases()
    for fault in faults:
        with project.copy(job) as folder:
            killed = project.server.run(folder, job, fault)
            assert killed.status < 0, f"{fault}: {killed}"
            cases.add(f"{fault} {killed.accesses[-1:]}", project.recovers(folder, job))
    cases.check()


@STAGE
def test_killed_under_other_params(projects: dict[str, Project], stage: str) -> None:
    """While it publishes over finished outputs; then the params are put back.

    The interrupted run may leave temporary files, from which it would resume.
    """
    if stage == "download":  # what has been downloaded is the user's, whatever the params
        return
    project = projects[stage]
    job = project.jobs[stage]
    accesses = project.accesses(job, finished=True, other=True)
    last = those(accesses, "change os.rename")[-len(job.outputs) - 1 :]  # the outputs and the manifest
    cases = Cases()
    further = sample(those(accesses, "change "), 1) if MORE > 1 else []
    for number in sorted({last[len(last) // 2], last[-1], *further}):
        with project.copy(job, finished=True) as folder:
            killed = project.server.run(folder, job, Fault(number, other=True))
            assert killed.status < 0, f"{number}: {killed}"
            cases.add(f"{number} {killed.accesses[-1:]}", project.recovers(folder, job, TEMPORARY))
    cases.check()


@STAGE
def test_errors_of_the_disk(projects: dict[str, Project], stage: str) -> None:
    project = projects[stage]
    job = project.jobs[stage]
    accesses = project.accesses(job)
    changes, reads = those(accesses, "change "), those(accesses, "read ")
    faults = [Fault(number, errno=errno.ENOSPC, lasting=True) for number in sample(changes, 1)]
    faults += [Fault(number, errno=errno.EIO) for number in sample(reads, 1)]
    if MORE > 1:
        faults += [Fault(number, errno=errno.EACCES) for number in sample(changes + reads, 1)]
        faults += [Fault(changes[0], errno=errno.EROFS, lasting=True)]
    cases = Cases()
    for fault in faults:
        with project.copy(job) as folder:
            run = project.server.run(folder, job, fault)
            wrong = one_line(run) or project.recovers(folder, job) if run.status else project.difference(folder, job)
            if wrong and run.status == 0:  # it may not be up to date; in a dataset, what is unreadable counts as such
                wrong = project.recovers(folder, job, r"dataset/manifest\.json$" if job.manifest_folder else "")
            cases.add(f"{fault} {accesses[fault.number - 1]}", wrong)
    cases.check()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small file system in memory; None without the right to mount one."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@STAGE
def test_a_full_disk(projects: dict[str, Project], stage: str, disk: Path | None) -> None:
    """A full file system, and files of limited size. The suite takes the latter only where it may not mount one."""
    project = projects[stage]
    job = project.jobs[stage]
    size, cases = largest(project, job), Cases()
    for room in [size * part // 8 for part in sample(range(8), 1)]:
        if disk:
            with project.copy(job, folder=disk / "case") as folder:
                space, ballast = os.statvfs(folder), disk / "ballast"
                ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - room)))
                run = project.server.run(folder, job, tidy=True)
                ballast.unlink()
                cases.add(f"{room} bytes free", one_line(run) or project.recovers(folder, job))
        if MORE > 1 or not disk:
            with project.copy(job) as folder:
                run = project.server.run(folder, job, Fault(size=room))
                cases.add(f"files of {room} bytes", one_line(run) or project.recovers(folder, job))
    cases.check()


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.unlink()  # it may be a link
    path.write_bytes(content)


PLACES = sample((0.0, 0.25, 0.5, 0.75, 1.0), 1)


@STAGE
def test_a_flipped_bit_in_an_input(projects: dict[str, Project], stage: str) -> None:
    """A file is refused. A change in a folder, such as the user's images, may be accepted but not overlooked."""
    project, cases = projects[stage], Cases()
    job = project.jobs[stage]
    for path in sample(list(job.inputs.values()), 4):
        is_file = (project.folder / path).is_file()
        for file, place in product(sample(files_of(project.folder, path), 2), PLACES):
            with project.copy(job, finished=not is_file) as folder:
                flip(folder / file, place)
                run = project.server.run(folder, job)
                if not run.status:
                    wrong = run.out if is_file or "up to date" in run.out else ""
                elif not is_file:  # a wrong list names many files that are missing
                    wrong = "" if run.status == 1 and re.fullmatch(r"(error: .+\n)+", run.error) else run.error
                elif not (wrong := one_line(run, str(file))):
                    wrong = ", ".join(str(output) for output in job.outputs.values() if (folder / output).exists())
                cases.add(f"{file} at {place}", wrong)
    if job.inputs:
        cases.check()


@STAGE
def test_a_flipped_bit_in_an_image_since_it_was_indexed(projects: dict[str, Project], stage: str) -> None:
    project, cases = projects[stage], Cases()
    job, root = project.jobs[stage], Path(project.graph.params.dataset.root)
    kinds = ("JPEGImages", "SegmentationClass", "Saliency")
    for chosen in [(kind,) for kind in kinds] if MORE > 1 else [kinds]:
        with project.copy(job) as folder:
            changed = {str(file) for kind in chosen for file in files_of(folder, root / kind)}
            for file in changed:
                flip(folder / file)
            run = project.server.run(folder, job)
            if not run.status:
                found = {name for name, value in contents(folder).items() if project.files.get(name) != value}
                wrong = ", ".join(sorted(found - changed))
            else:
                lines = run.error.splitlines()
                named = all(line.startswith("error: ") and line[7:].split(": ")[0] in changed for line in lines)
                wrong = "" if run.status == 1 and named else run.error
            cases.add(" + ".join(chosen), wrong if "index" in job.inputs else "")
    cases.check()


@STAGE
def test_a_flipped_bit_in_an_output(projects: dict[str, Project], stage: str) -> None:
    """It is computed again, or left to the stages that read it, which refuse it (see above)."""
    project, cases = projects[stage], Cases()
    job = project.jobs[stage]
    readers = {path for other in project.graph.jobs for path in other.inputs.values()}
    for path in job.outputs.values():
        for file, place in product(sample(files_of(project.folder, path), 2), PLACES):
            with project.copy(job, finished=True) as folder:
                flip(folder / file, place)
                run = project.server.run(folder, job)
                if run.status:
                    wrong = one_line(run, str(file))
                else:
                    wrong = "" if "up to date" in run.out and path in readers else project.difference(folder, job)
                cases.add(f"{file} at {place}", wrong)
    cases.check()


@STAGE
def test_a_flipped_bit_in_a_temporary_file(projects: dict[str, Project], stage: str) -> None:
    """In each file that a run leaves which is killed when all its outputs are ready to be published."""
    project, cases = projects[stage], Cases()
    job = project.jobs[stage]
    renames = those(project.accesses(job), "change os.rename")
    outputs = tuple(f"{path}/" for path in job.outputs.values())  # a dataset is written in its place
    with project.copy(job) as killed:
        project.server.run(killed, job, Fault(renames[-len(job.outputs) - 1 :][0]))
        left = [name for name in contents(killed) if name not in project.files and not name.startswith(outputs)]
        for name, place in product(left, PLACES):
            folder = killed.with_name("flipped")
            shutil.copytree(killed, folder, copy_function=os.link)
            flip(folder / name, place)
            run = project.server.run(folder, job)
            wrong = one_line(run, name) if run.status else project.difference(folder, job)
            if run.status and not wrong:
                for file in (folder / job.folder).glob(".checkpoint*"):  # as the line says
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
                wrong = project.recovers(folder, job)
            cases.add(f"{name} at {place}", wrong)
            shutil.rmtree(folder)
    if left:
        cases.check()
