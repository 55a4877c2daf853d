"""Images with single tags in a separate folder: their index, faults, staleness, and the need for masks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from pipeline.config.dataset import Dataset
from pipeline.config.params import load
from pipeline.data.build_index import build_index
from pipeline.data.images import read_rgb
from pipeline.data.index import Index, write
from pipeline.errors import PipelineError
from pipeline.report import protocol
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.workflow.freshness import stale
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import ground_truth, index, mixture, segmentation
from tests.project import link_code
from tests.voc_tree import image_of, make_tree, minimal_params

LISTED = ["img_000", "img_001", "img_002", "img_003"]
EXTRA = ["cat_9", "zebra_1", "a_bird"]  # sorted by class id, then by stem: cat 1, dog 2, bird 3


def picture(path: Path, size: tuple[int, int] = (20, 28)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(path.name))
    cv2.imwrite(str(path), random.integers(0, 256, (*size, 3)).astype(np.uint8))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Four training images in data/, and more/ with two cats, a bird and files to be skipped."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    tree = make_tree(Path("data"))
    for name in ("cat/zebra_1.jpg", "cat/cat_9.PNG", "bird/a_bird.jpeg"):
        picture(Path("more", name))
        saliency = Path("data/Saliency", Path(name).stem).with_suffix(".png")
        cv2.imwrite(str(saliency), np.full((20, 28), 200, np.uint8))
    Path("more/README.txt").write_text("no folder, no class")
    Path("more/cat/notes.txt").write_text("no image")
    Path("more/cat/._zebra_1.jpg").write_bytes(b"hidden")
    return replace(tree, extra="more")


def test_extra_images_follow_the_training_list_with_their_folders_tag(dataset: Dataset) -> None:
    found = build_index(dataset, Path("data/Saliency")).index
    assert found["splits"] == {"train": LISTED + EXTRA, "evaluation": ["img_004", "img_005"]}
    entries = {name: found["images"][name] for name in EXTRA}
    assert {name: entry["tags"] for name, entry in entries.items()} == {"cat_9": [1], "zebra_1": [1], "a_bird": [3]}
    assert entries["a_bird"]["file"] == "../more/bird/a_bird.jpeg"
    assert entries["a_bird"]["saliency"] == "data/Saliency/a_bird.png"
    assert {(entry["height"], entry["width"], entry["mask"]) for entry in entries.values()} == {(20, 28, None)}
    assert found["tag_source"] == "tags.json (JSON {id: [class]}); 3 images with single tags: more"


def test_without_extra_images_the_index_is_unchanged(dataset: Dataset) -> None:
    found = build_index(replace(dataset, extra=None)).index
    assert found["splits"]["train"] == LISTED
    assert found["tag_source"] == "tags.json (JSON {id: [class]})"


def test_extra_images_are_read_where_root_is_a_link(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "disk/deep").mkdir(parents=True)
    shutil.move("data", "disk/deep/voc")
    Path("data").symlink_to("disk/deep/voc")
    write(Path("index.json"), build_index(dataset).index)
    image = image_of(Index(Path("index.json")), "a_bird")
    assert image.file == Path("more/bird/a_bird.jpeg")
    assert read_rgb(image).shape == (20, 28, 3)


def test_extra_images_take_no_mask_or_tags_of_the_dataset(dataset: Dataset) -> None:
    """An unlisted image of the dataset may have the same name, e.g. if the extra image was copied from it."""
    shutil.copy("data/JPEGImages/img_000.jpg", "data/JPEGImages/a_bird.jpg")
    shutil.copy("data/SegmentationClass/img_000.png", "data/SegmentationClass/a_bird.png")
    tags = json.loads(Path("data/tags.json").read_text())
    Path("data/tags.json").write_text(json.dumps({**tags, "a_bird": [1, 2]}))
    entry = build_index(dataset).index["images"]["a_bird"]
    assert (entry["file"], entry["tags"], entry["mask"]) == ("../more/bird/a_bird.jpeg", [3], None)


def cut() -> None:
    data = Path("more/cat/zebra_1.jpg").read_bytes()
    Path("more/cat/zebra_1.jpg").write_bytes(data[: len(data) // 2])


FAULTS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: picture(Path("more/dog/zebra_1.jpg")),
        "more/cat/zebra_1.jpg: more/dog/zebra_1.jpg has the same id; remove or rename one of the two",
    ),
    (
        lambda: picture(Path("more/cat/zebra_1.png")),
        "more/cat/zebra_1.jpg: more/cat/zebra_1.png has the same id; remove or rename one of the two",
    ),
    (
        lambda: picture(Path("more/dog/img_001.jpg")),
        "data/JPEGImages/img_001.jpg: more/dog/img_001.jpg has the same id; remove or rename one of the two",
    ),
    (
        lambda: picture(Path("more/dog/img_005.jpg")),
        "data/JPEGImages/img_005.jpg: more/dog/img_005.jpg has the same id; remove or rename one of the two",
    ),
    (
        lambda: picture(Path("more/brid/other.jpg")),
        "more/brid: is not named after any of dataset.classes; did you mean bird?",
    ),
    (
        lambda: picture(Path("more/251.airplanes/other.jpg")),
        "more/251.airplanes: is not named after any of dataset.classes; rename or remove it",
    ),
    (cut, "more/cat/zebra_1.jpg: truncated JPEG; copy or download it again"),
    (
        lambda: Path("data/Saliency/a_bird.png").unlink(),
        "data/Saliency/a_bird.png: missing; add it, or choose another saliency.kind",
    ),
    (
        lambda: shutil.rmtree("more"),
        "more: cannot be listed (No such file or directory); create it or correct dataset.extra",
    ),
    (
        lambda: [shutil.rmtree(f"more/{name}") for name in ("cat", "bird")],
        "more: no class folder (such as more/cat) holds an image; add some, or set dataset.extra to null",
    ),
]


@pytest.mark.parametrize(("change", "line"), FAULTS, ids=[line for _, line in FAULTS])
def test_one_fault_is_one_line(dataset: Dataset, change: Callable[[], Any], line: str) -> None:
    change()
    with pytest.raises(PipelineError) as caught:
        build_index(dataset, Path("data/Saliency"))
    assert list(caught.value.lines) == [line]


def test_a_listed_image_that_is_missing_is_not_taken_from_the_extra_folder(dataset: Dataset) -> None:
    Path("data/JPEGImages/img_001.jpg").rename("more/cat/img_001.jpg")
    with pytest.raises(PipelineError) as caught:
        build_index(dataset)
    assert list(caught.value.lines) == [
        "data/JPEGImages/img_001.jpg (or another format): missing, but it is listed; add it or unlist it"
    ]


@pytest.fixture
def params(dataset: Dataset) -> dict[str, Any]:
    """Written to params.yaml: a row trained on pseudo labels, and the supervised one."""
    raw = minimal_params(dataset, Path("data/Saliency"))
    network = {"deeplab_largefov": {"channels": 8}}
    raw["segmentations"]["supervised"] = {**raw["segmentations"]["cam"], "labels": "ground_truth", "network": network}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    return raw


def graph() -> Graph:
    return Graph(load([Path("params.yaml")]))


def test_a_new_file_in_the_folder_makes_the_index_stale(params: dict[str, Any]) -> None:
    run("index", index.main, [])
    assert "index" not in {job.label for job in stale(graph())}
    picture(Path("more/dog/new.jpg"))
    cv2.imwrite("data/Saliency/new.png", np.zeros((20, 28), np.uint8))
    assert "index" in {job.label for job in stale(graph())}
    run("index", index.main, [])
    assert list(Index(Path("results/test/index/index.json")).images("train").ids) == [
        *LISTED,
        "cat_9",
        "zebra_1",
        "new",
        "a_bird",
    ]
    Path("more/dog/new.jpg").unlink()
    assert "index" in {job.label for job in stale(graph())}


def test_a_missing_folder_is_refused_by_the_stage(params: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("more")
    with pytest.raises(SystemExit):
        run("index", index.main, [])
    error = "error: more: missing (extra of index); put the images there, or correct dataset.extra\n"
    assert capsys.readouterr().err == error


def test_the_supervised_row_trains_on_the_images_with_masks(params: dict[str, Any]) -> None:
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    run("segmentation", segmentation.main, ["supervised", "--device", "cpu"])
    log = json.loads(Path("results/test/segmentations/supervised/log.json").read_text())
    assert len(log["steps"]) == 2  # two steps for the four images with masks; all seven images would take four


def test_a_training_list_without_any_mask_is_refused(
    params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LISTED:
        Path(f"data/SegmentationClass/{name}.png").unlink()
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    with pytest.raises(SystemExit):
        run("segmentation", segmentation.main, ["supervised", "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    labels = "results/test/ground_truth/labels.h5"
    assert line == f"error: {labels}: has no label map for 7 training images, first img_000"


def test_a_mixture_draws_its_share_of_all_among_the_images_with_masks(
    params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """0.5 of seven images are 4 (3.5 rounds to even): the four with masks. 0.8 of them exceed the four."""
    params["mixtures"] = {
        name: {"labels": "pseudo_labels/cam", "share": share} for name, share in (("half", 0.5), ("most", 0.8))
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    folder = Path("results/test/pseudo_labels/cam")
    folder.mkdir(parents=True)
    with RasterWriter(folder / "labels.h5", "labels") as writer:
        for name in LISTED + EXTRA:
            writer.append(name, np.full((2, 2), 77, np.uint8))
    with pytest.raises(SystemExit):
        run("mixture", mixture.main, ["half"])
    labels = folder / "labels.h5"
    line = f"error: {labels}: has no manifest, since its stage was interrupted; run its stage again\n"
    assert capsys.readouterr().err == line
    manifest.write(folder, stage="pseudo_labels cam", outputs={labels.name: sha256(labels)})
    run("mixture", mixture.main, ["half"])
    store = RasterStore(Path("results/test/mixtures/half/labels.h5"))
    assert list(store) == LISTED + EXTRA
    assert [name for name in store if (store.get(name) == 77).all()] == EXTRA
    with pytest.raises(SystemExit):
        run("mixture", mixture.main, ["most"])
    masks = "results/test/ground_truth/labels.h5"
    wanted = (
        f"error: {masks}: has masks of 4 training images, but a share of 0.8 of all 7 is 6; add masks to the dataset"
    )
    assert capsys.readouterr().err == f"{wanted}, or lower the share\n"


def test_the_report_says_where_the_tags_come_from(params: dict[str, Any]) -> None:
    run("index", index.main, [])
    found = Index(Path("results/test/index/index.json"))
    facts = dict(protocol.facts(graph().params, found, {"train": 4, "evaluation": 2}))
    assert facts["Image-level labels"] == "tags.json (JSON {id: [class]}); 3 images with single tags: more"
    assert facts["Splits"] == "train: 7 images, 4 with masks; evaluation: 2 images, 2 with masks"
