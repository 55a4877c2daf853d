"""The census of a dataset: counts, tags against masks, equal pictures, and what is refused or remarked."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.config import params as parameters
from pipeline.config.dataset import Dataset
from pipeline.data import census
from pipeline.data.agreement import Agreement, contradictions
from pipeline.data.build_index import build_index
from pipeline.data.census import Census
from pipeline.errors import PipelineError
from pipeline.workflow.graph import Graph
from tests.voc_tree import make_tree, write_mask

MINI = Path("../shared/data/voc12_mini")
FULL_SIZE = Path("../shared/data/voc12_fullsize_48")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return tree(tmp_path / "voc", train=9, evaluation=6)


def tree(root: Path, **options: Any) -> Dataset:
    """A dataset whose pictures, which do not matter here, are not alike."""
    dataset = make_tree(root, **options)
    random = np.random.default_rng(1)
    for path in sorted((root / "JPEGImages").iterdir()):
        cv2.imwrite(str(path), cv2.resize(random.integers(0, 256, (4, 4, 3)).astype(np.uint8), (32, 24)))
    return dataset


def refused(dataset: Dataset) -> list[str]:
    with pytest.raises(PipelineError) as caught:
        build_index(dataset)
    return list(caught.value.lines)


def remarks(dataset: Dataset) -> Sequence[str]:
    return build_index(dataset).census.remarks


def change_masks(dataset: Dataset, change: Any, after: str = "") -> None:
    for path in sorted((Path(dataset.root) / "SegmentationClass").iterdir()):
        if path.stem <= after:
            continue
        with Image.open(path) as picture:
            mask = np.array(picture)
        write_mask(path, change(mask))


def change_tags(dataset: Dataset, change: Any) -> None:
    path = Path(dataset.root) / "tags.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_counts_by_class_and_split(dataset: Dataset) -> None:
    counted = build_index(dataset).census
    train, evaluation = counted.splits["train"], counted.splits["evaluation"]
    assert (train.images, train.tagged, train.masked) == (9, 9, 9)
    assert (evaluation.images, evaluation.tagged, evaluation.masked) == (6, 6, 6)
    assert train.median == (32, 24)
    tags = json.loads((Path(dataset.root) / "tags.json").read_text())
    for k, entry in enumerate(counted.classes, 1):
        expected = (
            sum(k in tags[f"img_{n:03d}"] for n in range(9)),
            sum(k in tags[f"img_{n:03d}"] for n in range(9, 15)),
        )
        assert (entry.tags["train"], entry.tags["evaluation"]) == expected
        assert (entry.masks["train"], entry.masks["evaluation"]) == expected
        assert (entry.both, entry.tag_only, entry.mask_only) == (sum(expected), 0, 0)
    assert (counted.compared, counted.agreeing) == (15, 15)
    assert not counted.remarks


def test_the_table_as_text(dataset: Dataset) -> None:
    lines = build_index(dataset).census.text().splitlines()
    assert lines[:4] == [
        "train: 9 images of 32x24 pixels",
        "evaluation: 6 images of 32x24 pixels",
        "tags: tags.json (JSON {id: [class]})",
        "tags and masks: equal in 15 of 15 images (100.0 %)",
    ]
    assert lines[5].split() == [word for heading in census.HEADINGS for word in heading.split()]
    assert lines[6].split() == ["all", "images", "9", "9", "6", "6", "15"]
    assert [line.split()[:8] for line in lines[7:]] == [
        ["cat", "4", "4", "3", "3", "7", "0", "0"],
        ["dog", "4", "4", "3", "3", "7", "0", "0"],
        ["bird", "5", "5", "3", "3", "8", "0", "0"],
    ]


def test_the_census_is_read_back(dataset: Dataset, tmp_path: Path) -> None:
    counted = build_index(dataset).census
    path = tmp_path / "dataset.json"
    path.write_text(counted.dump())
    assert census.read(path).text() == counted.text()
    path.write_text("{}")
    with pytest.raises(PipelineError, match="not a census"):
        census.read(path)


def test_a_dataset_without_masks_or_tags_of_evaluation_images(dataset: Dataset) -> None:
    change_tags(dataset, lambda tags: {name: ids for name, ids in tags.items() if name < "img_009"})
    counted = build_index(replace(dataset, masks=None)).census
    assert counted.compared == 0
    assert counted.rows()[0] == ["all images", "9", "-", "0", "-", "-", "", "", "-"]
    assert not counted.remarks


def test_masks_that_count_from_zero(dataset: Dataset) -> None:
    change_masks(dataset, lambda mask: np.where(mask % 255 > 0, mask - 1, 255))
    lines = refused(dataset)
    assert [line.split(": ")[1] for line in lines] == ["class cat", "class dog", "class bird"]
    for line in lines:
        assert "ids look shifted by one: the masks count classes from 0; add 1" in line
        assert line.endswith("or set dataset.contradictions to warn")
    warned = remarks(replace(dataset, contradictions="warn"))
    assert len([line for line in warned if "ids look shifted by one" in line]) == 3


def test_masks_that_count_from_two(dataset: Dataset) -> None:
    (Path(dataset.root) / "classes.txt").write_text("cat\ndog\nbird\ncow\n")
    change_masks(dataset, lambda mask: np.where(mask % 255 > 0, mask + 1, mask))
    lines = refused(dataset)
    assert len(lines) == 3
    assert all("the masks count classes from 2; subtract 1" in line for line in lines)


def test_masks_of_one_class_that_hold_255(tmp_path: Path) -> None:
    dataset = tree(tmp_path / "voc", train=6, evaluation=3, classes=("crack",))
    change_masks(dataset, lambda mask: np.where(mask > 0, 255, 0))
    assert refused(dataset) == [
        f"{dataset.root}/SegmentationClass: class crack: none of the 9 masks of images tagged with it holds its id 1; "
        "the masks hold only 0 and 255, and 255 means ignore; save the object as 1 in the masks, "
        "or set dataset.contradictions to warn"
    ]


def test_masks_of_several_classes_that_hold_255(dataset: Dataset) -> None:
    change_masks(dataset, lambda mask: np.where(mask > 0, 255, 0))
    lines = refused(dataset)
    assert len(lines) == 3
    assert all("the masks hold only 0 and 255, and 255 means ignore" in line for line in lines)


def test_empty_masks(dataset: Dataset) -> None:
    change_masks(dataset, np.zeros_like)
    assert len(refused(dataset)) == 3


def test_masks_with_two_classes_exchanged(tmp_path: Path) -> None:
    dataset = tree(tmp_path / "voc", train=20, evaluation=10, classes=("cat", "dog", "bird", "cow", "fish"))
    change_masks(dataset, lambda mask: np.array([0, 1, 4, 3, 2, 5, *range(6, 256)])[mask])
    lines = refused(dataset)
    assert len(lines) == 2
    assert "class dog: " in lines[0]
    assert "the masks hold 4 (cow) instead; give masks, tags and dataset.classes the same order" in lines[0]
    assert "the masks hold 2 (dog) instead" in lines[1]


def test_masks_of_other_images(tmp_path: Path) -> None:
    dataset = tree(tmp_path / "voc", train=60, evaluation=30, classes=("cat", "dog", "bird", "cow", "fish"))
    folder = Path(dataset.root) / "SegmentationClass"
    masks = [path.read_bytes() for path in sorted(folder.iterdir())]
    order = np.random.default_rng(0).permutation(len(masks))
    for path, number in zip(sorted(folder.iterdir()), order, strict=True):
        path.write_bytes(masks[number])
    (line,) = refused(dataset)
    assert "of the 135 tags of their images; they look like masks of other images: correct their names" in line


def test_single_differences_are_remarked(dataset: Dataset) -> None:
    change_tags(dataset, lambda tags: tags | {"img_000": [1, 3], "img_001": [2]})
    (line,) = remarks(dataset)
    assert line == (
        "tags and masks differ in 2 of 15 images: img_000 (the mask lacks bird); img_001 (the tags lack bird)"
    )


def test_classes_without_a_training_image(dataset: Dataset) -> None:
    (Path(dataset.root) / "classes.txt").write_text("cat\ndog\nbird\ncow\n")
    root = Path(dataset.root)
    for number in range(9):
        mask = np.full((24, 32), 1 + number % 2 * 2)
        write_mask(root / f"SegmentationClass/img_{number:03d}.png", mask)
        change_tags(dataset, lambda tags, n=number: tags | {f"img_{n:03d}": [1 + n % 2 * 2]})
    counted = build_index(dataset).census
    assert counted.untaught == ["dog", "cow"]
    assert counted.remarks == [
        "no training image is tagged with dog (3 in evaluation); the IoU of such a class can only be 0, which lowers "
        "the mean",
        "no image of either split shows cow",
    ]


def test_a_class_that_no_evaluation_mask_holds(dataset: Dataset) -> None:
    change_masks(dataset, lambda mask: np.where(mask == 3, 255, mask), after="img_008")
    (differ, unseen) = remarks(dataset)
    assert differ.startswith("tags and masks differ in 3 of 15 images: img_011 (the mask lacks bird);")
    assert unseen == "no mask of an evaluation image holds bird"


def test_a_class_in_every_training_image(tmp_path: Path) -> None:
    dataset = tree(tmp_path / "voc", classes=("crack",))
    (line,) = remarks(dataset)
    assert line == "every training image is tagged with crack; a classifier needs images without it"


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_masks_of_a_part_of_the_images(dataset: Dataset, kept: int) -> None:
    for path in sorted((Path(dataset.root) / "SegmentationClass").iterdir())[kept:9]:
        path.unlink()
    counted = build_index(dataset).census
    assert counted.compared == counted.agreeing == kept + 6
    assert not counted.remarks


def test_few_images_of_a_class_may_lack_it_in_their_masks(dataset: Dataset) -> None:
    """Four tiny objects that the masks leave out are no contradiction; a fifth is."""
    cats = [1, 2, 3, 4]
    tagged = np.zeros((20, 3), bool)
    tagged[:, 2] = True
    tagged[cats, 1] = True
    held = np.zeros((20, 256), bool)
    held[:, [0, 2, 255]] = True
    assert contradictions(Agreement(tagged, held), ["cat", "dog"]) == []
    tagged[5, 1] = True
    (line,) = contradictions(Agreement(tagged, held), ["cat", "dog"])
    assert line.startswith(
        "class cat: none of the 5 masks of images tagged with it holds its id 1; the masks hold 0, 2"
    )


def test_the_same_picture_in_both_splits(dataset: Dataset) -> None:
    """Also under another file format: the pixels are compared, not the bytes."""
    images = Path(dataset.root) / "JPEGImages"
    (images / "img_010.jpg").write_bytes((images / "img_000.jpg").read_bytes())
    cv2.imwrite(str(images / "img_011.png"), cv2.imread(str(images / "img_001.jpg")))
    (images / "img_011.jpg").unlink()
    listed = f"{dataset.root}/ImageSets/Segmentation/val.txt"
    fix = "take it out, or set dataset.contradictions to warn"
    assert refused(dataset) == [
        f"{listed}: img_010 is the same picture as training image img_000; {fix}",
        f"{listed}: img_011 is the same picture as training image img_001; {fix}",
    ]
    warned = remarks(replace(dataset, contradictions="warn"))
    assert f"{listed}: img_010 is the same picture as training image img_000; take it out" in warned


@pytest.mark.skipif(not FULL_SIZE.is_dir(), reason=f"no VOC images at {FULL_SIZE}")
class TestRealPictures:
    """Datasets of eight VOC images, of which the last two are copies of the first two."""

    def dataset(self, root: Path, copies: Sequence[Any], evaluation: int) -> Census:
        (root / "JPEGImages").mkdir(parents=True)
        names = sorted(path.stem for path in (FULL_SIZE / "JPEGImages").iterdir())[:6]
        for name in names:
            (root / f"JPEGImages/{name}.jpg").write_bytes((FULL_SIZE / f"JPEGImages/{name}.jpg").read_bytes())
        for number, change in enumerate(copies):
            pixels = change(cv2.imread(str(FULL_SIZE / f"JPEGImages/{names[number]}.jpg")))
            cv2.imwrite(str(root / f"JPEGImages/copy{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 50])
            names.append(f"copy{number}")
        split = len(names) - evaluation
        (root / "train.txt").write_text("\n".join(names[:split]))
        (root / "val.txt").write_text("\n".join(names[split:]))
        (root / "tags.json").write_text(json.dumps({name: [1 + n % 2] for n, name in enumerate(names)}))
        (root / "classes.txt").write_text("a\nb")
        return build_index(Dataset(str(root), "classes.txt", train="train.txt", evaluation="val.txt")).census

    @pytest.mark.parametrize(
        "change",
        [
            lambda pixels: pixels,
            lambda pixels: cv2.resize(pixels, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA),
            lambda pixels: cv2.resize(pixels, (224, 224)),
            lambda pixels: pixels[:, ::-1],
        ],
        ids=["encoded again", "reduced", "squeezed", "mirrored"],
    )
    def test_near_copies_are_found(self, tmp_path: Path, change: Any) -> None:
        names = sorted(path.stem for path in (FULL_SIZE / "JPEGImages").iterdir())
        across = self.dataset(tmp_path / "across", [change, change], 2).remarks
        assert list(across) == [
            "2 training images look like evaluation images (encoded again, resized or mirrored): "
            f"{names[0]} = copy0, {names[1]} = copy1; look at them"
        ]
        within = self.dataset(tmp_path / "within", [change, change, lambda pixels: 255 - pixels], 1).remarks
        assert list(within) == ["2 pairs of train images look alike (encoded again, resized or mirrored)"]


@pytest.mark.skipif(not MINI.is_dir(), reason=f"no VOC images at {MINI}")
def test_real_masks_agree_with_real_tags_and_no_pictures_are_alike() -> None:
    counted = build_index(Dataset(str(MINI), masks="SegmentationClass"), threads=2).census
    assert (counted.compared, counted.agreeing) == (1449, 1448)
    assert counted.remarks == ["tags and masks differ in 1 of 1449 images: 2008_005245 (the tags lack person)"]


def test_only_the_report_reads_the_census() -> None:
    """A training that depended on it would depend on masks."""
    graph = Graph(parameters.load([Path("params.yaml")]))
    (file,) = (path for path in graph.find("index").outputs.values() if path.name == "dataset.json")
    assert {job.stage for job in graph.jobs if file in job.inputs.values()} == {"first_report", "report"}


def test_the_index_does_not_depend_on_the_counts(dataset: Dataset) -> None:
    """It holds no number that comes from the pixels of a mask, only the hash of its file."""
    first = build_index(dataset)
    change_masks(dataset, lambda mask: np.where(mask == 3, 255, mask), after="img_008")
    second = build_index(dataset)
    assert first.census != second.census
    for name, entry in second.index["images"].items():
        assert {**entry, "mask_sha256": ""} == {**first.index["images"][name], "mask_sha256": ""}
