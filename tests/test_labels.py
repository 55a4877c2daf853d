"""Label rules on hand-worked cases, and the stages around them: pseudo labels, mixture, export."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

import stages.mixture
import stages.pseudo_labels
from pipeline.config.schema import Crf, Mixture
from pipeline.data.index import write
from pipeline.errors import PipelineError
from pipeline.labels import base
from pipeline.labels.background import Power
from pipeline.labels.base import LabelCrf, Rule
from pipeline.labels.labelling import class_score, label_image
from pipeline.labels.oaa import Oaa
from pipeline.labels.threshold import Threshold
from pipeline.runtime import Runtime
from pipeline.stores.raster import Raster, RasterStore, RasterWriter
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from tests.pixel import block

OAA = Oaa(minimum_foreground=0)
PLAIN = Threshold(background=0.3)


def raster(*rows: list[int]) -> Raster:
    return np.array(rows, np.uint8)


def grey(*rows: list[float]) -> Raster:
    return np.rint(np.array(rows) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("saliency", "cat", "dog", "label"),
    [
        (0, 0, 0, 0),  # no evidence for an object
        (0, 180, 100, 0),  # background 1 beats 0.71
        (255, 180, 100, 3),
        (255, 180, 200, 15),
        (255, 180, 180, 3),  # a tie: the lower id wins
        (31, 128, 0, 0),  # saliency just below 32/255
        (32, 128, 0, 255),  # salient, but background wins
        (255, 70, 60, 255),  # all below 0.3: background by default, but salient
        (178, 77, 0, 255),  # background 0.302 and class 0.302: background wins, salient
        (179, 77, 0, 3),  # the background score falls below 0.3 and is set to 0
        (10, 210, 0, 255),  # background 0.96 beats an object above 0.8
        (10, 204, 0, 0),  # 0.8 itself is not above it
        (255, 240, 235, 255),  # two classes above 0.9
        (255, 240, 229, 3),  # 229/255 is below 0.9
        (0, 240, 0, 255),  # background and a class above 0.9
    ],
)
def test_oaa_pixel_by_pixel(saliency: int, cat: int, dog: int, label: int) -> None:
    maps = {15: raster([dog]), 3: raster([cat])}
    assert label_image(maps, raster([saliency]), None, OAA, "none", (1, 1)).tolist() == [[label]]


def test_oaa_without_saliency_has_a_constant_background() -> None:
    rule = replace(OAA, saliency=None, background=0.4)
    assert label_image({3: grey([0.2, 0.39, 0.41, 0.95])}, None, None, rule, "none", (1, 4)).tolist() == [[0, 0, 3, 3]]


@pytest.mark.parametrize(("saliency", "label"), [(50, 0), (51, 255), (52, 255)])
def test_oaa_counts_saliency_at_the_threshold_as_salient(saliency: int, label: int) -> None:
    rule = replace(OAA, saliency=51 / 255)
    assert label_image({3: raster([0])}, raster([saliency]), None, rule, "none", (1, 1)).tolist() == [[label]]


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        (OAA, True),
        (replace(OAA, background=0.4), True),
        (replace(OAA, saliency=None), True),
        (replace(OAA, background=0.4, saliency=None), False),
        (PLAIN, False),
        (replace(PLAIN, background="saliency"), True),
        (replace(PLAIN, background=Power(1.0)), False),
    ],
)
def test_saliency_is_needed_by_background_or_threshold(rule: Rule, needed: bool) -> None:
    assert rule.needs_saliency is needed


@pytest.mark.parametrize(("objects", "kept"), [(9, False), (10, True)])
def test_oaa_ignores_an_image_with_too_little_foreground(objects: int, kept: bool) -> None:
    rule = replace(OAA, minimum_foreground=0.1)
    saliency = np.zeros((10, 10), np.uint8)
    saliency.flat[:objects] = 255
    saliency.flat[50:60] = 100  # ignored pixels do not count as foreground
    label = label_image({3: saliency}, saliency, None, rule, "none", (10, 10))
    assert np.unique(label).tolist() == ([0, 3, 255] if kept else [255])


def test_oaa_uses_the_thresholds_of_the_rule() -> None:
    at_threshold = replace(OAA, attention=0.2)
    assert label_image({3: raster([50, 51])}, raster([255, 255]), None, at_threshold, "none", (1, 2)).tolist() == [
        [255, 3]
    ]
    maps, saliency = {3: grey([0.5, 0.5, 0.5])}, grey([0.45, 0.55, 0.05])
    strict = replace(OAA, attention=0.52, saliency=0.6, object=0.6)
    assert label_image(maps, saliency, None, strict, "none", (1, 3)).tolist() == [[0, 0, 0]]
    loose = replace(OAA, attention=0, saliency=0.4, object=0.4, conflict=0.51)
    assert label_image(maps, saliency, None, loose, "none", (1, 3)).tolist() == [[255, 3, 255]]
    clashing = replace(loose, conflict=0.44)
    assert label_image(maps, saliency, None, clashing, "none", (1, 3)).tolist() == [[255, 255, 255]]


def test_oaa_at_its_thresholds() -> None:
    """204/255 equals 0.8 exactly: saliency at the threshold is salient; two scores at the threshold do not conflict."""
    rule = replace(OAA, saliency=0.8, conflict=0.8, object=1.0)
    assert label_image({3: raster([50, 50])}, raster([203, 204]), None, rule, "none", (1, 2)).tolist() == [[0, 255]]
    both = raster([204, 205])
    assert label_image({3: both, 5: both}, raster([255, 255]), None, rule, "none", (1, 2)).tolist() == [[3, 255]]


def test_oaa_counts_every_class_as_foreground() -> None:
    rule = replace(OAA, minimum_foreground=0.5)
    salient = np.full((2, 2), 255, np.uint8)
    for class_id in (1, 2, 20):
        assert (label_image({class_id: salient}, salient, None, rule, "none", (2, 2)) == class_id).all()


def test_a_background_power_clips_scores_above_1() -> None:
    """Upsampling may round above 1, where a fractional power of 1 - score is undefined."""
    rule = replace(PLAIN, background=Power(0.5))
    for size in range(1, 60):
        full = np.full((3, 7), 255, np.uint8)
        assert (label_image({4: full}, None, None, rule, "none", (size, 61)) == 4).all()


def test_threshold_rule() -> None:
    maps = {7: grey([0.29, 0.31, 0.95]), 2: grey([0.0, 0.31, 0.96])}
    assert label_image(maps, None, None, PLAIN, "none", (1, 3)).tolist() == [[0, 2, 2]]
    salient = replace(PLAIN, background="saliency")
    assert label_image(maps, grey([0.9, 0.6, 0.0]), None, salient, "none", (1, 3)).tolist() == [[7, 0, 0]]


def test_without_a_class_all_pixels_are_background_or_ignored() -> None:
    assert label_image({}, None, None, PLAIN, "none", (2, 2)).tolist() == [[0, 0], [0, 0]]
    rule = replace(OAA, minimum_foreground=0.01)
    assert label_image({}, np.zeros((2, 2), np.uint8), None, rule, "none", (2, 2)).tolist() == [[255, 255], [255, 255]]


@pytest.mark.parametrize(
    ("normalise", "expected"), [("none", [0.2, 0.4, 0.6]), ("max", [1 / 3, 2 / 3, 1]), ("minmax", [0, 0.5, 1])]
)
def test_normalisation(normalise: str, expected: list[float]) -> None:
    assert class_score(grey([0.2, 0.4, 0.6]), normalise, (1, 3))[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["none", "max", "minmax"])
def test_an_empty_map_has_zero_scores(normalise: str) -> None:
    assert not class_score(np.zeros((3, 3), np.uint8), normalise, (5, 4)).any()


def test_a_small_map_is_upsampled_bilinearly_and_then_stretched() -> None:
    score = class_score(raster([0, 100]), "none", (2, 4))
    np.testing.assert_allclose(score, np.tile([0, 25, 75, 100], (2, 1)) / 255, atol=1e-6)
    assert class_score(raster([50, 100], [50, 50]), "minmax", (9, 7)).max() == 1
    assert class_score(raster([0, 100]), "none", (2, 4)).dtype == np.float32
    assert class_score(raster([0, 0]), "max", (2, 4)).dtype == np.float32


def test_missing_or_mismatched_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a saliency map, but there is none"):
        label_image({}, None, None, OAA, "none", (1, 1))
    with pytest.raises(ValueError, match=r"the saliency map is \(2, 1\), but the image is \(1, 2\)"):
        label_image({}, np.zeros((2, 1), np.uint8), None, OAA, "none", (1, 2))
    with pytest.raises(ValueError, match="needs the image, but there is none"):
        label_image({}, None, None, replace(PLAIN, crf=LabelCrf()), "none", (1, 1))


def halves() -> tuple[NDArray[np.uint8], Raster]:
    """An image that is red on the left and blue on the right, and a map that misses two columns of the red half."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, :16, 0], image[:, 16:, 2] = 200, 200
    attention = np.zeros((24, 32), np.uint8)
    attention[:, :14] = 255
    return image, attention


