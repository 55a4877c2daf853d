"""What is up to date and what is stale: by content, whatever was killed, edited, deleted or damaged."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from snakemake.io import is_flagged

from pipeline.config.stage_table import STAGES as STAGE_TABLE
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import partial, sha256
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Loop
from pipeline.workflow.freshness import keep_outputs, stale
from pipeline.workflow.graph import Job
from pipeline.workflow.snakemake import Plan, _set_times
from pipeline.workflow.stage import Work, execute
from tests.harm import ODD, killed_while_publishing
from tests.jobs import command, graph, outdated, perform, refused
from tests.project import link_code, run_stages
from tests.voc_tree import make_tree, minimal_params, write_mask

DATA, SALIENCY, EXTRA = Path("data"), Path("maps"), Path("more")
RESULTS = Path("results/test")
LISTS = DATA / "ImageSets/Segmentation"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all results. Its saliency maps and its extra images lie outside of the dataset's folder."""
    folder = tmp_path_factory.mktemp("freshness") / "finished"
    folder.mkdir()
    link_code(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        dataset = make_tree(DATA)
        (DATA / "Saliency").rename(SALIENCY)
        (EXTRA / "cat").mkdir(parents=True)
        shutil.copy(DATA / "JPEGImages/img_000.jpg", EXTRA / "cat/own.jpg")
        shutil.copy(SALIENCY / "img_000.png", SALIENCY / "own.png")
        params = minimal_params(dataset, SALIENCY)
        params["dataset"]["extra"] = str(EXTRA)
        params["pseudo_labels"]["cam"]["rule"] = {"oaa": {"crf": {"iterations": 1}}}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        run_stages(["params.yaml"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_all_is_up_to_date() -> None:
    assert outdated() == set()


def swap(path: Path, old: str, new: str) -> None:
    """Replace text by other text of the same size, and put the modification time back."""
    before, text = path.stat(), path.read_text()
    assert len(old) == len(new)
    assert text != text.replace(old, new, 1)
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def repaint(path: Path) -> None:
    """Replace a picture by a valid one of the same size."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    if path.parent.name == "SegmentationClass":
        write_mask(path, np.zeros(picture.shape[:2]))
    else:
        cv2.imwrite(str(path), picture[::-1] if path.suffix == ".jpg" else np.zeros_like(picture))


IMAGE, MASK = DATA / "JPEGImages/img_001.jpg", DATA / "SegmentationClass/img_001.png"
MAP, OWN = SALIENCY / "img_001.png", EXTRA / "cat/own.jpg"
EDITS: dict[str, Callable[[], Any]] = {
    "a tag": lambda: swap(DATA / "tags.json", "1", "2"),
    "an id in the training list": lambda: swap(LISTS / "train.txt", "img_001", "img_009"),
    "the order of the evaluation list": lambda: (LISTS / "val.txt").write_text("img_005\nimg_004\n"),
    "a class": lambda: swap(DATA / "classes.txt", "cat", "cow"),
    "an image": lambda: repaint(IMAGE),
    "a mask": lambda: repaint(MASK),
    "a saliency map elsewhere": lambda: repaint(MAP),
    "an extra image elsewhere": lambda: repaint(OWN),
    "a deleted image": IMAGE.unlink,
    "a deleted mask": MASK.unlink,
    "a deleted saliency map": MAP.unlink,
    "a deleted extra image": OWN.unlink,
    "a deleted list": (LISTS / "train.txt").unlink,
    "a deleted folder of maps": lambda: shutil.rmtree(SALIENCY),
    "a cut image": lambda: IMAGE.write_bytes(IMAGE.read_bytes()[:-9]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_of_the_dataset_makes_the_index_and_its_readers_stale(edit: str) -> None:
    EDITS[edit]()
    assert outdated() == {job.label for job in graph().jobs}


@pytest.mark.parametrize(
    "edit", ["a tag", "a mask", "a saliency map elsewhere", "a deleted mask", "an extra image elsewhere"]
)
def test_running_the_index_again_settles_it(edit: str) -> None:
    EDITS[edit]()
    perform(graph().find("index"))
    assert "index" not in outdated()


TRAINED = {"saliency", "classifier base", "localization cam", "pseudo_labels cam", "segmentation cam", "features base"}


def add_image(split: str) -> None:
    """Another image, with its mask, saliency map and tags, at the end of a list."""
    for path in (IMAGE, MASK, MAP):
        new = path.with_name(f"new{path.suffix}")
        shutil.copy(path, new)
        repaint(new)
    tags = json.loads((DATA / "tags.json").read_text())
    (DATA / "tags.json").write_text(json.dumps(tags | {"new": [1]}))
    with (LISTS / f"{split}.txt").open("a") as file:
        file.write("new\n")


def settled() -> set[str]:
    """What is stale once the index and the ground truth, which are quick, have been brought up to date."""
    for name in ("index", "ground_truth"):
        perform(graph().find(name))
    return outdated()


def test_another_evaluation_image_retrains_nothing() -> None:
    add_image("val")
    stale_now = settled()
    assert stale_now >= {"prediction cam", "report"}
    assert not stale_now & TRAINED
    assert "new" in (RESULTS / "index/index.json").read_text()


def test_another_training_image_retrains_all() -> None:
    add_image("train")
    assert settled() >= TRAINED


def without_masks() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["dataset"]["masks"] = None
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_an_evaluation_image_without_a_mask_and_no_more_masks_retrain_nothing() -> None:
    add_image("val")
    (DATA / "SegmentationClass/new.png").unlink()
    without_masks()
    assert not settled() & TRAINED


EVALUATED = ("classifiers/base", "localizations/cam", "pseudo_labels/cam", "predictions/cam")


@pytest.mark.parametrize("edit", [without_masks, EDITS["a mask"], EDITS["a deleted mask"]])
def test_other_masks_affect_only_what_reads_masks(edit: Callable[[], Any]) -> None:
    edit()
    assert settled() == {"report", *(f"evaluation {reference}" for reference in EVALUATED)}


def test_an_unlisted_image_runs_at_most_the_index_again() -> None:
    shutil.copy(IMAGE, IMAGE.with_name("unlisted.jpg"))
    perform(graph().find("index"))
    assert outdated() == set()


def delete_as_snakemake(job: Job) -> None:
    for path in job.files:
        path.unlink(missing_ok=True)


def test_snakemake_deletes_outputs_but_what_is_unchanged_comes_back() -> None:
    add_image("val")
    plan = stale(graph())
    labels = [job.label for job in plan]
    before = {path: path.read_bytes() for job in plan for path in job.files}
    keep_outputs(plan)
    epochs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", lambda self: epochs.append(self))
        for job in plan:
            delete_as_snakemake(job)
            perform(job)
    assert "classifier base" in labels
    assert not epochs
    assert outdated() == set()
    trained = [job for job in plan if job.label in TRAINED]
    assert all(path.read_bytes() == before[path] for job in trained for path in job.files)
    assert not list(RESULTS.rglob(".*.kept"))


def test_what_is_unchanged_comes_back_after_a_run_that_failed() -> None:
    """The index finds a fault in the first run. Its params differ in the second."""
    add_image("val")
    (DATA / "SegmentationClass/new.png").unlink()
    keep_outputs(stale(graph()))
    delete_as_snakemake(graph().find("index"))
    assert refused(graph().find("index")) == (
        f"{DATA}/SegmentationClass/new.png: missing, but it is an evaluation image; add it or unlist it",
    )
    without_masks()
    plan = stale(graph())
    keep_outputs(plan)
    before = {path: path.stat().st_ino for job in plan if job.label in TRAINED for path in job.files}
    for job in plan:
        delete_as_snakemake(job)
        perform(job)
    assert {path: path.stat().st_ino for path in before} == before
    assert outdated() == set()


def test_outputs_come_back_after_a_run_that_was_killed_before_their_stage() -> None:
    job = graph().find("classifier", "base")
    before = job.outputs["model"].stat().st_ino
    keep_outputs([job])
    delete_as_snakemake(job)
    keep_outputs([job])  # the next run
    perform(job)
    assert job.outputs["model"].stat().st_ino == before
    assert outdated() == set()


def test_kept_outputs_of_other_inputs_are_replaced() -> None:
    job = graph().find("localization", "cam")
    keep_outputs([job])
    assert len(list(job.folder.glob(".*.kept"))) == len(job.files)
    (LISTS / "train.txt").write_text("img_000\nimg_001\n")
    perform(graph().find("index"))
    delete_as_snakemake(job)
    perform(job)
    assert RasterStore(job.outputs["maps"]).ids == ["img_000", "img_001", "own"]
    assert not list(job.folder.glob(".*.kept"))


def test_a_training_on_masks_depends_on_those_of_training_images_only() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["segmentations"]["upper"] = {**params["segmentations"]["cam"], "labels": "ground_truth"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    perform(graph().find("segmentation", "upper"))
    for split, stale_too in (("val", False), ("train", True)):
        mask = DATA / "SegmentationClass" / ("img_005.png" if split == "val" else "img_001.png")
        repaint(mask)
        assert ("segmentation upper" in settled()) is stale_too


def test_files_that_the_index_does_not_read_do_not_count() -> None:
    (DATA / "README").write_text("notes")
    (DATA / "JPEGImages/.hidden.jpg").write_text("not an image")
    assert outdated() == set()


READERS = {
    "classifier base",
    "localization cam",
    "pseudo_labels cam",
    "segmentation cam",
    "features base",
    "prediction cam",
    "report",
}


def test_what_a_stage_reads_is_compared_with_the_index() -> None:
    """Every stage that reads images refuses a valid image of the same size in another's place."""
    files = [Path("data/JPEGImages") / f"{name}.jpg" for name in ("img_000", "img_001", "img_004", "img_005")]
    indexed = {str(file): sha256(file) for file in files}
    for file in files:
        repaint(file)
    by_label = {job.label: job for job in graph().jobs}
    for label in sorted(READERS):
        (line, *more) = refused(by_label[label])
        file = line.partition(": ")[0]
        text = f"sha256 is {sha256(Path(file))}, the index says {indexed[file]}; run the index stage again"
        assert line == f"{file}: changed since it was indexed: {text}"
        assert not more
    for label in by_label.keys() - READERS - {"index"}:
        perform(by_label[label], force=True)


@pytest.mark.parametrize(("path", "label"), [(MASK, "ground_truth"), (MAP, "saliency")])
def test_masks_and_maps_are_compared_with_the_index(path: Path, label: str) -> None:
    repaint(path)
    (line,) = refused(graph().find(label))
    assert line.startswith(f"{path}: changed since it was indexed: sha256 is ")
    assert line.endswith("run the index stage again")


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
