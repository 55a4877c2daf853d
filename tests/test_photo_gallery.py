"""The gallery of the user's own photos: what it shows, in which order, and the pictures beside the page."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from pipeline.config import params as parameters
from pipeline.data import voc
from pipeline.data.index import write
from pipeline.errors import PipelineError
from pipeline.report import photos
from pipeline.runtime import Runtime
from pipeline.stores import files, manifest
from pipeline.stores.hashes import fingerprint
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.graph import Graph, Job
from pipeline.workflow.stage import Work
from stages import report
from tests import drawn

OWN = copy.deepcopy(drawn.RAW)
del OWN["dataset"]["demo"]
PAGE, PICTURES = Path("results/drawn/report.html"), Path("results/drawn/report_files")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data() -> dict[str, Any]:
    """What the page's script reads."""
    text = re.search(r'<script type="application/json" id="photo-data">(.*?)</script>', PAGE.read_text(), re.DOTALL)
    assert text
    content: dict[str, Any] = json.loads(text[1])
    return content


def again(job: Job, outputs: dict[str, Path] | None = None) -> None:
    report.main(Work(job, job.inputs, outputs or job.outputs, Runtime(), "key", Path("checkpoint")))


def rewrite(path: Path, kind: str, change: Any) -> None:
    """Write the store anew, with each raster as ``change`` of its image's id and raster; None leaves it out."""
    store = RasterStore(path)
    rasters = {name: change(name, store.get(name)) for name in store}
    path.unlink()
    with RasterWriter(path, kind) as writer:
        for name, raster in rasters.items():
            if raster is not None:
                writer.append(name, raster)


def headings() -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", PAGE.read_text())


def test_a_report_on_own_photos_begins_with_all_of_them() -> None:
    graph = drawn.experiment(OWN)
    assert headings()[0] == "Photos"
    assert "Published" not in PAGE.read_text()
    shown = data()
    assert shown["id"] == [f"i{number:03d}" for number in (*range(8, 13), *range(8))]
    assert shown["label"] == shown["train"] == [0] * 5 + [1] * 8
    assert [value is None for value in shown["uncertainty"]] == [False] * 5 + [True] * 8
    assert shown["uncertainty"][:5] == [round(1000 * 8 * number / 255, 1) for number in range(8, 13)]
    for n, name in enumerate(shown["id"]):
        photo, _, tags = drawn.draw(int(name[1:]))
        assert shown["tags"][n] == tags
        assert (shown["width"][n], shown["height"][n]) == (drawn.SIDE, drawn.SIDE)
        for folder in ("photos", "thumbs"):
            picture = cv2.imread(str(PICTURES / f"{folder}/{shown['photo'][n]}.jpg"))
            assert picture is not None
            assert np.abs(cv2.blur(picture, (9, 9)).astype(int) - cv2.blur(photo, (9, 9))).mean() < 3
        picture = cv2.imread(str(PICTURES / f"masks/{shown['mask'][n]}.png"), cv2.IMREAD_UNCHANGED)
        kind = "predictions" if n < 5 else "pseudo_labels"
        labels = RasterStore(Path(f"results/drawn/{kind}/oaa_plus/labels.h5")).get(name)
        assert picture is not None
        assert np.array_equal(picture, photos.draw_mask(labels))
        assert shown["shares"][n] == [
            [k, round(1000 * float((labels == k).mean()), 1)] for k in (1, 2, 3) if (labels == k).any()
        ]
        assert (shown["doubt"][n] is None) == (n >= 5)
        assert n >= 5 or (PICTURES / f"doubt/{shown['doubt'][n]}.png").exists()
    assert len([*PICTURES.rglob("*.jpg"), *PICTURES.rglob("*.png")]) == 13 * 3 + 5
    assert graph.find("report").outputs["pictures"] == PICTURES