def test_crf_moves_the_label_to_the_edge() -> None:
    image, attention = halves()
    attention[:, 14:16] = 64  # 0.25: below the background
    assert label_image({5: attention}, None, image, PLAIN, "none", (24, 32))[:, 14:16].max() == 0
    label = label_image({5: attention}, None, image, replace(PLAIN, crf=LabelCrf(bilateral_rgb=10)), "none", (24, 32))
    assert np.array_equal(label, np.where(np.arange(32) < 16, 5, 0) * np.ones((24, 1)))


def test_crf_confidence_ignores_unsure_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[NDArray[np.float32]] = []

    def marginals(image: Any, probabilities: NDArray[np.float32], settings: Crf) -> NDArray[np.float32]:
        given.append(probabilities)
        return np.array([[[0.9, 0.55, 0.3, 0.6]], [[0.1, 0.45, 0.7, 0.4]]], np.float32)

    monkeypatch.setattr(base, "dense_crf", marginals)
    image = np.zeros((1, 4, 3), np.uint8)
    sure = replace(PLAIN, crf=LabelCrf(confidence=0.6))
    assert label_image({5: grey([0.2, 0.9, 0.9, 0.0])}, None, image, sure, "none", (1, 4)).tolist() == [[0, 255, 5, 0]]
    np.testing.assert_allclose(given[0].sum(0), 1, atol=1e-6)
    assert given[0][1, 0].tolist() == pytest.approx([0.4, 0.75, 0.75, 1e-5 / 0.3], rel=0.01)

    # OAA: the marginals choose; salient background and objects on background are ignored as without a CRF
    maps, saliency = {5: grey([0.0, 0.85, 0.25, 0.0])}, grey([0.0, 0.0, 0.9, 0.5])
    assert label_image(maps, saliency, image, replace(OAA, crf=LabelCrf()), "none", (1, 4)).tolist() == [
        [0, 255, 5, 255]
    ]
    unsure = replace(OAA, crf=LabelCrf(confidence=0.75))
    assert label_image(maps, saliency, image, unsure, "none", (1, 4)).tolist() == [[0, 255, 255, 255]]
    assert given[1][:, 0, 2].tolist() == [0.5, 0.5]  # all scores are below the threshold: uniform


