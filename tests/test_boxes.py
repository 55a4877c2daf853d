"""Boxes and their localization accuracy against a flood fill and counting, pixel by pixel and box by box."""

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.evaluation import boxes
from pipeline.evaluation.boxes import OVERLAPS, THRESHOLDS, BoxScores

Box = tuple[int, int, int, int]


def flooded(mask: Any) -> list[tuple[Box, int]]:
    """The box and the number of pixels of each 8-connected component, in the order of their first pixels."""
    left = {(y, x) for y, x in zip(*map(list, np.nonzero(mask)), strict=True)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        part, queue = set(), [start]
        left.remove(start)
        while queue:
            y, x = queue.pop()
            part.add((y, x))
            for near in [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    queue.append(near)
        ys, xs = zip(*part, strict=True)
        found.append(((min(xs), min(ys), max(xs) + 1, max(ys) + 1), len(part)))
    return found


def overlap(one: Any, other: Any) -> float:
    """IoU of two boxes by counting unit squares."""
    squares = [{(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))} for b in (one, other)]
    return len(squares[0] & squares[1]) / len(squares[0] | squares[1])


def masks() -> list[NDArray[np.bool_]]:
    random = np.random.default_rng(0)
    dense = [random.random((9, 13)) < share for share in np.linspace(0, 1, 41)]
    ring = np.zeros((11, 12), bool)
    ring[1:10, 1:11] = True
    ring[2:9, 2:10] = False
    ring[4:6, 4:7] = True  # a component inside of another's hole
    return [*dense, ring]


def test_components_are_those_of_a_flood_fill() -> None:
    for mask in masks():
        found = sorted(tuple(map(int, box)) for box in boxes.components(mask))
        assert found == sorted(box for box, _ in flooded(mask))


def test_the_largest_component_has_the_most_pixels() -> None:
    """Not the largest box: the ring's box encloses more."""
    for mask in masks():
        expected = flooded(mask)
        (found,) = boxes.largest(mask).tolist() or [None]
        most = max((count for _, count in expected), default=0)
        assert (found is None) == (not expected)
        assert found is None or tuple(found) in [box for box, count in expected if count == most]
    thin = np.zeros((10, 10), bool)
    thin[0], thin[:, 0], thin[4:8, 4:9] = True, True, True
    assert boxes.largest(thin).tolist() == [[4, 4, 9, 8]]


def test_iou_by_counting_squares() -> None:
    random = np.random.default_rng(1)
    corners = random.integers(0, 8, (2, 12, 2))
    many = np.concatenate([corners[0], corners[0] + 1 + random.integers(0, 6, (12, 2))], 1).astype(float)
    found = boxes.iou(many[:5], many[5:])
    assert found.shape == (5, 7)
    for row, column in np.ndindex(5, 7):
        assert found[row, column] == pytest.approx(overlap(many[row], many[5 + column]))
    assert boxes.iou(many[:0], many).shape == (0, 12)


def image(seed: int) -> dict[str, Any]:
    """A random image: three maps of its five classes, a ranking, and one or two true classes with boxes."""
    random = np.random.default_rng(seed)
    size = (int(random.integers(12, 20)), int(random.integers(12, 20)))
    classes = random.permutation(5)[:3] + 1
    maps = {}
    y, x = np.mgrid[:5, :6]
    for class_id in classes:
        bump = np.exp(-((y - random.uniform(1, 2.5)) ** 2 + (x - random.uniform(1.5, 3)) ** 2) / 1.5)
        raster = 0.85 * bump + 0.15 * random.random((5, 6))
        maps[int(class_id)] = np.rint(raster / raster.max() * random.integers(40, 256)).astype(np.uint8)
    if seed % 7 == 0:
        maps[int(classes[0])][:] = 0
    truth: dict[int, Any] = {}
    for class_id in classes[: 1 + seed % 2]:
        left, top = random.integers(0, 6, 2)
        right, bottom = left + random.integers(4, size[1] - 5), top + random.integers(4, size[0] - 5)
        others = [[2, 2, 5, 5]] if seed % 3 == 0 else []
        truth[int(class_id)] = np.array([[left, top, right, bottom], *others], float)
    return {"size": size, "maps": maps, "ranking": (random.permutation(5) + 1).tolist(), "truth": truth}


IMAGES = [image(seed) for seed in range(24)]


def values(raster: Any, size: tuple[int, int]) -> Any:
    """A map at the size of its image, in float64 and by its maximum."""
    resized = cv2.resize(raster.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return resized.astype(np.float64) / max(float(resized.max()), 1e-5)


def brute(images: list[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Every score by loops."""
    known, tops, found = [], [], np.zeros((len(OVERLAPS), THRESHOLDS))
    for case in images:
        right = {}
        for class_id, truth in case["truth"].items():
            share = values(case["maps"][class_id], case["size"])
            parts = flooded(share > threshold + 1e-6)
            most = max((count for _, count in parts), default=0)
            box = next((box for box, count in parts if count == most), None)
            right[class_id] = box is not None and any(overlap(box, true) >= 0.5 for true in truth)
            known.append(right[class_id])
            for number in range(THRESHOLDS):
                parts = flooded(share > number / 100 + 1e-6)
                best = max((overlap(box, true) for box, _ in parts for true in truth), default=0)
                for row, least in enumerate(OVERLAPS):
                    found[row, number] += best >= least
        named = [[c for c in case["ranking"][:rank] if c in case["truth"]] for rank in (1, 5)]
        tops.append([*(bool(c) for c in named), *(any(right[c] for c in each) for each in named)])
    pairs = len(known)
    names = ("top_1_classification", "top_5_classification", "top_1_localization", "top_5_localization")
    shares = dict(zip(names, np.mean(tops, 0), strict=True))
    sweep = found / pairs
    return {**shares, "known": np.mean(known), "max_box_accuracy": sweep.max(1).mean(), "sweep": sweep}


@pytest.mark.parametrize("threshold", [0.2, 0.29, 0.555])
def test_all_scores_are_those_of_loops(threshold: float) -> None:
    scores = BoxScores(threshold)
    for case in IMAGES:
        scores.update(**case)
    found, expected = scores.summary(), brute(IMAGES, threshold)
    for row, least in enumerate(OVERLAPS):
        assert found["box_sweep"][f"{least:g}"] == pytest.approx(expected["sweep"][row])
        at = found["max_box_accuracy_at"][f"{least:g}"]
        assert at["accuracy"] == expected["sweep"][row].max()
        assert at["threshold"] == expected["sweep"][row].argmax() / 100
    del expected["sweep"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["pairs"] == 36
    assert 0.1 < expected["known"] < 0.9  # scores that say something
    assert 0 < expected["top_1_localization"] < expected["top_5_localization"]


def test_a_perfect_map_and_a_wrong_class() -> None:
    """A full rectangle: its box is right at every threshold. The second image's highest class is wrong."""
    raster = np.zeros((20, 30), np.uint8)
    raster[5:15, 10:25] = 255
    scores = BoxScores(0.2)
    for ranking in ([1, 2], [2, 1]):
        drawn = scores.update((20, 30), {1: raster, 2: 255 - raster}, ranking, {1: np.array([[10.0, 5, 25, 15]])})
        assert drawn[1].tolist() == [[10, 5, 25, 15]]
        assert drawn[2].tolist() == [[0, 0, 30, 20]]
    found = scores.summary()
    assert (found["known"], found["max_box_accuracy"]) == (1, 1)
    assert (found["top_1_localization"], found["top_5_localization"]) == (0.5, 1)
    assert (found["top_1_classification"], found["top_5_classification"]) == (0.5, 1)


def test_a_map_of_zeros_has_no_box() -> None:
    scores = BoxScores(0.0)
    drawn = scores.update((8, 8), {1: np.zeros((2, 2), np.uint8)}, [1], {1: np.array([[0.0, 0, 8, 8]])})
    assert drawn[1].shape == (0, 4)
    found = scores.summary()
    assert (found["top_1_classification"], found["known"], found["max_box_accuracy"]) == (1, 0, 0)


def test_without_images_there_are_no_scores() -> None:
    found = BoxScores(0.2).summary()
    assert np.isnan([found["known"], found["top_1_localization"], found["max_box_accuracy"]]).all()


def test_single_objects() -> None:
    mask = np.zeros((8, 9), np.uint8)
    assert boxes.single_object(mask) is None
    mask[2:5, 3:7] = 4
    mask[1, 2:8] = 255
    found = boxes.single_object(mask)
    assert found is not None
    assert found[0] == 4
    assert found[1].tolist() == [[3, 2, 7, 5]]
    other = mask.copy()
    other[7, 8] = 4
    assert boxes.single_object(other) is None  # two components
    other[7, 8] = 5
    assert boxes.single_object(other) is None  # two classes
