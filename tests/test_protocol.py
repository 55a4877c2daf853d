"""The mIoU as public codes count it, at the papers' thresholds, with its interval, and per class."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.streams import Purpose, rng
from pipeline.evaluation import confusion
from pipeline.evaluation.confusion import ConfusionMatrix
from pipeline.evaluation.maps import HalfMaximum, MapPixels, ThresholdSweep
from pipeline.evaluation.scores import jsonable, label_scores, map_scores, prediction_scores
from pipeline.networks.vision import import_torchvision
from pipeline.report import per_class

K = 4  # class 3 occurs in no mask but in predictions, class 4 in neither
NAMES = ["background", "a", "b", "c", "d"]
Labels = NDArray[np.uint8]


def examples(ignored: bool, count: int = 5) -> list[tuple[Labels, Labels]]:
    """Masks with 255, and predictions that are right in about two thirds of the pixels."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        mask = random.choice([0, 1, 2, 255], (12, 17), p=[0.5, 0.25, 0.15, 0.1])
        other = random.choice([0, 1, 2, 3, 255 if ignored else 0], (12, 17))
        prediction = np.where((random.random((12, 17)) < 0.6) & (mask != 255), mask, other)
        pairs.append((mask.astype(np.uint8), prediction.astype(np.uint8)))
    return pairs


def matrix_of(pairs: list[tuple[Labels, Labels]]) -> ConfusionMatrix:
    matrix = ConfusionMatrix(K)
    for mask, prediction in pairs:
        matrix.update(mask, prediction)
    return matrix


def as_irn(pairs: list[tuple[Labels, Labels]]) -> float:
    """irn: 255 becomes background, then chainercv's confusion over pixels with a label; mean without NaN."""
    counts = np.zeros((K + 1, K + 1))
    for mask, prediction in pairs:
        for target, found in zip(mask.flat, prediction.flat, strict=True):
            if target != 255:
                counts[target, 0 if found == 255 else found] += 1
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))))


def areas(pairs: list[tuple[Labels, Labels]]) -> tuple[NDArray[np.float64], ...]:
    """mmsegmentation and SEAM: the areas of intersection, prediction and mask; a predicted 255 is in none of them."""
    hits, predicted, masked = np.zeros(K + 1), np.zeros(K + 1), np.zeros(K + 1)
    for mask, prediction in pairs:
        known = mask != 255
        for c in range(K + 1):
            hits[c] += ((prediction == c) & (mask == c) & known).sum()
            predicted[c] += ((prediction == c) & known).sum()
            masked[c] += (mask == c).sum()
    return hits, predicted, masked


class TestConventions:
    @pytest.mark.parametrize("ignored", [False, True])
    def test_are_those_of_the_public_codes(self, ignored: bool) -> None:
        pairs = examples(ignored)
        found = matrix_of(pairs).conventions()
        hits, predicted, masked = areas(pairs)
        with np.errstate(invalid="ignore"):
            mmsegmentation = float(np.nanmean(hits / (predicted + masked - hits)))
        seam = float(np.mean(hits / (masked + predicted - hits + 1e-10)))
        assert found["irn"] == pytest.approx(as_irn(pairs))
        assert found["mmsegmentation"] == pytest.approx(mmsegmentation)
        assert found["seam"] == pytest.approx(seam)
        in_masks = [(np.where(p == 255, 0, p), m) for m, p in pairs]
        iou = [
            sum(((p == c) & (m == c)).sum() for p, m in in_masks)
            / sum((((p == c) | (m == c)) & (m != 255)).sum() for p, m in in_masks)
            for c in range(3)
        ]
        assert found["deeplab_pytorch"] == pytest.approx(np.mean(iou))
        assert (found["irn"] == pytest.approx(found["mmsegmentation"])) is not ignored
        assert found["seam"] < found["irn"] < found["deeplab_pytorch"]

    def test_torchmetrics_agrees_on_every_class(self) -> None:
        import_torchvision()  # torchmetrics imports it
        from torchmetrics.classification import MulticlassJaccardIndex

        pairs = examples(False)
        metric = MulticlassJaccardIndex(K + 1, average=None, ignore_index=255)
        for mask, prediction in pairs:
            metric.update(torch.from_numpy(prediction).long(), torch.from_numpy(mask).long())
        scores = prediction_scores(matrix_of(pairs), NAMES)
        assert list(scores["iou"].values())[:4] == pytest.approx(metric.compute()[:4].tolist())
        assert scores["miou_as"]["irn"] == scores["miou"]
        assert scores["absent"] == ["d"]
        assert scores["absent_from_masks"] == ["c", "d"]

    def test_without_a_counted_pixel_there_is_none(self) -> None:
        matrix = matrix_of([(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8))])
        assert all(np.isnan(value) for value in matrix.conventions().values())
        assert label_scores(matrix, NAMES)["absent_from_masks"] == NAMES