# --- stages ---------------------------------------------------------------------------------------------------------


def write_index(root: Path, tags: dict[str, list[int]], size: tuple[int, int]) -> None:
    images = {
        name: {
            "file": f"{name}.png",
            "height": size[0],
            "width": size[1],
            "tags": found,
            "mask": None,
            "saliency": None,
        }
        for name, found in tags.items()
    }
    splits = {"train": [name for name in tags if name != "val"], "evaluation": [name for name in tags if name == "val"]}
    index = {"classes": ["a", "b", "c"], "tag_source": "test", "splits": splits, "root": str(root), "images": images}
    write(root / "index.json", index)


def write_store(path: Path, kind: str, rasters: dict[str, dict[int, Raster]]) -> Path:
    with RasterWriter(path, kind) as writer:
        for name, found in rasters.items():
            writer.add_image(name)
            for class_id, values in found.items():
                writer.append(name, values, class_id)
    return path


def run(
    main: Callable[[Work], None], root: Path, inputs: dict[str, Path], block: Any, workers: int = 0, seed: int = 1
) -> RasterStore:
    outputs = {"labels": root / "labels.h5"}
    inputs = {"index": root / "index.json", **inputs}
    job = Job("stage", "", inputs, outputs, {"seed": seed}, block)
    main(Work(job, inputs, outputs, Runtime(workers=workers), f"key of {root}", root / "parts"))
    return RasterStore(outputs["labels"])


