"""One list of pinned packages, whichever way the environment is made; and the ranges of the library's dependencies."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = (ROOT / "requirements.txt").read_text().split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    )
]


def test_every_requirement_is_pinned_once() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9-]+==[0-9][0-9A-Za-z.]*", pin) for pin in PINS)
    names = [pin.split("==")[0].lower() for pin in PINS]
    assert len(set(names)) == len(names)


def test_each_pin_lies_in_a_range_of_pyproject_and_each_range_has_a_pin() -> None:
    pins = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in PINS)}
    ranges = {canonicalize_name(requirement.name): requirement for requirement in RANGES}
    assert len(ranges) == len(RANGES)
    assert ranges.keys() == pins.keys()
    assert [name for name, requirement in ranges.items() if not requirement.specifier.contains(pins[name])] == []


def test_the_snakefile_requires_the_least_snakemake_of_the_range() -> None:
    """Older ones refuse a function as the priority of a rule."""
    (least,) = re.findall(r'^min_version\("(.*)"\)$', (ROOT / "Snakefile").read_text(), re.MULTILINE)
    (snakemake,) = (requirement for requirement in RANGES if requirement.name == "snakemake")
    assert str(snakemake.specifier) == f">={least}"


def test_the_extras() -> None:
    extras = {
        name: {Requirement(text).name for text in texts} for name, texts in PROJECT["optional-dependencies"].items()
    }
    assert {"snakemake", "dvc", "pydensecrf2", "h5py"} <= extras["workflow"]
    assert extras["photos"] == {"pillow-heif"}
    assert "pytest" in extras["dev"]
    assert extras["bench"] == {"torchmetrics"}


def test_the_library_needs_few_packages() -> None:
    """A new one is a decision: it is installed by everyone who segments photos."""
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {
        "torch",
        "torchvision",  # the backbones of torchvision
        "numpy",
        "opencv-contrib-python-headless",
        "pillow",
        "safetensors",
        "timm",  # the backbone of the models that `wsss new` trains without a GPU
        "pycocotools",  # masks in COCO's format
        "PyYAML",
        "tqdm",
    }


def test_license_and_citation_agree_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # those that the format requires
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    names = [author["name"] for author in PROJECT["authors"]]
    assert [author["name"] for author in citation["authors"]] == names
    assert all(name in (ROOT / "LICENSE").read_text() for name in names)
    assert str(citation["version"]) == PROJECT["version"]
    assert f"## [Unreleased] - {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_environment_yml_repeats_the_pins() -> None:
    """Repeats, since Snakemake copies the file elsewhere, where '-r requirements.txt' would name nothing."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": PINS}
    assert "pip" in dependencies
    (python,) = [entry for entry in dependencies if str(entry).startswith("python=")]
    assert PROJECT["requires-python"] == f">={python.removeprefix('python=')}"


def test_this_python_is_supported() -> None:
    assert sys.version_info >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


@pytest.mark.parametrize("pin", PINS)
def test_the_pinned_version_is_installed(pin: str) -> None:
    """A machine with a CUDA image may bring torch and torchvision of its own."""
    name, version = pin.split("==")
    if name in ("torch", "torchvision"):
        assert tuple(map(int, metadata.version(name).split("+")[0].split(".")[:2])) >= (0, 26)
    else:
        assert metadata.version(name) == version
