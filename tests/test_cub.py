"""Conversion of CUB-200-2011, with a small generated folder in its layout."""

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

from pipeline.config.dataset import Dataset
from pipeline.config.params import load
from pipeline.data import cub as module
from pipeline.data.build_index import build_index
from pipeline.data.cub import PUBLISHED, Counts, convert
from pipeline.errors import PipelineError
from pipeline.workflow.freshness import stale
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import cub, index
from tests.project import ROOT, link_code, run_stages
from tests.voc_tree import minimal_params

SOURCE, DATA = Path("CUB_200_2011"), Path("data/cub")
NAMES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
COUNT = 9  # images: class n mod 3 + 1; every third is a test image
SIZE = (24, 32)


def make_source(count: int = COUNT, names: list[str] = NAMES) -> None:
    """Create the archive in the working folder."""
    random = np.random.default_rng(0)
    lines: dict[str, list[str]] = {"images": [], "train_test_split": [], "image_class_labels": [], "bounding_boxes": []}
    for number in range(1, count + 1):
        class_id = (number - 1) % len(names) + 1
        path = f"{names[class_id - 1]}/{names[class_id - 1][4:]}_{number:04d}_{796111 + number}.jpg"
        (SOURCE / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 80, (*SIZE, 3)).astype(np.uint8)
        left, top = random.integers(1, 8, 2).tolist()
        pixels[top : top + 12, left : left + 16, class_id % 3] += 150
        cv2.imwrite(str(SOURCE / "images" / path), pixels)
        lines["images"].append(f"{number} {path}")
        lines["train_test_split"].append(f"{number} {int(number % 3 > 0)}")
        lines["image_class_labels"].append(f"{number} {class_id}")
        lines["bounding_boxes"].append(f"{number} {left}.0 {top}.0 16.0 12.0")
    lines["classes"] = [f"{number} {name}" for number, name in enumerate(names, 1)]
    for file, content in lines.items():
        (SOURCE / f"{file}.txt").write_text("".join(f"{line}\n" for line in content))
    (SOURCE / "README").write_text("The Caltech-UCSD Birds-200-2011 Dataset\n")
    (SOURCE / "attributes").mkdir()


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_source()


def paths() -> list[str]:
    return [line.split()[1] for line in (SOURCE / "images.txt").read_text().splitlines()]


def change(file: str, line: int, text: str | None) -> None:
    """Replace a line, counted from 1, or remove it."""
    path = SOURCE / file
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("".join(f"{line}\n" for line in lines))


