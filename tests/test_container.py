"""The container installs what CI installs, in the same way. No test builds it, which needs Docker and a network."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
STEPS = [tuple(step.split(maxsplit=1)) for step in re.sub(r"\\\n\s*", "", TEXT).splitlines()]


def recipe(target: str) -> list[str]:
    """The commands that make would run for a target on a fresh machine."""
    command = ["make", "--always-make", "--dry-run", "--no-print-directory", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_it_installs_by_the_command_of_ci() -> None:
    """CI runs ``make test``, which begins with the commands of ``make install``."""
    runs = [text for key, text in STEPS if key == "RUN"]
    assert runs[1:] == ["make install && chmod --recursive a+rwX ."]  # any user may then write to the project's folders
    installation = recipe("install")
    assert installation[-1].startswith("touch ")
    assert "exec make test" in (ROOT / ".ci/run").read_text()
    assert recipe("test")[: len(installation)] == installation


def test_its_system_packages_are_those_that_the_readme_names() -> None:
    (packages,) = re.findall(r"--no-install-recommends (.*?) &&", TEXT.replace("\\\n    ", ""))
    assert packages.split() == ["g++", "git", "make", "python3", "python3-dev", "python3-venv"]
    assert "Python 3.11 or 3.12 with venv, GNU make and a C++ compiler" in (ROOT / "README.md").read_text()
    (release,) = re.findall(r"^FROM nvidia/cuda:[\d.]+-base-ubuntu(\S+)$", TEXT, re.MULTILINE)
    assert release == "24.04"  # whose python3 is 3.12


def test_the_project_is_copied_before_it_is_installed() -> None:
    keys = [key for key, _ in STEPS]
    assert keys == ["FROM", "SHELL", "RUN", "WORKDIR", "COPY", "RUN", "ENV", "CMD"]
    ignored = set((ROOT / ".dockerignore").read_text().splitlines())
    assert {".git", ".venv", "results", "data/*"} <= ignored
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert not [name for name in tracked if name.split("/")[0] in ignored - {"results"}]
