"""The profiles on real images, scaled down: every stage of them runs, at the images' own size, on a plain CPU."""

import json
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.voc import CLASSES
from pipeline.stores.raster import RasterStore
from tests.project import ROOT, copy, run_stages

pytestmark = pytest.mark.slow
SHARED = ROOT.parent / "shared"
FULL_SIZE = SHARED / "data" / "voc12_fullsize_48"
MINI = SHARED / "data" / "voc12_mini"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_fp16.pth"
LITE2 = SHARED / "weights" / "tf_efficientnet_lite2_fp16.pth"


def real_tree(root: Path, train: int, evaluation: int) -> None:
    """Some of the 48 native-size images in VOC's own layout: XML annotations, SBD's mask folder, the papers' lists."""
    tags = json.loads((MINI / "tags.json").read_text())
    names = sorted(path.stem for path in (FULL_SIZE / "JPEGImages").iterdir())[: train + evaluation]
    for folder in ("JPEGImages", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in names:
        shutil.copy(FULL_SIZE / "JPEGImages" / f"{name}.jpg", root / "JPEGImages")
        shutil.copy(FULL_SIZE / "SegmentationClass" / f"{name}.png", root / "SegmentationClassAug")
        objects = "".join(f"<object><name>{CLASSES[tag - 1]}</name></object>" for tag in tags[name])
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text("\n".join(names[:train]))
    (lists / "val.txt").write_text("\n".join(names[train:]))


def metrics(project: Path, experiment: str) -> dict[str, dict[str, float]]:
    return json.loads((project / "results" / experiment / "metrics.json").read_text())


@pytest.mark.skipif(not FULL_SIZE.is_dir() or not MINI.is_dir(), reason="needs ../shared/data/voc12_fullsize_48")
def test_voc2012_runs_whole_at_native_image_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = copy(tmp_path / "project", git=False)
    real_tree(project / "data" / "voc2012_small", train=5, evaluation=1)
    files = ["params.yaml", "profiles/voc2012.yaml", "profiles/voc2012_small.yaml"]
    monkeypatch.chdir(project)
    run_stages(files)
    rows = metrics(project, "voc2012_small")
    wanted = yaml.safe_load((project / "profiles" / "voc2012.yaml").read_text())["rows"]
    assert set(rows) == set(wanted)
    assert all(math.isfinite(row["miou"]) for row in rows.values())
    for name in ("oaa_plus", "drs_refined", "amr_as_run", "edam_saliency", "agen_two_step"):
        labels = RasterStore(project / f"results/voc2012_small/pseudo_labels/{name}/labels.h5")
        assert all(max(labels.get(image).shape) == 500 for image in labels), name
        assert all(set(np.unique(labels.get(image))) <= {*range(21), 255} for image in labels), name
    mixed = RasterStore(project / "results/voc2012_small/mixtures/mixed_20/labels.h5")
    masks = RasterStore(project / "results/voc2012_small/ground_truth/labels.h5")
    assert sum(np.array_equal(mixed.get(name), masks.get(name)) for name in mixed) == 1  # 20 % of 5


@pytest.mark.skipif(not FULL_SIZE.is_dir() or not MINI.is_dir(), reason="needs ../shared/data/voc12_fullsize_48")
def test_a_table_runs_on_voc2012(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = copy(tmp_path / "project", git=False)
    real_tree(project / "data" / "voc2012_small", train=3, evaluation=1)
    monkeypatch.chdir(project)
    files = ["params.yaml", "profiles/voc2012.yaml", "profiles/voc2012_small.yaml", "profiles/tables/oaa_13.yaml"]
    run_stages(files, until="table oaa_13")
    recall = table(project, "voc2012_small", "oaa_13")
    assert recall.keys() == {"cam", "oaa", "oaa_drop"}
    assert all(0 <= figures["recall"] <= 100 for figures in recall.values())


def table(project: Path, experiment: str, name: str) -> dict[str, dict[str, float]]:
    """The figures of a table of seed 1, by row and column."""
    record = json.loads((project / "results" / experiment / "tables" / name / "table.json").read_text())
    figures: dict[str, dict[str, float]] = record["figures"]["1"]
    return figures


needs_mini = pytest.mark.skipif(
    not MINI.is_dir() or not WEIGHTS.is_file() or not LITE2.is_file() or find_spec("timm") is None,
    reason="needs ../shared/data/voc12_mini, its weights and timm",
)


def mini(project: Path, train: int, evaluation: int, rows: list[str]) -> list[str]:
    """profiles/voc12_mini.yaml with fewer images of half the size and one epoch: the params files, in order."""
    data = project / "data" / "mini"
    (data / "lists").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass", "Saliency", "tags.json"):
        (data / name).symlink_to(MINI / name)
    for name, images in (("train", train), ("val", evaluation)):
        listed = (MINI / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        (data / "lists" / f"{name}.txt").write_text("\n".join(listed[:images]))
    backbone, lite2 = ({"weights": os.path.relpath(file, project)} for file in (WEIGHTS, LITE2))
    learn = {"backbone": backbone, "augmentation": {"length": [161, 161]}, "training": {"epochs": 1}}
    agen = {
        "network": {"agen": {"delay": 0}},
        "backbones": {"classification": backbone, "segmentation": backbone},
        **{key: learn[key] for key in ("augmentation", "training")},
    }
    small = {
        "experiment": "mini",
        "rows": rows,
        "method": rows[0],
        "dataset": {"root": "data/mini", "train": "lists/train.txt", "evaluation": "lists/val.txt"},
        "saliency": {"path": "data/mini/Saliency"},
        "defaults": {
            "classifiers": {**learn, "accumulate": {"cells": 11}},
            "refinements": learn,
            "affinities": learn,
            "one_step": agen,
            "localizations": {"length": 161, "scales": [1.0]},
            "segmentations": {"backbone": lite2, "augmentation": {"crop": 161}, "training": {"epochs": 1}},
        },
        "classifiers": {"amr": {"training": {"epochs": 1}}},
        "test": {"flip": False},
        "gallery": 2,
    }
    (project / "small.yaml").write_text(yaml.safe_dump(small))
    return ["params.yaml", "profiles/voc12_mini.yaml", "small.yaml"]


@needs_mini
def test_every_row_of_voc12_mini_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy(tmp_path / "project", git=False))
    weak = ["cam", "oaa", "oaa_plus", "oaa_drop", "drs_learnable", "drs_fixed", "drs_refined", "drs_oaa"]
    weak += ["amr_irn", "edam_saliency"]
    run_stages(mini(Path.cwd(), train=12, evaluation=4, rows=[*weak, "agen", "supervised"]))
    rows = metrics(Path.cwd(), "mini")
    assert set(rows) == {*weak, "agen", "supervised"}
    assert all(0 < rows[name]["maps_recall"] < 1 for name in weak), rows
    assert all(math.isfinite(row["miou"]) for row in rows.values()), rows


@needs_mini
def test_a_table_runs_on_voc12_mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy(tmp_path / "project", git=False))
    files = mini(Path.cwd(), train=12, evaluation=4, rows=["cam"])
    run_stages([*files, "profiles/tables/oaa_11.yaml"], until="table oaa_11")
    figures = table(Path.cwd(), "mini", "oaa_11")
    assert figures.keys() == {"cam", "oaa", "oaa_drop"}
    assert all(values.keys() == {"miou", "recall", "noise"} for values in figures.values())


@needs_mini
def test_pseudo_labels_of_voc12_mini_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 160 images and five epochs, CAM's pseudo labels already beat the all-background score by far."""
    monkeypatch.chdir(copy(tmp_path / "project", git=False))
    files = mini(Path.cwd(), train=160, evaluation=1, rows=["cam"])
    Path("five.yaml").write_text("classifiers: {base: {training: {epochs: 5}}}\n")
    run_stages([*files, "five.yaml"], until="evaluation pseudo_labels/cam")
    scores = json.loads(Path("results/mini/evaluation/pseudo_labels/cam/scores.json").read_text())
    background = 0.04  # the mIoU of an all-background label map: about 0.7 / 21
    assert scores["miou"] > background + 0.25, scores
