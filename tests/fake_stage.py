"""A small project, and a stand-in for a stage's work, for tests of the stage frame."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.workflow.stage import Work, run
from stages import index
from tests.project import link_code
from tests.voc_tree import make_tree, minimal_params

RESULTS = Path("results/test")
BASE = RESULTS / "classifiers/base"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, params.yaml, the index, and this project's own code."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params = minimal_params(make_tree(Path("data")))
    params["classifiers"]["other"] = params["classifiers"]["base"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run("index", index.main, [])
    return tmp_path


class Fake:
    """A stage's work in no time: each output holds the number of the call."""

    def __init__(self, also: Callable[[Work], None] = lambda work: None) -> None:
        self.calls: list[Work] = []
        self.also = also

    def __call__(self, work: Work) -> None:
        self.calls.append(work)
        for name, path in work.outputs.items():
            path.write_text(f"{name} {len(self.calls)}")
        self.also(work)


def start(work: Callable[[Work], None], *arguments: str, name: str = "classifier") -> None:
    run(name, work, [*(arguments or ("base",))])


def set_(section: str, block: str, **values: Any) -> list[str]:
    return [block, "--set", json.dumps({section: {block: values}})]


def lines(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")