def test_a_mask_is_drawn_in_the_colours_of_its_classes_on_a_transparent_background() -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[10:20, 10:20], labels[10:20, 20:30], labels[30:40, 40:60] = 1, 2, 255
    picture = photos.draw_mask(labels)
    assert picture[5, 5].tolist() == [0, 0, 0, 0]
    assert picture[15, 15].tolist() == [0, 0, 128, photos.FILL]  # BGR and opacity
    assert picture[15, 25].tolist() == [0, 128, 0, photos.FILL]
    assert picture[9, 15].tolist() == picture[15, 30].tolist() == [255] * 4
    assert picture[35, 50].tolist() == [192, 224, 224, photos.FILL // 2]


def test_large_photos_are_reduced() -> None:
    labels = np.zeros((3000, 2000), np.uint8)
    labels[:1500] = 7
    picture = photos.draw_mask(labels)
    assert picture.shape == (1024, 683, 4)
    assert (picture[:509, :, :3] == photos.PALETTE[7][::-1]).all()


def test_contradictions_of_masks_and_tags() -> None:
    graph = drawn.experiment(OWN)
    _, _, tags = drawn.draw(8)
    other = min({1, 2, 3} - set(tags))
    pixels = drawn.SIDE**2

    def change(name: str, raster: Any) -> Any:
        raster = np.zeros_like(raster)
        if name == "i008":  # another class on a little more than 1 %
            raster.flat[: round(0.011 * pixels)] = other
        if name == "i009":  # on a little less
            raster.flat[: round(0.008 * pixels)] = other
        return raster

    job = graph.find("report")
    rewrite(job.inputs["predictions/oaa_plus"], "labels", change)
    again(job)
    shown = data()
    assert shown["missing"][0] == tags
    assert shown["untagged"][:2] == [[other], []]
    assert shown["missing"][2] == shown["tags"][2]
    assert re.search(r"the doubtful ones first\. (\d+) masks contradict", PAGE.read_text())


def test_unknown_tags_contradict_nothing() -> None:
    graph = drawn.experiment(OWN)
    path = graph.find("index").outputs["index"]
    index = json.loads(path.read_text())
    for name in ("i008", "i000"):
        index["images"][name]["tags"] = []
    write(path, index)
    again(graph.find("report"))
    columns = zip(*(data()[key] for key in ("tags", "untagged", "shares")), strict=True)
    shown = dict(zip(data()["id"], columns, strict=True))
    tags, untagged, shares = shown["i008"]  # an evaluation image
    assert (tags, untagged) == (None, [])
    assert shares
    assert shown["i000"][0] == []  # a training image without a class
    assert shown["i000"][1] == [k for k, share in shown["i000"][2] if share >= 10]


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_one_split_only(split: str) -> None:
    graph = drawn.experiment(OWN)
    job = graph.find("report")
    empty = "predictions/oaa_plus" if split == "train" else "pseudo_labels/oaa_plus"
    rewrite(job.inputs[empty], "labels", lambda name, raster: None)
    again(job)
    assert set(data()["train"]) == {int(split == "train")}
    assert headings()[0] == "Photos"


def test_predictions_of_training_photos_replace_pseudo_labels() -> None:
    graph = drawn.experiment(OWN)
    job = graph.find("report")
    labels, doubt = (job.inputs[name] for name in ("predictions/oaa_plus", "doubt of predictions/oaa_plus"))
    for path, kind, shape in ((labels, "labels", (drawn.SIDE, drawn.SIDE)), (doubt, "doubt", (6, 6))):
        path.unlink()
        with RasterWriter(path, kind) as writer:
            for number in range(13):
                writer.append(f"i{number:03d}", np.ones(shape, np.uint8))
    again(job)
    shown = data()
    assert sorted(shown["id"]) == [f"i{number:03d}" for number in range(13)]
    assert not any(shown["label"])
    assert sum(shown["train"]) == 8
    assert None not in shown["uncertainty"]
    assert "pseudo labels that it learned from" not in PAGE.read_text()


def test_no_photo_has_a_mask() -> None:
    graph = drawn.experiment(OWN)
    job = graph.find("report")
    for name in ("predictions/oaa_plus", "pseudo_labels/oaa_plus"):
        rewrite(job.inputs[name], "labels", lambda name, raster: None)
    again(job)
    assert headings()[0] == "Methods"
    assert "<script" not in PAGE.read_text()


def published(job: Job) -> None:
    """Run the report and publish its outputs with a manifest, as the stage's frame does."""
    outputs = {name: files.partial(path) for name, path in job.outputs.items()}
    again(job, outputs)
    hashes = {job.key(path): fingerprint(outputs[name]) for name, path in job.outputs.items()}
    for name, path in job.outputs.items():
        files.publish(path, outputs[name])
    manifest.write(job.folder, stage="report", code="", params={}, inputs={}, outputs=hashes)


def inodes() -> dict[str, int]:
    return {str(path.relative_to(PICTURES)): os.stat(path).st_ino for path in PICTURES.rglob("*.*")}


def test_a_second_report_draws_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = drawn.experiment(OWN).find("report")
    published(job)
    before, html = inodes(), PAGE.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(photos.Pictures, "_write", lambda *_: pytest.fail("nothing has changed"))
        manifest.remove(job.folder)  # as Snakemake does
        published(job)
    assert {**inodes(), photos.HASHES: 0} == {**before, photos.HASHES: 0}
    assert PAGE.read_bytes() == html
    new = np.full((drawn.SIDE, drawn.SIDE), 2, np.uint8)
    rewrite(job.inputs["predictions/oaa_plus"], "labels", lambda name, raster: new if name == "i008" else raster)
    published(job)
    after = inodes()
    (gone,), (come,) = before.keys() - after.keys(), after.keys() - before.keys()
    assert gone.startswith("masks/")
    assert come.startswith("masks/")
    assert all(after[name] == before[name] for name in (after.keys() & before.keys()) - {photos.HASHES})


@pytest.mark.parametrize("harm", ["flip", "remove", "hashes"])
def test_damaged_pictures_are_drawn_again(harm: str) -> None:
    job = drawn.experiment(OWN).find("report")
    published(job)
    content = {path: path.read_bytes() for path in PICTURES.rglob("*.*")}
    victim = next(iter(PICTURES.rglob("masks/*.png")))
    if harm == "flip":
        victim.write_bytes(victim.read_bytes()[:-9] + b"123456789")
    elif harm == "hashes":
        (PICTURES / photos.HASHES).write_text("[")
    else:
        victim.unlink()
    published(job)
    assert {path: path.read_bytes() for path in PICTURES.rglob("*.*")} == content


def test_a_file_system_without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    job = drawn.experiment(OWN).find("report")
    published(job)
    content = {path: path.read_bytes() for path in PICTURES.rglob("*.*")}
    monkeypatch.setattr(os, "link", refused)
    published(job)
    assert {path: path.read_bytes() for path in PICTURES.rglob("*.*")} == content


def test_equal_photos_share_a_picture() -> None:
    graph = drawn.experiment(OWN)
    job = graph.find("report")
    same = Path("data/drawn/JPEGImages/i009.png")
    same.write_bytes(Path("data/drawn/JPEGImages/i008.png").read_bytes())
    again(job)
    assert data()["photo"][0] == data()["photo"][1]


def test_a_photo_that_has_gone_is_one_line() -> None:
    graph = drawn.experiment(OWN)
    Path("data/drawn/JPEGImages/i009.png").write_text("text")
    with pytest.raises(PipelineError, match=r"i009\.png: .*run the index stage again"):
        again(graph.find("report"))


def test_snakemake_does_not_delete_the_pictures_before_it_runs_the_report() -> None:
    job = Graph(parameters.validate(OWN)).find("report")
    assert PICTURES in job.outputs.values()
    assert PICTURES not in job.files
    assert PICTURES in job.leaves  # planning notices a picture that is lost


def test_reports_on_generated_data_have_no_gallery_and_no_published_figures() -> None:
    graph = drawn.experiment(drawn.RAW)
    assert "pictures" not in graph.find("report").outputs
    assert "Photos" not in headings()
    assert "Published figures on PASCAL VOC 2012" not in headings()


def as_voc(graph: Graph, name: str) -> None:
    """Give the dataset VOC's classes, and its images ids like ``name`` with a number."""
    path = graph.find("index").outputs["index"]
    index = json.loads(path.read_text())
    new = {old: name.format(int(old[1:])) for old in index["images"]}
    index["classes"] = list(voc.CLASSES)
    index["images"] = {new[old]: entry for old, entry in index["images"].items()}
    index["splits"] = {split: [new[old] for old in ids] for split, ids in index["splits"].items()}
    write(path, index)
    for store in {path for path in graph.find("report").inputs.values() if path.suffix == ".h5"}:
        with h5py.File(store, "a") as file:
            ids = [new.get(old.decode(), old.decode()).encode() for old in file["image_ids"][:]]
            del file["image_ids"]
            file["image_ids"] = np.array(ids, bytes)


@pytest.mark.parametrize(("name", "is_voc"), [("2007_{:06d}", True), ("2013_{:06d}", False), ("IMG_{:06d}", False)])
def test_published_figures_are_shown_for_voc_only(name: str, is_voc: bool) -> None:
    graph = drawn.experiment(OWN, masks=False)
    as_voc(graph, name)
    again(graph.find("report"))
    assert ("Published figures on PASCAL VOC 2012" in headings()) is is_voc
    assert headings().index("Photos") == (len(headings()) - 1 if is_voc else 0)
