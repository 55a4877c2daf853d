"""The project unpacked from a ZIP, without git: all of it works, DVC after one documented command."""

import re
from pathlib import Path

from tests.project import ROOT, copy, run

INDEX = "results/demo/index/index.json"


def test_without_git_everything_works_and_the_documents_say_what_dvc_needs(tmp_path: Path) -> None:
    folder = copy(tmp_path / "unpacked", git=True)  # the project's own DVC config, but no repository around it
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"(train|evaluation): (600|150)\b", r"\1: 9", params))
    text = run(folder, "snakemake", "--cores", "1", "--", INDEX)
    assert (folder / INDEX).exists()
    command = "dvc config --local core.no_scm true"
    assert re.search(rf"^note: DVC did not record this run: .*is not a git repository; run: {command}$", text, re.M)
    assert f"`{command}`" in (ROOT / "docs/COMMANDS.md").read_text()
    run(folder, *command.split())
    assert "note: " not in run(folder, "snakemake", "--cores", "1", "--force", "--", INDEX)
    assert "Data and pipelines are up to date" in run(folder, "dvc", "status", "index", "demo")


def test_a_home_that_cannot_be_written_needs_one_variable(tmp_path: Path) -> None:
    """That of this test does not even exist; root could write to a read-only one."""
    folder = copy(tmp_path / "project", git=False)
    environment = ("env", "-u", "XDG_CACHE_HOME", "HOME=/proc/none")
    assert "/proc/none" in run(folder, *environment, "snakemake", "--cores", "1", "-n", "--", INDEX, check=False)
    cache = f"XDG_CACHE_HOME={tmp_path}/cache"
    assert "index" in run(folder, *environment, cache, "snakemake", "--cores", "1", "-n", "--", INDEX)
    run(folder, *environment, cache, "dvc", "status", "index")
    assert "XDG_CACHE_HOME" in (ROOT / "docs/COMMANDS.md").read_text()