def test_its_split_classes_boxes_and_images() -> None:
    assert convert(SOURCE, DATA) == Counts(3, 6, 3)
    ids = [path.removesuffix(".jpg") for path in paths()]
    lists = {split: (DATA / f"ImageSets/Segmentation/{split}.txt").read_text().split() for split in ("train", "val")}
    assert lists == {"train": [ids[n] for n in (0, 1, 3, 4, 6, 7)], "val": [ids[n] for n in (2, 5, 8)]}
    assert (DATA / "classes.txt").read_text().splitlines() == [
        *("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
    ]
    assert json.loads((DATA / "tags.json").read_text()) == {name: [n % 3 + 1] for n, name in enumerate(ids)}
    given = [line.split() for line in (SOURCE / "bounding_boxes.txt").read_text().splitlines()]
    boxes = {ids[n]: [[3, *map(float, given[n][1:])]] for n in (2, 5, 8)}
    assert json.loads((DATA / "boxes.json").read_text()) == boxes
    for path in paths():
        assert os.path.samefile(DATA / "JPEGImages" / path, SOURCE / "images" / path)


def test_the_index_accepts_it_and_has_the_boxes_of_test_images_alone() -> None:
    convert(SOURCE, DATA)
    found = build_index(Dataset(root=str(DATA), classes="classes.txt", boxes="boxes.json")).index
    assert len(found["splits"]["train"]) == 6
    with_boxes = [name for name, entry in found["images"].items() if "boxes" in entry]
    assert with_boxes == found["splits"]["evaluation"]
    left, top, width, height = (
        float(x) for x in (SOURCE / "bounding_boxes.txt").read_text().splitlines()[2].split()[1:]
    )
    assert found["images"][with_boxes[0]]["boxes"] == [[3, left, top, left + width, top + height]]


def test_two_hundred_classes_work_as_class_ids() -> None:
    shutil.rmtree(SOURCE)
    names = [f"{number:03d}.Bird_{number}" for number in range(1, 201)]
    make_source(600, names)
    assert convert(SOURCE, DATA) == Counts(200, 400, 200)
    found = build_index(Dataset(root=str(DATA), classes="classes.txt", boxes="boxes.json")).index
    assert len(found["classes"]) == 200
    assert {box[0] for entry in found["images"].values() for box in entry.get("boxes", ())} <= set(range(1, 201))
    assert max(tag for entry in found["images"].values() for tag in entry["tags"]) == 200


AGAIN = "unpack CUB_200_2011.tgz again"
TABLES = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "bounding_boxes.txt", "classes.txt")
FAULTS: list[tuple[Callable[[], Any], str]] = [
    *((lambda name=name: (SOURCE / name).unlink(), f"{name}: missing; {AGAIN}") for name in TABLES),
    *((lambda name=name: (SOURCE / name).write_text(""), f"{name}: is empty; {AGAIN}") for name in TABLES[1:]),
    (
        lambda: change("bounding_boxes.txt", 4, None),
        f"bounding_boxes.txt: lacks 1 image ids that images.txt has (first: 4), 8 ids in all; {AGAIN}",
    ),
    (
        lambda: change("train_test_split.txt", 2, "77 1"),
        f"train_test_split.txt: lacks 1 image ids that images.txt has (first: 2), 9 ids in all; {AGAIN}\n"
        f"train_test_split.txt: has 1 image ids that images.txt lacks (first: 77), 9 ids in all; {AGAIN}",
    ),
    (
        lambda: change("train_test_split.txt", 2, "2 2"),
        f"train_test_split.txt: line 2 is not image id and 0 or 1: '2 2'; {AGAIN}\n"
        f"train_test_split.txt: lacks 1 image ids that images.txt has (first: 2), 8 ids in all; {AGAIN}",
    ),
    (
        lambda: change("bounding_boxes.txt", 2, "2 1.0 x 3.0 4.0"),
        f"bounding_boxes.txt: line 2 is not image id and four numbers: '2 1.0 x 3.0 4.0'; {AGAIN}\n"
        f"bounding_boxes.txt: lacks 1 image ids that images.txt has (first: 2), 8 ids in all; {AGAIN}",
    ),
    (
        lambda: change("image_class_labels.txt", 3, "2 2"),
        f"image_class_labels.txt: line 3 repeats the id 2; {AGAIN}\n"
        f"image_class_labels.txt: lacks 1 image ids that images.txt has (first: 3), 8 ids in all; {AGAIN}",
    ),
    (
        lambda: change("image_class_labels.txt", 3, "3 9"),
        f"image_class_labels.txt: image 3 has the class id 9, which classes.txt lacks; {AGAIN}",
    ),
    (
        lambda: change("image_class_labels.txt", 3, "3 1"),
        f"image_class_labels.txt: image 3, {NAMES[2]}/Sooty_Albatross_0003_796114.jpg, has the class {NAMES[0]}, but "
        f"lies in another folder; {AGAIN}",
    ),
    (
        lambda: change("classes.txt", 3, "4 003.Sooty_Albatross"),
        f"classes.txt: its 3 ids are not 1, 2, 3, ... up to 254 at most; {AGAIN}\n"
        + "\n".join(
            f"image_class_labels.txt: image {n} has the class id 3, which classes.txt lacks; {AGAIN}" for n in (3, 6, 9)
        ),
    ),
    (
        lambda: change("images.txt", 2, "2 ../../secret.jpg"),
        f"image_class_labels.txt: image 2, ../../secret.jpg, has the class {NAMES[1]}, but lies in another folder; "
        f"{AGAIN}\n"
        f"images.txt: image 2 is '../../secret.jpg', not FOLDER/NAME.jpg; {AGAIN}",
    ),
    (
        lambda: (SOURCE / "images" / paths()[4]).unlink(),
        f"images/{NAMES[1]}/Laysan_Albatross_0005_796116.jpg: missing, but listed in CUB_200_2011/images.txt; {AGAIN}",
    ),
    (
        lambda: os.truncate(SOURCE / "images" / paths()[0], 500),
        f"images/{NAMES[0]}/Black_footed_Albatross_0001_796112.jpg: truncated JPEG; copy or download it again",
    ),
    (
        lambda: change("bounding_boxes.txt", 5, "5 17.5 0 16 4"),
        f"bounding_boxes.txt: the box 17.5 0 16 4 of image 5 lies outside of its image of 32x24 pixels; {AGAIN}",
    ),
    (
        lambda: change("bounding_boxes.txt", 5, "5 4 4 0 4"),
        f"bounding_boxes.txt: the box 4 4 0 4 of image 5 has no area; {AGAIN}",
    ),
    (
        lambda: change("bounding_boxes.txt", 5, "5 nan 4 4 4"),
        f"bounding_boxes.txt: the box nan 4 4 4 of image 5 has no area; {AGAIN}",
    ),
]


