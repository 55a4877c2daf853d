"""Scores against plain loops and hand-worked cases."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.index import write
from pipeline.errors import PipelineError
from pipeline.evaluation import confusion
from pipeline.evaluation.confusion import ConfusionMatrix
from pipeline.evaluation.maps import THRESHOLDS, HalfMaximum, ThresholdSweep, prepare
from pipeline.evaluation.scores import jsonable, label_scores, map_scores
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterWriter
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import evaluation

RANDOM = np.random.default_rng(7)


def labels(*rows: list[int]) -> Any:
    return np.array(rows, np.uint8)


def counted(ground_truth: Any, prediction: Any, num_classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(ground_truth, prediction)
    return matrix


def loop(ground_truth: Any, prediction: Any, size: int, ignored_as_background: bool = False) -> list[list[int]]:
    counts = [[0] * size for _ in range(size)]
    for truth, guess in zip(ground_truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if truth == 255 or (guess == 255 and not ignored_as_background):
            continue
        counts[truth][0 if guess == 255 else guess] += 1
    return counts


def test_matrix_equals_a_plain_loop() -> None:
    values = np.array([0, 1, 2, 3, 255], np.uint8)
    matrix = ConfusionMatrix(3)
    expected = np.zeros((2, 4, 4), int)
    for height, width in [(11, 7), (5, 16)]:
        truth, guess = RANDOM.choice(values, (height, width)), RANDOM.choice(values, (height, width))
        matrix.update(truth, guess)
        expected += [loop(truth, guess, 4), loop(truth, guess, 4, ignored_as_background=True)]
    assert matrix.matrix().tolist() == expected[0].tolist()
    assert matrix.matrix(ignored_as_background=True).tolist() == expected[1].tolist()
    assert matrix.ignored == pytest.approx(1 - expected[0].sum() / expected[1].sum())


def test_scores_by_hand() -> None:
    # Background: 2 of 4 pixels correct, 1 false positive. Class 1: 1 pixel correct, 2 false positives, 1 miss.
    matrix = counted(labels([0, 0, 0, 0], [1, 1, 255, 255]), labels([0, 0, 1, 1], [1, 0, 1, 0]), 1)
    assert confusion.iou(matrix.matrix()).tolist() == [2 / 5, 1 / 4]
    assert confusion.class_accuracy(matrix.matrix()).tolist() == [2 / 4, 1 / 2]
    assert confusion.pixel_accuracy(matrix.matrix()) == 3 / 6
    assert confusion.all_background_miou(matrix.matrix()) == (4 / 6 + 0) / 2


def test_absent_classes_are_left_out_of_the_mean_and_named() -> None:
    scores = label_scores(counted(labels([0, 1, 1, 1]), labels([0, 1, 1, 3]), 4), ["background", "a", "b", "c", "d"])
    assert scores["absent"] == ["b", "d"]
    assert math.isnan(scores["iou"]["b"])
    assert scores["iou"]["c"] == 0  # predicted, but absent from the masks
    assert scores["miou"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_ignored_predictions_are_left_out_or_background() -> None:
    scores = label_scores(counted(labels([0, 0, 1, 1]), labels([0, 255, 255, 1]), 1), ["background", "a"])
    assert (scores["miou"], scores["ignored"]) == (1, 0.5)
    assert scores["miou_ignored_as_background"] == pytest.approx((2 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("truth", "guess", "words"),
    [
        (labels([0, 4]), labels([0, 0]), "label values 4 are neither"),
        (labels([0, 255]), labels([0, 7]), "label values 7 are neither"),
        (labels([0, 1]), labels([0], [1]), "shape"),
        (labels([0, 1]), labels([0, 1]).astype(np.int64), "int64"),
    ],
)
def test_invalid_label_maps_are_refused(truth: Any, guess: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConfusionMatrix(3).update(truth, guess)


def test_recall_and_noise_by_hand() -> None:
    truth = labels([1, 1, 1, 1, 0, 255], [2, 2, 0, 0, 0, 255])
    first = labels(
        [200, 100, 99, 0, 150, 200], [0, 0, 0, 0, 0, 0]
    )  # half of its maximum is 100: 2 of 4 pixels found, 1 false positive
    half = HalfMaximum(3)
    half.update(prepare(truth, {1: first}))  # class 2 has no map
    assert half.recall().tolist()[:2] == [2 / 4, 0]
    assert math.isnan(half.recall()[2])
    assert half.noise()[0] == 1 / 3
    assert np.isnan(half.noise()[1:]).all()
    assert half.coverage() == 2 / 6
    half.update(prepare(labels([1, 0]), {1: labels([9, 0]), 2: labels([0, 0])}))
    assert half.recall()[0] == 3 / 5  # pooled over the images
    assert half.noise()[0] == 1 / 4
    assert np.isnan(half.noise()[1])  # a zero map claims no pixel


def test_maps_are_resized_to_the_mask() -> None:
    scored = prepare(labels(*[[0] * 8] * 4), {2: labels([0, 100], [0, 100])})
    assert scored.values.shape == (1, 32)
    assert scored.values.max() == 1
    row = scored.values.reshape(4, 8)[0]
    assert row[2] == pytest.approx(0.125)  # half-pixel centres: (2 + 0.5) / 4 - 0.5
    assert (np.diff(row) >= 0).all()


def test_sweep_equals_one_threshold_at_a_time() -> None:
    sweep = ThresholdSweep(3)
    images = []
    for classes in [(1, 3), (2,), ()]:
        truth = RANDOM.choice(np.array([0, 1, 2, 3, 255], np.uint8), (12, 9))
        maps = {k: RANDOM.integers(0, 256, (12, 9), dtype=np.uint8) for k in classes}
        images.append((truth, maps))
        sweep.update(prepare(truth, maps))
    matrices, miou = sweep.matrices(), sweep.miou()
    assert len(miou) == THRESHOLDS
    for step in (0, 1, 17, 33, 50, 59, 86, 99):
        matrix = ConfusionMatrix(3)
        for truth, maps in images:
            stack = [np.full(truth.shape, step + 1e-4, np.float32)]
            stack += [100 * (raster.astype(np.float32) / raster.max()) for raster in maps.values()]
            matrix.update(truth, np.array([0, *maps], np.uint8)[np.argmax(stack, axis=0)])
        assert matrices[step].tolist() == matrix.matrix().tolist()
        assert miou[step] == confusion.mean(confusion.iou(matrix.matrix()))


def test_best_threshold() -> None:
    half, sweep = HalfMaximum(1), ThresholdSweep(1)
    image = prepare(labels([1, 1, 0, 0]), {1: labels([100, 40, 30, 0])})
    half.update(image)
    sweep.update(image)
    scores = map_scores(half, sweep, ["background", "a"])
    assert (scores["best_threshold"], scores["best_threshold_miou"]) == (
        0.3,
        1,
    )  # 0.3 does not exceed the threshold, 0.4 does
    assert scores["best_threshold_iou"] == {"background": 1, "a": 1}
    assert scores["recall"] == 0.5


def test_json_holds_rounded_numbers_and_null() -> None:
    values = {"a": np.array([1 / 3, np.nan]), "b": np.float64(2 / 3), "c": (1, "x")}
    assert jsonable(values) == {"a": [0.333333, None], "b": 0.666667, "c": [1, "x"]}


MASKS = {"one": labels([1, 1, 0, 0]), "two": labels([2, 2, 0, 255]), "three": labels([0, 1, 1, 0])}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Training images one, two and unmasked; evaluation image three, the only one without class 2."""
    entry = {"file": "x.png", "height": 1, "width": 4, "mask": None, "saliency": None}
    tags = {"one": [1], "two": [2], "unmasked": [1], "three": []}
    index = {
        "classes": ["cat", "dog"],
        "tag_source": "tags.json",
        "splits": {"train": ["one", "two", "unmasked"], "evaluation": ["three"]},
        "root": ".",
        "images": {name: {**entry, "tags": found} for name, found in tags.items()},
    }
    write(tmp_path / "index.json", index)
    store(tmp_path / "masks.h5", {name: {0: mask} for name, mask in MASKS.items()})
    return tmp_path


