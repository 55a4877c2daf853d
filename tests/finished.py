"""A project with all its results; tests edit and damage copies of it."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from tests.project import link_code, run_stages
from tests.voc_tree import make_tree, minimal_params, write_mask

DATA, SALIENCY, EXTRA = Path("data"), Path("maps"), Path("more")
RESULTS = Path("results/test")
LISTS = DATA / "ImageSets/Segmentation"
IMAGE, MASK = DATA / "JPEGImages/img_001.jpg", DATA / "SegmentationClass/img_001.png"
MAP, OWN = SALIENCY / "img_001.png", EXTRA / "cat/own.jpg"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all results. Its saliency maps and its extra images lie outside of the dataset's folder."""
    folder = tmp_path_factory.mktemp("freshness") / "finished"
    folder.mkdir()
    link_code(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        dataset = make_tree(DATA)
        (DATA / "Saliency").rename(SALIENCY)
        (EXTRA / "cat").mkdir(parents=True)
        shutil.copy(DATA / "JPEGImages/img_000.jpg", EXTRA / "cat/own.jpg")
        shutil.copy(SALIENCY / "img_000.png", SALIENCY / "own.png")
        params = minimal_params(dataset, SALIENCY)
        params["dataset"]["extra"] = str(EXTRA)
        params["pseudo_labels"]["cam"]["rule"] = {"oaa": {"crf": {"iterations": 1}}}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        run_stages(["params.yaml"])
    finally:
        os.chdir(before)
    return folder


def repaint(path: Path) -> None:
    """Replace a picture by a valid one of the same size."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    if path.parent.name == "SegmentationClass":
        write_mask(path, np.zeros(picture.shape[:2]))
    else:
        cv2.imwrite(str(path), picture[::-1] if path.suffix == ".jpg" else np.zeros_like(picture))
