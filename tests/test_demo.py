"""The demo: equal settings give identical bytes, masks and tags are exact, and the index stage accepts the dataset."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline.config.dataset import Dataset, Demo
from pipeline.data.build_index import build_index
from pipeline.data.demo import CLASSES, draw, generate, simulated_saliency
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import demo

SETTINGS = Demo(train=30, evaluation=10, size=64, seed=3)


def hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def mask_of(root: Path, name: str) -> Any:
    return np.asarray(Pillow.open(root / f"SegmentationClass/{name}.png"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    generate(root, SETTINGS)
    return root


@pytest.fixture(scope="module")
def tags(root: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((root / "tags.json").read_text())
    return found


def test_same_settings_same_bytes(root: Path, tmp_path: Path) -> None:
    generate(tmp_path, SETTINGS)
    assert hashes(tmp_path) == hashes(root)


def test_images_do_not_depend_on_their_number(root: Path, tmp_path: Path) -> None:
    generate(tmp_path, Demo(train=2, evaluation=1, size=64, seed=3))
    few, many = hashes(tmp_path), hashes(root)
    pictures = {name for name in few if name.endswith((".jpg", ".png"))}
    assert len(pictures) == 9
    assert all(few[name] == many[name] for name in pictures)


def test_another_seed_gives_other_images(root: Path, tmp_path: Path) -> None:
    generate(tmp_path, Demo(train=3, evaluation=0, size=64, seed=4))
    for name in ("demo_00000", "demo_00001", "demo_00002"):
        assert (mask_of(tmp_path, name) != mask_of(root, name)).any()


def test_the_index_accepts_the_dataset(root: Path) -> None:
    index = build_index(Dataset(str(root), "classes.txt", masks="SegmentationClass"), root / "Saliency").index
    assert index["classes"] == list(CLASSES)
    assert {split: len(ids) for split, ids in index["splits"].items()} == {"train": 30, "evaluation": 10}
    assert len(index["images"]) == 40
    assert all(entry["height"] == entry["width"] == 64 for entry in index["images"].values())
    assert all(entry["saliency"] for entry in index["images"].values())


def test_tags_are_the_classes_of_the_masks(root: Path, tags: dict[str, list[int]]) -> None:
    assert len(tags) == 40
    for name, found in tags.items():
        assert found == sorted(set(np.unique(mask_of(root, name)).tolist()) - {0, 255})
        assert found
    assert {tag for found in tags.values() for tag in found} == set(range(1, len(CLASSES) + 1))
    assert any(len(found) > 1 for found in tags.values())


def test_masks_cover_the_objects() -> None:
    """The heads are the only vivid colours of an image and lie within its objects."""
    for number in range(10):
        image, mask = draw(96, np.random.default_rng([0, number]))
        assert image.shape == (96, 96, 3)
        assert image.dtype == mask.dtype == np.uint8
        spread = image.max(-1).astype(int) - image.min(-1)
        vivid = spread > 145
        assert vivid.any()
        assert (mask[vivid] != 0).all()
        assert 0.02 < (mask > 0).mean() < 0.8


def test_masks_carry_vocs_palette(root: Path) -> None:
    picture = Pillow.open(root / "SegmentationClass/demo_00000.png")
    assert picture.mode == "P"
    palette = picture.getpalette()
    assert palette is not None
    assert palette[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_saliency_is_imperfect_but_useful() -> None:
    """The pooled IoU is near that of the papers' detectors: the maps are neither exact nor noise."""
    both = either = 0
    for number in range(60):
        random = np.random.default_rng([5, number])
        _, mask = draw(96, random)
        found = simulated_saliency(mask, random)
        assert found.shape == (96, 96)
        assert found.dtype == np.uint8
        salient, truth = found >= 128, mask > 0
        both += int((salient & truth).sum())
        either += int((salient | truth).sum())
    assert 0.5 < both / either < 0.8


def test_saliency_files_are_grey_and_of_the_images_size(root: Path) -> None:
    found = cv2.imread(str(root / "Saliency/demo_00007.png"), cv2.IMREAD_UNCHANGED)
    assert found is not None
    assert found.shape == (64, 64)


def stage_work(tmp_path: Path) -> Work:
    job = Job("demo", "", {}, {"root": tmp_path / "demo"}, {}, Demo(train=2, evaluation=1, size=48), tmp_path)
    return Work(job, {}, job.outputs, Runtime(), "", tmp_path / "checkpoint")


def test_the_stage_starts_afresh(tmp_path: Path) -> None:
    """Files of an interrupted run do not enter the dataset."""
    work = stage_work(tmp_path)
    images = work.outputs["root"] / "JPEGImages"
    generate(work.outputs["root"], Demo(train=5, evaluation=1, size=48))
    (work.outputs["root"] / "link").symlink_to(tmp_path)
    demo.main(work)
    assert tmp_path.exists()
    assert not (work.outputs["root"] / "link").exists()
    assert sorted(path.name for path in images.iterdir()) == [f"demo_0000{number}.jpg" for number in range(3)]


def test_the_stage_replaces_a_demo_but_not_user_images(tmp_path: Path) -> None:
    work = stage_work(tmp_path)
    generate(tmp_path / "demo", Demo(train=1, evaluation=1, size=48))
    demo.main(work)
    assert (work.outputs["root"] / "tags.json").exists()
    shutil.rmtree(tmp_path / "demo")
    (tmp_path / "demo" / "lost+found").mkdir(parents=True)
    demo.main(work)  # an empty folder may be used, such as the top of a file system
    assert (tmp_path / "demo" / "lost+found").exists()
    (tmp_path / "demo" / "GENERATED.txt").unlink()
    (tmp_path / "demo" / "mine.jpg").touch()
    with pytest.raises(PipelineError, match=r"demo: contains something other .*; set dataset\.demo to null"):
        demo.main(work)
    assert (tmp_path / "demo" / "mine.jpg").exists()