def store(path: Path, rasters: dict[str, dict[int, Any]]) -> Path:
    with RasterWriter(path, kind="test") as writer:
        for image_id, found in rasters.items():
            writer.add_image(image_id)
            for class_id, raster in found.items():
                writer.append(image_id, raster, class_id)
    return path


def score(folder: Path, name: str, **inputs: Path) -> Any:
    inputs = {"index": folder / "index.json", "ground_truth": folder / "masks.h5", **inputs}
    outputs = {"scores": folder / "scores.json"}
    job = Job("evaluation", name, inputs, outputs, {})
    evaluation.main(Work(job, inputs, outputs, Runtime(), "key", folder / "checkpoint"))
    return json.loads(outputs["scores"].read_text())


def test_stage_scores_pseudo_labels_of_masked_training_images(dataset: Path) -> None:
    path = store(dataset / "labels.h5", {"one": {0: labels([1, 1, 0, 0])}, "two": {0: labels([2, 255, 2, 0])}})
    scores = score(dataset, "pseudo_labels/x", labels=path)
    assert (scores["kind"], scores["split"], scores["images"]) == ("labels", "train", 2)
    assert scores["iou"] == {"background": 0.666667, "cat": 1.0, "dog": 0.5}
    assert scores["ignored"] == round(1 / 7, 6)
    assert scores["absent"] == []