def label(root: Path, rule: Rule, workers: int = 0) -> RasterStore:
    inputs = {"maps": root / "maps.h5", "saliency": root / "saliency.h5"}
    return run(stages.pseudo_labels.main, root, inputs, block(rule), workers)


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Four training images of 12 x 16 with maps of 3 x 4, and one of the evaluation split."""
    write_index(tmp_path, {"d": [1], "val": [1], "a": [1, 2], "b": [3], "c": [2]}, (12, 16))
    left, right = raster(*[[255, 255, 0, 0]] * 3), raster(*[[0, 0, 0, 255]] * 3)
    stored = {"a": {1: left, 2: right}, "b": {}, "c": {1: left, 2: right}, "d": {1: left}}
    write_store(tmp_path / "maps.h5", "localization", stored)
    write_store(tmp_path / "saliency.h5", "saliency", {name: {0: np.full((12, 16), 255, np.uint8)} for name in "abcd"})
    for name in "abcd":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8))
    return tmp_path


def test_pseudo_labels_of_the_training_split(maps: Path) -> None:
    store = label(maps, PLAIN)
    assert store.kind == "labels"
    assert list(store) == ["d", "a", "b", "c"]
    assert store.get("d")[5].tolist() == [1] * 9 + [0] * 7
    assert store.get("a")[5].tolist() == [1] * 9 + [0] * 2 + [2] * 5
    assert not store.get("b").any()  # its tag has no map
    assert set(np.unique(store.get("c"))) == {0, 2}  # maps of untagged classes are ignored


def test_pseudo_labels_by_saliency(maps: Path) -> None:
    assert label(maps, OAA).get("a")[5, [0, 8, 15]].tolist() == [1, 1, 2]
    assert (label(maps, OAA).get("b") == 255).all()


@pytest.mark.parametrize("rule", [OAA, replace(PLAIN, crf=LabelCrf(iterations=2, confidence=0.6))])
def test_pseudo_labels_by_worker_processes_are_the_same_bytes(maps: Path, rule: Rule) -> None:
    alone = label(maps, rule).path.read_bytes()
    for part in (maps / "parts").iterdir():
        part.unlink()
    assert label(maps, rule, workers=2).path.read_bytes() == alone


def test_pseudo_labels_name_the_images_without_maps(maps: Path) -> None:
    write_store(maps / "maps.h5", "localization", {"a": {}, "c": {}})
    with pytest.raises(PipelineError, match=r"maps\.h5: lacks 2 training images: d, b; run its stage again"):
        label(maps, PLAIN)


def test_pseudo_labels_resume_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"i{number:03d}" for number in range(150)]
    write_index(tmp_path, {name: [1] for name in names}, (4, 4))
    random = np.random.default_rng(0)
    write_store(tmp_path / "maps.h5", "maps", {name: {1: random.integers(0, 255, (2, 2), np.uint8)} for name in names})
    write_store(tmp_path / "saliency.h5", "saliency", {name: {} for name in names})
    whole = label(tmp_path, PLAIN).path.read_bytes()
    for part in (tmp_path / "parts").iterdir():
        part.unlink()

    calls = 0

    def mortal(*arguments: Any) -> Raster:
        nonlocal calls
        calls += 1
        if calls == 140:
            raise KeyboardInterrupt
        return label_image(*arguments)

    monkeypatch.setattr(stages.pseudo_labels, "label_image", mortal)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, PLAIN)
    calls = 1000
    assert label(tmp_path, PLAIN).path.read_bytes() == whole
    assert calls == 1000 + 150 - 128


@pytest.fixture
def two_kinds(tmp_path: Path) -> dict[str, Path]:
    """Ten images whose pseudo label is 1 and whose mask is 2 everywhere."""
    names = [f"i{number}" for number in range(10)]
    write_index(tmp_path, {name: [1] for name in names}, (2, 2))
    both = {"labels": 1, "ground_truth": 2}
    return {
        key: write_store(tmp_path / f"{key}.in.h5", "labels", {n: {0: np.full((2, 2), v, np.uint8)} for n in names})
        for key, v in both.items()
    }


def annotated(root: Path, inputs: dict[str, Path], share: float, seed: int) -> set[str]:
    store = run(stages.mixture.main, root, inputs, Mixture("pseudo_labels/x", share), seed=seed)
    assert list(store) == [f"i{number}" for number in range(10)]
    return {name for name in store if (store.get(name) == 2).all()}


def test_mixture_draws_a_share_by_seed(tmp_path: Path, two_kinds: dict[str, Path]) -> None:
    drawn = annotated(tmp_path, two_kinds, 0.4, 1)
    assert len(drawn) == 4
    assert annotated(tmp_path, two_kinds, 0.4, 1) == drawn
    assert any(annotated(tmp_path, two_kinds, 0.4, seed) != drawn for seed in range(2, 6))
    assert annotated(tmp_path, two_kinds, 0.7, 1) > drawn
    assert annotated(tmp_path, two_kinds, 0, 1) == set()
    assert len(annotated(tmp_path, two_kinds, 1, 1)) == 10


def test_mixture_draws_among_the_images_with_masks(tmp_path: Path, two_kinds: dict[str, Path]) -> None:
    """i0 is in the store without a raster and i1 is missing from it: 8 of the 10 images have a mask."""
    mask = {0: np.full((2, 2), 2, np.uint8)}
    masks = {"i0": {}, **{f"i{number}": mask for number in range(2, 10)}}
    two_kinds["ground_truth"] = write_store(tmp_path / "some.h5", "labels", masks)
    assert len(annotated(tmp_path, two_kinds, 0.4, 1)) == 4
    assert annotated(tmp_path, two_kinds, 0.8, 1) == {f"i{number}" for number in range(2, 10)}
    with pytest.raises(
        PipelineError, match=r"some\.h5: has masks of 8 training images, but .* 0\.9 of all 10 is 9; add masks"
    ):
        annotated(tmp_path, two_kinds, 0.9, 1)


def test_label_stages_start_without_the_crf_library(monkeypatch: pytest.MonkeyPatch, maps: Path) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert list(label(maps, PLAIN)) == ["d", "a", "b", "c"]
    (maps / "parts/00000.part").unlink()
    with pytest.raises(PipelineError, match="pip install pydensecrf2"):
        label(maps, replace(PLAIN, crf=LabelCrf()))
