"""Results and files that are half published, damaged, odd or read-only: stale, ignored or refused in one line."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snakemake.io import is_flagged

from pipeline.config.stage_table import STAGES as STAGE_TABLE
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import partial
from pipeline.workflow.freshness import stale
from pipeline.workflow.snakemake import Plan, _set_times
from pipeline.workflow.stage import Work, execute
from tests.finished import DATA, EXTRA, IMAGE, LISTS, MAP, MASK, OWN, RESULTS, SALIENCY, repaint
from tests.harm import ODD, killed_while_publishing
from tests.jobs import command, graph, outdated, perform, refused
from tests.stopping import copy_without


@pytest.fixture(autouse=True)
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = copy_without(finished, tmp_path)
    monkeypatch.chdir(project)
    return project


def content(path: Path) -> bytes | dict[str, bytes]:
    """The bytes of a file, or of each file of a folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("label", ["classifier base", "report", "index"])
def test_killed_between_the_renames_of_another_run_nothing_counts_as_this_runs(label: str) -> None:
    """With other params, at each rename; then the params are put back."""
    overrides = {"seed": 9, "gallery": 1, "saliency": {"kind": "fine_grained", "path": None}}
    job, other = (next(job for job in g.jobs if job.label == label) for g in (graph(), graph(**overrides)))
    before = {path: content(path) for path in job.outputs.values()}
    assert other.params != job.params

    def write(work: Work) -> None:
        for name, path in work.outputs.items():
            if job.outputs[name].is_dir():
                path.mkdir()
                path /= "page.txt"
            path.write_text("of the other run")

    for published in range(len(job.outputs) + 1):
        with killed_while_publishing(published):
            execute(other, write, Runtime(), force=True)
        assert label in outdated()
        perform(job)
        assert {path: content(path) for path in job.outputs.values()} == before
        assert label not in outdated()


def test_outputs_without_a_manifest_are_not_read() -> None:
    for reader, written in (("localization", "classifiers/base/model.pt"), ("ground_truth", "index/masks.json")):
        path = RESULTS / written
        manifest.remove(path.parent)
        (line,) = refused(graph().find(reader, "cam" if reader == "localization" else ""))
        assert line == f"{path}: has no manifest, since its stage was interrupted; run its stage again"


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "deleted", "another's"])
@pytest.mark.parametrize("output", ["report", "table", "metrics"])
def test_a_damaged_report_is_stale(output: str, damage: str) -> None:
    job = graph().find("report")
    path = job.outputs[output]
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"a flipped bit": flipped, "cut": content[:-1], "another's": b"{}"}[damage])
    assert outdated() == {"report"}
    perform(job)
    assert path.read_bytes() == content
    assert outdated() == set()


def test_every_output_is_either_verified_by_a_reader_or_compared() -> None:
    jobs = graph().jobs
    read = {path for job in jobs for path in job.inputs.values()}
    for job in jobs:
        assert set(job.outputs.values()) - read == set(job.leaves)
    assert {job.stage for job in jobs if job.leaves} == {"index", "ground_truth", "prediction", "report"}


ABSENT = object()


@pytest.mark.parametrize("value", [ABSENT, None, 5, "text", [], ["a"], {}, {"index": {}}, {"model.pt": None}])
@pytest.mark.parametrize("key", manifest.FIELDS)
def test_a_manifest_without_keys_or_with_others_types_is_stale(key: str, value: Any) -> None:
    file = RESULTS / "classifiers/base" / manifest.NAME
    record = json.loads(file.read_text())
    del record[key]
    if value is not ABSENT:
        record[key] = value
    file.write_text(json.dumps(record))
    assert "classifier base" in outdated()
    if key == "outputs":
        assert len(refused(graph().find("localization", "cam"))) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b'{"a": ' * 100_000, b"{}", b"\0" * 100]
)
def test_a_damaged_manifest_is_stale(content: bytes) -> None:
    for job in graph().jobs:
        (job.folder / manifest.NAME).write_bytes(content)
    assert outdated() == {job.label for job in graph().jobs}


PLACED: dict[str, Callable[[Path], Any]] = {**ODD, "a folder": Path.mkdir}
FOLDERS = [DATA, DATA / "JPEGImages", DATA / "SegmentationClass", LISTS, SALIENCY, EXTRA]


@pytest.mark.parametrize("kind", PLACED)
def test_what_is_not_listed_is_ignored_whatever_it_is(kind: str) -> None:
    """It makes the index stale at most, and the next index equals the last."""
    before = (RESULTS / "index/index.json").read_bytes()
    for folder in FOLDERS:
        for name in ("odd.jpg", "odd.png", "odd") if folder != EXTRA else ("odd.jpg",):
            if folder != EXTRA or kind not in ("a folder", "a link to the folder above"):  # these are class folders
                PLACED[kind](folder / name)
        if folder != EXTRA:
            Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.jpg")).touch()
    assert not graph().missing()
    stale(graph())
    perform(graph().find("index"))
    assert (RESULTS / "index/index.json").read_bytes() == before
    assert outdated() == set()


