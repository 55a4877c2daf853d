"""Each format gives the mask back, pixel for pixel, through the reader that people use or that its specification is."""

import csv
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.data.palette import voc_palette
from pipeline.errors import PipelineError
from wsss.formats import FORMATS, Collected, Item
from wsss.formats.labelstudio import brush_rle
from wsss.formats.png import write_png
from wsss.formats.polygons import polygons

NAMES = ("background", "Füße & <Schuhe>", "猫", 'say "cheese"', *(f"class {number}" for number in range(4, 201)))
RANDOM = np.random.default_rng(0)
Mask = NDArray[np.uint8]


def blobs(height: int, width: int, classes: int) -> Mask:
    """Smooth regions with holes, islands and contact at corners."""
    coarse = RANDOM.integers(0, classes + 1, (-(-height // 3), -(-width // 3)))
    mask = np.kron(coarse, np.ones((3, 3))).astype(np.uint8)[:height, :width]
    speckled = RANDOM.random(mask.shape) < 0.1
    mask[speckled] = RANDOM.integers(0, classes + 1, int(speckled.sum()))
    return mask


MASKS: dict[str, Mask] = {
    "folder/odd size": blobs(37, 53, 3),
    "empty": np.zeros((5, 9), np.uint8),
    "all of it": np.full((7, 3), 2, np.uint8),
    "one pixel": np.array([[1]], np.uint8),
    "border": np.pad(np.zeros((6, 8), np.uint8), 1, constant_values=3),
    "200 classes": RANDOM.permutation(np.arange(201 * 2) // 2).astype(np.uint8).reshape(6, 67),
    "übergröße 猫": blobs(64, 40, 200),
    "unlabelled": np.array([[0, 255, 1], [255, 2, 2]], np.uint8),
}


def item(name: str, mask: Mask) -> Item:
    confidence = {int(number): 0.5 + number / 1000 for number in np.unique(mask)}
    rgb = RANDOM.integers(0, 255, (*mask.shape, 3)).astype(np.uint8)
    levels = {1: (mask * 3).astype(np.uint8), 2: np.zeros_like(mask)}
    return Item(name, f"{name}.jpg", *mask.shape, NAMES, mask, rgb, levels, confidence, 0.75)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of all masks in all formats; entries pass through JSON, as in records."""
    folder = tmp_path_factory.mktemp("formats")
    for form in FORMATS.values():
        entries = [json.loads(json.dumps(form.write(item(name, mask), folder))) for name, mask in MASKS.items()]
        assert all(path.exists() for name in MASKS for path in form.files(name, folder))
        if isinstance(form, Collected):
            form.join(iter(entries), NAMES, folder)
    return folder


def labelled(mask: Mask) -> Mask:
    """The mask as formats without unlabelled pixels give it."""
    return np.where(mask == 255, 0, mask).astype(np.uint8)


@pytest.mark.parametrize("name", MASKS)
def test_png(written: Path, name: str) -> None:
    with Image.open(written / f"masks/{name}.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), MASKS[name])
        assert np.array_equal(np.array(picture.getpalette()).reshape(-1, 3), voc_palette())


def test_png_detects_values_that_change_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "putpalette", lambda image, palette: image.paste(1, (0, 0, 1, 1)))
    with pytest.raises(PipelineError, match=r"i\.png: the values read back differ"):
        write_png(tmp_path / "i.png", np.array([[0, 2]], np.uint8), voc_palette())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("file", ["coco_rle.json", "coco_polygons.json"])
def test_coco(written: Path, file: str, name: str) -> None:
    coco = COCO(written / file)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(NAMES[1:])
    (image,) = (image for image in coco.dataset["images"] if image["file_name"] == f"{name}.jpg")
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
        part = coco.annToMask(annotation) > 0
        mask[part] = annotation["category_id"]
        assert annotation["area"] == part.sum()
        assert annotation["bbox"] == coco_mask.toBbox(coco_mask.encode(np.asfortranarray(part, np.uint8))).tolist()
        assert annotation["score"] == pytest.approx(0.5 + annotation["category_id"] / 1000)
    assert np.array_equal(mask, labelled(MASKS[name]))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_polygons_of_any_mask(height: int, width: int, percent: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < percent / 100
    loops = polygons(mask)
    if not mask.any():
        assert loops == []
        return
    code = coco_mask.merge(coco_mask.frPyObjects(loops, height, width))
    assert np.array_equal(coco_mask.decode(code), mask)


def read_cvat(path: Path) -> Iterator[tuple[str, Mask]]:
    """Masks by image name, as the specification of 'CVAT for images 1.1' describes the code."""
    root = ElementTree.parse(path).getroot()
    assert root.findtext("version") == "1.1"
    labels = [label.findtext("name") for label in root.findall("meta/task/labels/label")]
    for image in root.findall("image"):
        mask = np.zeros((int(image.attrib["height"]), int(image.attrib["width"])), np.uint8)
        for shape in image.findall("mask"):
            left, top, width, height = (int(shape.attrib[key]) for key in ("left", "top", "width", "height"))
            counts = [int(count) for count in shape.attrib["rle"].split(",")]
            flat = np.concatenate([np.full(count, number % 2) for number, count in enumerate(counts)])
            inside = flat.reshape(height, width) > 0
            mask[top : top + height, left : left + width][inside] = labels.index(shape.attrib["label"]) + 1
        yield image.attrib["name"], mask


def test_cvat(written: Path) -> None:
    read = dict(read_cvat(written / "cvat.xml"))
    assert read.keys() == {f"{name}.jpg" for name in MASKS}
    for name, mask in MASKS.items():
        assert np.array_equal(read[f"{name}.jpg"], labelled(mask)), name


def decode_brush(code: list[int]) -> NDArray[np.uint8]:
    """Decode rle-pack, as its public description says; runs and literals."""
    bits = "".join(f"{byte:08b}" for byte in code)
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        is_run, length = take(1), take(sizes[take(2)]) + 1
        values += [take(word)] * length if is_run else [take(word) for _ in range(length)]
    return np.array(values, np.uint8)


def test_labelstudio(written: Path) -> None:
    tasks = json.loads((written / "labelstudio.json").read_text("utf-8"))
    assert len(tasks) == len(MASKS)
    for task, (name, expected) in zip(tasks, MASKS.items(), strict=True):
        assert unquote(task["data"]["image"]) == f"/data/local-files/?d={name}.jpg"
        (prediction,) = task["predictions"]
        assert prediction["score"] == 0.75
        mask = np.zeros(expected.shape, np.uint8)
        for region in prediction["result"]:
            assert (region["original_height"], region["original_width"]) == expected.shape
            rgba = decode_brush(region["value"]["rle"]).reshape(*expected.shape, 4)
            (label,) = region["value"]["brushlabels"]
            mask[rgba[..., 3] > 0] = NAMES.index(label)
        assert np.array_equal(mask, labelled(expected)), name
    config = ElementTree.parse(written / "labelstudio_config.xml").getroot()
    assert [label.attrib["value"] for label in config.iter("Label")] == list(NAMES[1:])
    names = {region["from_name"] for task in tasks for region in task["predictions"][0]["result"]}
    assert names == {brush.attrib["name"] for brush in config.iter("BrushLabels")}


@pytest.mark.parametrize("size", [(300, 400), (1, 16384), (1, 16385)])
def test_brush_codes_of_long_runs(size: tuple[int, int]) -> None:
    """A run of more than 65536 values has several parts."""
    for mask in (np.ones(size, np.bool_), np.zeros(size, np.bool_), RANDOM.random(size) < 0.001):
        assert np.array_equal(decode_brush(brush_rle(mask)), np.repeat(mask.reshape(-1), 4) * 255)


def test_csv(written: Path) -> None:
    with (written / "summary.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    by_photo = {photo: list(group) for photo, group in groupby(rows, lambda row: row["photo"])}
    assert by_photo.keys() == {f"{name}.jpg" for name in MASKS}
    for name, mask in MASKS.items():
        counts = {row["class"]: int(row["pixels"]) for row in by_photo[f"{name}.jpg"]}
        expected = {"unlabelled" if n == 255 else NAMES[n]: int((mask == n).sum()) for n in np.unique(mask)}
        assert counts == expected
        assert sum(float(row["share"]) for row in by_photo[f"{name}.jpg"]) == pytest.approx(1, abs=1e-3)
    assert by_photo["empty.jpg"] == [
        {"photo": "empty.jpg", "class": "background", "pixels": "45", "share": "1.0", "confidence": "0.5"}
    ]


@pytest.mark.parametrize("name", MASKS)
def test_probabilities(written: Path, name: str) -> None:
    files = sorted((written / "probabilities" / name).iterdir())
    expected = {"1_Füße & _Schuhe_.png": MASKS[name] * 3} if (MASKS[name] * 3).any() else {}
    assert [file.name for file in files] == list(expected)
    for file in files:
        with Image.open(file) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), expected[file.name])


@pytest.mark.parametrize("name", MASKS)
def test_overlay(written: Path, name: str) -> None:
    with Image.open(written / f"overlays/{name}.jpg") as picture:
        assert picture.mode == "RGB"
        assert picture.size == MASKS[name].shape[::-1]


def test_an_overlay_shows_outlines_and_names() -> None:
    from wsss.formats.overlay import draw

    mask = np.zeros((300, 400), np.uint8)
    mask[50:250, 60:200], mask[100:280, 210:390] = 1, 2
    photo = np.full((300, 400, 3), 100, np.uint8)
    shown = draw(photo, mask, ("background", "cat", "horse"))
    palette = voc_palette()
    assert (shown[mask == 0] == 100).all()
    for number, (rows, columns) in enumerate((((50, 249), (60, 199)), ((100, 279), (210, 389))), 1):
        for row, column in zip(rows, columns, strict=True):
            assert shown[row, column].tolist() == palette[number].tolist()
        inside = mask == number
        assert (shown[inside] > 200).all(1).sum() > 20  # white letters
    assert np.array_equal(draw(photo, np.zeros_like(mask), ("background",)), photo)


def test_no_photo_at_all_gives_valid_files(tmp_path: Path) -> None:
    for form in FORMATS.values():
        if isinstance(form, Collected):
            form.join(iter([]), NAMES, tmp_path)
    assert json.loads((tmp_path / "labelstudio.json").read_text("utf-8")) == []
    assert COCO(tmp_path / "coco_rle.json").getImgIds() == []
    assert dict(read_cvat(tmp_path / "cvat.xml")) == {}