class TestIntervals:
    def test_counts_of_each_image_add_up(self) -> None:
        matrix = matrix_of(examples(True))
        counts = matrix.matrix(ignored_as_background=True)
        expected = np.stack([np.diag(counts), counts.sum(1), counts.sum(0)])
        assert np.array_equal(matrix.images().sum(0), expected)

    def test_is_that_of_resampled_images(self) -> None:
        """Every resample scored anew, image by image."""
        pairs = examples(True)
        draws = rng(7, Purpose.BOOTSTRAP).multinomial(5, np.full(5, 1 / 5), 40)
        scores = [
            as_irn([pair for pair, times in zip(pairs, draw, strict=True) for _ in range(times)]) for draw in draws
        ]
        found = confusion.bootstrap(matrix_of(pairs).images(), 40, 7)
        assert found == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))
        assert confusion.bootstrap(matrix_of(pairs).images(), 40, 8) != found

    def test_scores_have_it(self) -> None:
        matrix = matrix_of(examples(False, 30))
        scores = prediction_scores(matrix, NAMES)
        assert scores["miou_low"] < scores["miou"] < scores["miou_high"] < scores["miou_low"] + 0.1
        assert (scores["miou_low"], scores["miou_high"]) == confusion.bootstrap(matrix.images(), 1000, 0)

    def test_equal_images_have_no_width(self) -> None:
        matrix = matrix_of(examples(False, 1) * 6)
        low, high = confusion.bootstrap(matrix.images(), 100, 0)
        assert low == high == pytest.approx(prediction_scores(matrix, NAMES)["miou"])

    def test_a_class_that_resamples_lack_does_not_shift_it(self) -> None:
        """One image each of background, and of a class that is never found: the mean over both is 1/2 or less."""
        empty = np.zeros((4, 4), np.uint8)
        pairs = [(empty, empty)] * 7 + [(np.full((4, 4), 2, np.uint8), empty)]
        matrix = matrix_of(pairs)
        low, high = confusion.bootstrap(matrix.images(), 1000, 0)
        miou = float(prediction_scores(matrix, NAMES)["miou"])
        assert miou == pytest.approx(7 / 16)
        assert low < miou < high <= 0.5

    def test_without_images(self) -> None:
        assert all(np.isnan(value) for value in confusion.bootstrap(ConfusionMatrix(2).images(), 10, 0))


def test_maps_at_the_thresholds_of_the_papers() -> None:
    """Pixels of class 1 with value 0.17, of class 2 with 0.5, and background with 0.1 and 0.45 of class 2."""
    target = np.array([1] * 10 + [2] * 10 + [0] * 20, np.uint8)
    first = np.array([0.17] * 10 + [0.0] * 30, np.float32)
    second = np.array([0.0] * 10 + [0.5] * 10 + [0.1] * 10 + [0.45] * 10, np.float32)
    half, sweep = HalfMaximum(2), ThresholdSweep(2)
    sweep.update(MapPixels(target, np.array([1, 2]), np.stack([first, second])))
    at = map_scores(half, sweep, NAMES[:3])["miou_at"]
    assert at["irn"] == {"threshold": 0.15, "miou": pytest.approx((1 / 2 + 1 + 1 / 2) / 3)}
    assert at["amr"] == {"threshold": 0.2, "miou": pytest.approx((1 / 3 + 0 + 1 / 2) / 3)}
    assert at["seam"] == {"swept": [0.0, 0.59], "threshold": 0.1, "miou": pytest.approx((1 / 2 + 1 + 1 / 2) / 3)}
    assert at["edam"] == {"swept": [0.4, 0.58], "threshold": 0.45, "miou": pytest.approx((2 / 3 + 0 + 1) / 3)}


class TestPerClass:
    def scored(self, folder: Path) -> None:
        for output, scores in {
            "predictions/cam": prediction_scores(matrix_of(examples(False)), NAMES),
            "localizations/cam": {
                "recall_per_class": {"a": 0.5},
                "recall": 0.5,
                "miou_at": {"irn": {"threshold": 0.15, "miou": 0.25}},
            },
        }.items():
            file = folder / "evaluation" / output / "scores.json"
            file.parent.mkdir(parents=True)
            scores = {"classes": NAMES[1:], **scores}
            file.write_text(json.dumps(jsonable(scores)))

    def test_csv_and_json_hold_the_same(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.scored(tmp_path)
        per_class.main([str(tmp_path), "--json"])
        lines = json.loads(capsys.readouterr().out)
        per_class.main([str(tmp_path)])
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [(line["output"], line["score"]) for line in lines] == [
            ("localizations/cam", "recall"),
            ("localizations/cam", "miou_at_irn"),
            ("predictions/cam", "iou"),
            ("predictions/cam", "accuracy"),
            *(("predictions/cam", f"miou_as_{code}") for code in ("irn", "mmsegmentation", "seam", "deeplab_pytorch")),
        ]
        for line, row in zip(lines, rows, strict=True):
            assert {key: "" if value is None else str(value) for key, value in line.items()} == row
        scores = prediction_scores(matrix_of(examples(False)), NAMES)
        assert float(rows[1]["mean"]) == 0.25
        assert float(rows[2]["mean"]) == pytest.approx(float(scores["miou"]), abs=1e-6)
        assert float(rows[6]["mean"]) == pytest.approx(float(scores["miou_as"]["seam"]), abs=1e-6)
        assert rows[1]["d"] == rows[0]["background"] == ""

    def test_a_folder_without_scores_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            per_class.main([str(tmp_path)])
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}: has no scores; name the folder of an experiment")
