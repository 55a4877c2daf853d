"""One list of pinned packages, whichever way the environment is made."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PINS = (ROOT / "requirements.txt").read_text().split()


def test_every_requirement_is_pinned_once() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9-]+==[0-9][0-9A-Za-z.]*", pin) for pin in PINS)
    names = [pin.split("==")[0].lower() for pin in PINS]
    assert len(set(names)) == len(names)


def test_pyproject_reads_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_environment_yml_repeats_the_pins() -> None:
    """Repeats, since Snakemake copies the file elsewhere, where '-r requirements.txt' would name nothing."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": PINS}
    assert "pip" in dependencies
    (python,) = [entry for entry in dependencies if str(entry).startswith("python=")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python.removeprefix('python=')}"


def test_this_python_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sys.version_info >= tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))


@pytest.mark.parametrize("pin", PINS)
def test_the_pinned_version_is_installed(pin: str) -> None:
    """A machine with a CUDA image may bring torch and torchvision of its own."""
    name, version = pin.split("==")
    if name in ("torch", "torchvision"):
        assert tuple(map(int, metadata.version(name).split("+")[0].split(".")[:2])) >= (0, 26)
    else:
        assert metadata.version(name) == version
