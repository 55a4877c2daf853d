"""The wheel has all that the library needs, and the library needs none of the packages of the extras."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.project import ROOT
from tests.trained import MODEL, mask, photo

PHOTOS = ROOT.parent / "shared/data/voc12_mini/JPEGImages"  # real photos; beside the checkout of the project's authors
MODULES = {  # of packages whose module has another name
    "pydensecrf2": "pydensecrf",
    "snakemake-executor-plugin-slurm": "snakemake_executor_plugin_slurm",
    "pillow-heif": "pillow_heif",
    "pytest-xdist": "xdist",
}
TYPES = "types-"  # packages of types only
NEEDED_BY_TORCH = {"jinja2"}
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not in the library's dependencies")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in ("pyproject.toml", "pipeline", "stages", "wsss", "README.md", "LICENSE"):
        (source / part).symlink_to(ROOT / part)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("wsss-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of an unpacked wheel, and a sitecustomize.py that makes imports of the extras' packages fail."""
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {Requirement(text).name for texts in extras.values() for text in texts}
    blocked = {MODULES.get(name, name) for name in names if not name.startswith(TYPES)} - NEEDED_BY_TORCH
    assert {"snakemake", "dvc", "pydensecrf", "h5py", "scipy", "pillow_heif", "onnx", "torchmetrics"} <= blocked
    (site / "sitecustomize.py").write_text(BLOCKER.format(blocked=sorted(blocked)))
    return site


def run(site: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_blocked_packages_cannot_be_imported(installed: Path, tmp_path: Path) -> None:
    for name in ("h5py", "snakemake", "pydensecrf.densecrf"):
        done = run(installed, tmp_path, "-c", f"import {name}")
        assert "is not in the library's dependencies" in done.stderr


def test_predict_runs_from_the_wheel_with_the_dependencies_alone(installed: Path, folder: Path, tmp_path: Path) -> None:
    formats = "png,overlay,coco,cvat,labelstudio,csv,probabilities"
    arguments = ("-m", "wsss", "predict", MODEL, "data/JPEGImages", "--out", "out", "--formats", formats)
    done = run(installed, folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 15 photos segmented, 0 up to date\n"
    assert len(list(Path("out/masks").iterdir())) == 15
    where = run(installed, tmp_path, "-c", "import wsss, pipeline; print(wsss.__file__, pipeline.__file__)")
    assert all(Path(file).is_relative_to(installed) for file in where.stdout.split())


def test_export_of_a_row_runs_from_the_wheel_with_the_dependencies_alone(installed: Path, folder: Path) -> None:
    done = run(installed, folder, "-m", "wsss", "export", "test/cam", "--out", "out")
    assert done.returncode == 0, done.stderr


def test_all_networks_are_built_with_the_dependencies_alone(installed: Path, tmp_path: Path) -> None:
    code = """
from pipeline.config.registry import BACKBONES, ONE_STEP, SEGMENTATIONS
from pipeline.training import models
for registry in (BACKBONES, ONE_STEP, SEGMENTATIONS):
    for name in registry.names():
        registry[name]
print("built")
"""
    done = run(installed, tmp_path, "-c", code)
    assert done.stdout == "built\n", done.stderr


def test_the_wheel_is_typed_and_has_the_command(installed: Path) -> None:
    assert (installed / "wsss/py.typed").is_file()
    assert (installed / "pipeline/report/templates").is_dir()
    (entries,) = installed.glob("wsss-*.dist-info/entry_points.txt")
    assert "wsss = wsss.__main__:main" in entries.read_text()
    (licence,) = installed.glob("wsss-*.dist-info/licenses/LICENSE")
    assert licence.read_text().startswith("MIT License")


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new virtual environment of 1 GB, which is deleted after the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_wheel_segments_a_photo_in_an_empty_environment(
    wheel: Path, empty_environment: Path, folder: Path, tmp_path: Path
) -> None:
    """pip resolves the wheel's own dependencies, at the tested versions; no path leads to this project."""
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    work = tmp_path / "elsewhere"
    work.mkdir()

    def start(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(empty_environment / "bin" / program), *map(str, arguments)]
        return subprocess.run(command, cwd=work, env=bare, capture_output=True, text=True)

    done = start("pip", "install", "--quiet", "--constraint", ROOT / "requirements.txt", wheel)
    assert done.returncode == 0, done.stderr
    packages = {entry["name"].lower() for entry in json.loads(start("pip", "list", "--format", "json").stdout)}
    assert packages >= {"wsss", "torch", "safetensors"}
    assert not packages & {"snakemake", "dvc", "pydensecrf2", "h5py", "scipy", "pytest", "onnx"}
    assert start("pip", "check").returncode == 0

    shutil.copy(folder / MODEL, work / "model.safetensors")
    real = next(iter(sorted(PHOTOS.glob("*.jpg"))), None) or photo(tmp_path / "photo.jpg", size=(240, 320))
    shutil.copy(real, work / "my photo.jpg")
    formats = "png,overlay,coco,cvat,labelstudio,csv,probabilities"
    done = start("wsss", "predict", "model.safetensors", "my photo.jpg", "--out", "out", "--formats", formats)
    assert (done.returncode, done.stdout) == (0, "out: 1 photo segmented, 0 up to date\n"), done.stderr
    with Image.open(real) as picture:
        assert mask(work / "out/masks/my photo.png").shape == picture.size[::-1]
    done = start("python", "-c", "import wsss, pipeline; print(wsss.__file__, pipeline.__file__)")
    assert all(Path(file).is_relative_to(empty_environment) for file in done.stdout.split())
