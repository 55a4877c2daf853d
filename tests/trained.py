"""A small trained experiment, as the stages write it, for tests of the library and of its commands."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import wsss
from tests.project import run_stages
from tests.voc_tree import make_tree, minimal_params
from wsss.__main__ import main

ROW = "cam"
MODEL = Path("results/test/predictions") / ROW / "model.safetensors"


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, megapixels: float = 2.5, **test: Any) -> Path:
    """Train a row on masks in ``folder``, predict the evaluation images, and return the path of the model file.

    Args:
        megapixels: ``dataset.working_megapixels``.
        test: the test protocol.
    """
    monkeypatch.chdir(folder)
    params = minimal_params(make_tree(Path("data"), train=10, evaluation=5, size=(45, 67)))
    params["dataset"]["working_megapixels"] = megapixels
    training = {"batch_size": 5, "lr": 0.02, "epochs": 25, "lr_new": 1.0}
    network = {"deeplab_largefov": {"channels": 16, "rate": 2, "dropout": 0.0}}
    row = {"labels": "ground_truth", "network": network, "backbone": {"name": "small"}, "training": training}
    params |= {"segmentations": {ROW: row}, "test": {"scales": [1.0, 0.75], "flip": True, **test}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run_stages(["params.yaml"], f"prediction {ROW}")
    return folder / MODEL


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained experiment. Tests do not change it."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        train(folder, patch)
    return folder


@pytest.fixture
def folder(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with links to the results and the photos of the experiment."""
    monkeypatch.chdir(tmp_path)
    for name in ("results", "data"):
        Path(name).symlink_to(experiment / name)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> wsss.Model:
    return wsss.load(MODEL, "cpu")


def command(*arguments: object) -> int:
    """The exit status of ``wsss ARGUMENTS``."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("main returned")


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (45, 67)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)).save(path)
    return path


def mask(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.array(picture)