def test_stage_scores_predictions_of_the_evaluation_split(dataset: Path) -> None:
    path = store(dataset / "labels.h5", {"three": {0: labels([0, 1, 0, 0])}})
    scores = score(dataset, "predictions/x", labels=path)
    assert (scores["kind"], scores["split"], scores["images"]) == ("predictions", "evaluation", 1)
    assert scores["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert (scores["absent"], scores["iou"]["dog"]) == (["dog"], None)
    assert scores["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)
    assert scores["all_background_miou"] == 0.25


def test_stage_scores_maps_and_coverage_by_epoch(dataset: Path) -> None:
    cat, dog = labels([200, 200, 0, 0]), labels([0, 200, 200, 0])
    maps = store(dataset / "maps.h5", {"one": {1: cat}, "two": {2: dog}, "unmasked": {1: cat}})
    first = {"2/one": {1: labels([200, 0, 0, 0])}, "2/two": {}}
    snapshots = store(dataset / "snapshots.h5", {**first, "10/one": {1: cat}, "10/two": {2: dog}})
    scores = score(dataset, "classifiers/x", maps=maps, snapshots=snapshots)
    assert scores["recall_per_class"] == {"cat": 1.0, "dog": 0.5}
    assert scores["noise_per_class"] == {"cat": 0.0, "dog": 0.5}
    assert scores["coverage_by_epoch"] == {"images": 2, "epoch": [2, 10], "coverage": [0.25, 0.75]}
    assert scores["coverage"] == 0.75


def test_stage_without_snapshots_has_no_curve(dataset: Path) -> None:
    maps = store(dataset / "maps.h5", {"one": {}, "two": {}})
    scores = score(dataset, "classifiers/x", maps=maps, snapshots=store(dataset / "snapshots.h5", {}))
    assert scores["coverage_by_epoch"] == {"images": 0, "epoch": [], "coverage": []}
    assert (scores["recall"], scores["noise"]) == (0.0, None)


def test_stage_reports_missing_masks(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(dataset / "masks.h5", {})
    scores = score(dataset, "localizations/x", maps=store(dataset / "maps.h5", {}))
    assert scores == {"kind": "maps", "split": "train", "images": 0, "classes": ["cat", "dog"], "arithmetic": []}
    assert "no masks" in capsys.readouterr().out


def test_stage_names_missing_or_invalid_inputs(dataset: Path) -> None:
    path = store(dataset / "labels.h5", {"two": {0: labels([2, 2, 0, 0])}})
    with pytest.raises(PipelineError, match=r"labels\.h5: lacks 1 images with masks \(one\)"):
        score(dataset, "pseudo_labels/x", labels=path)
    with pytest.raises(PipelineError, match=r"lacks 1 images with masks \(one\)"):
        score(dataset, "localizations/x", maps=path)
    path = store(dataset / "labels.h5", {"one": {0: labels([1, 1])}, "two": {0: labels([2, 2])}})
    with pytest.raises(PipelineError, match=r"labels\.h5: image one: .*shape"):
        score(dataset, "mixtures/x", labels=path)
