"""Two experiments at once: they share metrics.json and often a dataset, and neither may harm or claim the other's."""

import errno
import fcntl
import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import load
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.workflow.freshness import is_fresh
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import demo, report
from tests.project import link_code, run_stages
from tests.voc_tree import make_tree, minimal_params

SPAWN = multiprocessing.get_context("spawn")
PAIRS = 10
METRICS = "./metrics.json"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The params files one.yaml and two.yaml, whose experiments differ in the selected row."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params = minimal_params(make_tree(Path("data")))
    params["segmentations"]["upper"] = {**params["segmentations"]["cam"], "labels": "ground_truth"}
    for name, method in (("one", "cam"), ("two", "upper")):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(params | {"experiment": name, "method": method}))
    return tmp_path


@pytest.fixture
def results(project: Path) -> Path:
    """All results of both experiments except their reports."""
    run_stages(["one.yaml"], until="report")
    for file in ("report.html", "metrics.json", "manifest.json"):
        (project / "results/one" / file).unlink()
    (project / "metrics.json").unlink()
    shutil.copytree(project / "results/one", project / "results/two")
    return project


def work(name: str, barrier: Any, rounds: int, locks: bool) -> None:
    """Write the report of an experiment again and again, each time as the other process does."""
    if not locks:

        def flock(file: Any, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        fcntl.flock = flock  # type: ignore[assignment]
    for _ in range(rounds):
        barrier.wait()
        run("report", report.main, ["--force", "--params", f"{name}.yaml"])
        barrier.wait()


def pairs(rounds: int, locks: bool) -> Iterator[list[str]]:
    """Run pairs of reports; after each, yield the experiments whose manifest records metrics.json as it is."""
    barrier = SPAWN.Barrier(3, timeout=100)
    workers = [SPAWN.Process(target=work, args=(name, barrier, rounds, locks)) for name in ("one", "two")]
    for worker in workers:
        worker.start()
    try:
        for _ in range(rounds):
            barrier.wait()
            barrier.wait()
            records = {name: manifest.read(Path("results") / name) for name in ("one", "two")}
            now = sha256(Path("metrics.json"))
            yield [name for name, record in records.items() if record and record["outputs"][METRICS] == now]
    except BaseException:
        barrier.abort()
        raise
    finally:
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("locks", [True, False])
def test_one_of_two_reports_at_once_owns_the_metrics(results: Path, locks: bool) -> None:
    owners = list(pairs(PAIRS, locks))
    assert [len(names) for names in owners] == [1] * PAIRS, owners
    graphs = {name: Graph(load([Path(f"{name}.yaml")])) for name in ("one", "two")}
    assert [name for name, graph in graphs.items() if is_fresh(graph.find("report"), {})] == owners[-1]
    (owner,) = owners[-1]
    assert json.loads(Path("metrics.json").read_text())["method"] == graphs[owner].params.method
    assert not list(results.rglob("*.partial"))


def generate(name: str, barrier: Any) -> None:
    barrier.wait()
    run("demo", demo.main, ["--params", f"{name}.yaml"])


def test_two_experiments_generate_their_common_dataset_in_turn(project: Path) -> None:
    settings = {"train": 30, "evaluation": 10, "size": 32}
    for name in ("one", "two"):
        params = yaml.safe_load(Path(f"{name}.yaml").read_text())
        params["dataset"] |= {"root": "data/demo", "demo": settings}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(params))
    for _ in range(3):
        shutil.rmtree("results", ignore_errors=True)
        barrier = SPAWN.Barrier(2, timeout=100)
        workers = [SPAWN.Process(target=generate, args=(name, barrier)) for name in ("one", "two")]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert len(list(Path("data/demo/JPEGImages").iterdir())) == 40
        for name in ("one", "two"):
            assert is_fresh(Graph(load([Path(f"{name}.yaml")])).find("demo"), {})


def test_another_experiment_waits_for_the_dataset(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = yaml.safe_load(Path("one.yaml").read_text())
    params["dataset"] |= {"root": "data/demo", "demo": {"train": 2, "evaluation": 1, "size": 32}}
    Path("one.yaml").write_text(yaml.safe_dump(params))
    lock = Path("data/.lock-demo")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711")
        file.flush()
        waiting = threading.Thread(target=run, args=("demo", demo.main, ["--params", "one.yaml"]))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert not Path("data/demo").exists()
    waiting.join()
    assert Path("data/demo/tags.json").exists()
    assert "demo: waiting for process 4711, which is at work on it" in capsys.readouterr().out
