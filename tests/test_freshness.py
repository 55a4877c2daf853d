"""What an edit of the dataset makes stale and what it leaves alone, by content; unchanged outputs come back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore
from pipeline.training.loop import Loop
from pipeline.workflow.freshness import keep_outputs, stale
from pipeline.workflow.graph import Job
from tests.finished import DATA, IMAGE, LISTS, MAP, MASK, OWN, RESULTS, SALIENCY, repaint
from tests.jobs import graph, outdated, perform, refused
from tests.stopping import copy_without


@pytest.fixture(autouse=True)
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = copy_without(finished, tmp_path)
    monkeypatch.chdir(project)
    return project


def test_all_is_up_to_date() -> None:
    assert outdated() == set()


def swap(path: Path, old: str, new: str) -> None:
    """Replace text by other text of the same size, and put the modification time back."""
    before, text = path.stat(), path.read_text()
    assert len(old) == len(new)
    assert text != text.replace(old, new, 1)
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


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
    assert list(RasterStore(job.outputs["maps"])) == ["img_000", "img_001", "own"]
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