@pytest.mark.parametrize(("damage", "said"), FAULTS)
def test_a_damaged_archive_is_refused_and_nothing_is_written(damage: Callable[[], Any], said: str) -> None:
    damage()
    with pytest.raises(PipelineError) as caught:
        convert(SOURCE, DATA)
    assert list(caught.value.lines) == [f"CUB_200_2011/{line}" for line in said.split("\n")]
    assert not DATA.exists()


def test_all_faults_are_named_at_once() -> None:
    (SOURCE / "images" / paths()[4]).unlink()
    os.truncate(SOURCE / "images" / paths()[0], 500)
    (SOURCE / "classes.txt").unlink()
    change("image_class_labels.txt", 3, "three 3")
    change("bounding_boxes.txt", 2, "2 25 4 16 4")
    change("train_test_split.txt", 9, None)
    with pytest.raises(PipelineError) as caught:
        convert(SOURCE, DATA)
    assert [line.split(":")[0].rpartition("/")[2] for line in caught.value.lines] == [
        *("classes.txt", "image_class_labels.txt", "train_test_split.txt", "image_class_labels.txt"),
        *("Black_footed_Albatross_0001_796112.jpg", "bounding_boxes.txt", "Laysan_Albatross_0005_796116.jpg"),
    ]


def test_a_box_may_exceed_its_image_by_rounding() -> None:
    change("bounding_boxes.txt", 3, "3 -0.4 0.0 32.9 24.6")
    convert(SOURCE, DATA)
    found = build_index(Dataset(root=str(DATA), classes="classes.txt", boxes="boxes.json")).index
    assert next(entry["boxes"] for entry in found["images"].values() if "boxes" in entry) == [[3, 0, 0, 32, 24]]


def test_another_dataset_is_left_alone() -> None:
    kept = DATA / "ImageSets/Segmentation/train.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine\n")
    with pytest.raises(
        PipelineError, match=r"another dataset; choose another dataset\.root, or set dataset\.cub to null"
    ):
        convert(SOURCE, DATA)
    assert kept.read_text() == "mine\n"


def test_the_published_numbers_need_no_note() -> None:
    assert PUBLISHED.text() == "200 classes, 5994 training and 5794 test images"
    assert (
        Counts(3, 6, 3).text()
        == f"3 classes, 6 training and 3 test images; note: as published, CUB-200-2011 has {PUBLISHED.text()}"
    )


@pytest.fixture
def raw() -> dict[str, Any]:
    """Params of a run on the converted dataset, also written to params.yaml."""
    link_code(Path())
    params = minimal_params(Dataset(root=str(DATA), classes="classes.txt", boxes="boxes.json", cub=str(SOURCE)))
    params |= {"boxes": {"cam": {"model": "classifiers/base"}}, "rows": []}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return params


def stages_behind() -> set[str]:
    return {job.label for job in stale(Graph(load([Path("params.yaml")])))}


def test_the_stages_up_to_the_scores(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(["params.yaml"])
    said = "cub: 3 classes, 6 training and 3 test images; note: as published, CUB-200-2011 has "
    assert said in capsys.readouterr().out
    scores = json.loads(Path("results/test/box_scores/cam/scores.json").read_text())
    assert (scores["images"], scores["pairs"], scores["truth"]) == (3, 3, "dataset.boxes")
    assert stages_behind() == set()
    change("bounding_boxes.txt", 3, "3 2 2 10 10")
    assert {"cub", "index", "box_scores cam"} <= stages_behind()


def test_killed_it_starts_over(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        if target.name.endswith("_0005_796116.jpg"):
            raise KeyboardInterrupt
        shutil.copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            run("cub", cub.main, [])
    assert "cub" in stages_behind()
    with pytest.raises(SystemExit):
        run("index", index.main, [])
    run("cub", cub.main, [])
    run("index", index.main, [])
    assert not {"cub", "index"} & stages_behind()


def test_the_profile_has_the_papers_settings() -> None:
    files = [ROOT / "params.yaml", ROOT / "profiles/voc2012.yaml", ROOT / "profiles/cub.yaml"]
    graph = Graph(load(files))
    assert graph.find("cub").inputs == {"cub": Path("data/CUB_200_2011")}
    for name in ("base", "oaa_localization"):
        block = graph.params.classifiers[name]
        assert (block.backbone.name, block.backbone.weights) == ("vgg16", "imagenet")
        assert (block.training.batch_size * block.training.accumulation, block.training.lr) == (5, 0.001)
    assert graph.params.classifiers["oaa_localization"].method.name == "oaa_localization"
    assert {job.name for job in graph.jobs if job.stage == "box_scores"} == {"cam", "oaa_localization"}
    assert not [job for job in graph.jobs if job.stage in ("segmentation", "prediction", "download")]