REPLACED = [IMAGE, MASK, MAP, OWN, LISTS / "train.txt", DATA / "tags.json", DATA / "classes.txt", DATA / "JPEGImages"]


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("path", REPLACED, ids=str)
def test_what_is_listed_is_refused_in_a_line(path: Path, kind: str) -> None:
    if path.is_dir():
        path.rename("old")
    else:
        path.unlink()
    PLACED[kind](path)
    is_folder = kind in ("a folder", "a link to the folder above")
    if path.name == "JPEGImages" and kind == "a link to the folder above":
        with pytest.raises(PipelineError, match=r"dataset\.images: JPEGImages contains the working folder"):
            graph()
        return
    assert "index" in outdated()
    if path == MASK and is_folder:  # folders may have any name, and a training image needs no mask
        perform(graph().find("index"))
        return
    lines = refused(graph().find("index"), force=False)
    named = [line for line in lines if line.startswith(str(path.with_suffix("")))]
    if path == OWN and is_folder:
        named = [line for line in lines if line.startswith(f"{EXTRA}: no class folder")]
    assert named or path.name == "JPEGImages", lines
    assert len(lines) == 1 or path.suffix in ("", ".txt", ".json"), lines


def test_extra_images_need_printable_names() -> None:
    """They are ids: all of them count as listed."""
    Path(os.fsdecode(os.fsencode(EXTRA / "cat") + b"/\xff.jpg")).write_bytes(OWN.read_bytes())
    shutil.copy(MAP, os.fsdecode(os.fsencode(SALIENCY) + b"/\xff.png"))
    shutil.copy(OWN, EXTRA / "cat/line\nbreak.jpg")
    lines = refused(graph().find("index"), force=False)
    assert [line for line in lines if line.endswith("its name is not printable UTF-8 text; rename it")] == [
        "'more/cat/line\\nbreak.jpg': its name is not printable UTF-8 text; rename it",
        "'more/cat/\\udcff.jpg': its name is not printable UTF-8 text; rename it",
    ]


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a link to itself", "a folder"])
def test_odd_weights_are_refused_in_a_line(kind: str) -> None:
    PLACED[kind](Path("weights.pth"))
    backbone = {"name": "small", "weights": "weights.pth"}
    changed = graph(classifiers={"base": {"backbone": backbone}})
    assert "classifier base" in {job.label for job in stale(changed)}
    (line,) = refused(changed.find("classifier", "base"))
    assert line.startswith("weights.pth: ")


STAGES = [("index",), ("saliency",), ("classifier", "base"), ("report",)]


def protect(folder: Path, writable: bool = False) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200 if writable else path.stat().st_mode & ~0o222)


def test_results_that_are_read_only_are_used() -> None:
    protect(Path("results"))
    try:
        for name in STAGES:
            done = command("-m", f"stages.{name[0]}", *name[1:])
            assert (done.returncode, done.stdout, done.stderr) == (0, f"{' '.join(name)}: up to date\n", "")
        store = str(RESULTS / "saliency/maps.h5")
        done = command("-m", "wsss", "export", store, "--out", "exported", "--formats", "probabilities")
        assert done.returncode == 0, done.stderr
        assert len(list(Path("exported/probabilities").iterdir())) == 5
        done = command("-m", "stages.classifier", "base", "--set", '{"seed": 9}')
        file = RESULTS / "classifiers/base/.lock-classifier"
        text = "cannot be written to (Permission denied), and classifier base is not up to date"
        assert done.stderr == f"error: {file}: {text}; make the folder writable, or set another experiment\n"
        assert done.returncode == 1
    finally:
        protect(Path("results"), writable=True)


def test_snakemake_ignores_times_that_it_cannot_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout gives outputs any time. On read-only results, inputs of up-to-date jobs are declared ``ancient``."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    index, maps = (graph().find(stage) for stage in ("index", "saliency"))
    os.utime(index.outputs["index"], (1, 1))
    repaint(MAP)
    perform(index)
    os.utime(index.outputs["index"], (1, 1))
    monkeypatch.setattr(os, "utime", refuse)
    whole = graph()
    unset = _set_times(whole, stale(whole))
    assert "index" in unset
    assert "saliency" not in unset  # it is stale
    for job in (index, maps):
        paths = Plan(graph(), [], unset=unset).inputs(STAGE_TABLE[job.stage])({})
        assert all(is_flagged(path, "ancient") == (job is index) for path in paths)


def test_a_folder_that_may_not_be_read_is_a_line(project: Path) -> None:
    """At planning, and by hand."""
    plan = "from pipeline.workflow.graph import *; from pipeline.workflow.freshness import stale; "
    plan += "from pipeline.workflow.settings import load; "
    plan += "g = Graph(load([Path('params.yaml')])); print(len(stale(g)), *g.missing())"
    for folder, missing in ((DATA / "JPEGImages", ""), (DATA, ""), (SALIENCY, "")):
        folder.chmod(0)
        try:
            done = command("-c", plan)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"{len(graph().jobs)}\n", missing
            done = command("-m", "stages.index")
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert all(line.startswith(f"error: {folder}") for line in done.stderr.splitlines()), done.stderr
        finally:
            folder.chmod(0o755)
    (DATA / "private").mkdir(mode=0)
    (SALIENCY / "private").mkdir(mode=0)
    done = command("-m", "stages.index")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_partial_output_is_left() -> None:
    assert not [path for job in graph().jobs for path in job.outputs.values() if partial(path).exists()]
