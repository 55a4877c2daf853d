"""Every stage that uses a GPU, with every registered method and network: in bf16 on the CPU, and on a GPU if marked so.

``--deterministic`` is on. Each training runs twice and is once killed between two checkpoints and resumed; all three
must end with the same bytes.

Training steps also run on torch's device 'meta', which computes nothing. Like a GPU it refuses to mix its tensors with
the CPU's, and unlike a GPU it refuses to give a value to the CPU, for which the CPU would wait. On a GPU torch itself
refuses to wait.
"""

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch

import pipeline.methods.agen
import pipeline.workflow.fit
from pipeline.config import params as parameters
from pipeline.config import references
from pipeline.config.registry import METHODS, ONE_STEP, REFINEMENTS, SEGMENTATIONS
from pipeline.config.stage_table import STAGES
from pipeline.data.loader import load
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.training.loop import Loop
from pipeline.training.settings import prepare
from pipeline.workflow import stage
from pipeline.workflow.graph import Graph, Job
from tests.faults import PARAMS, SHORT, Fault, Project, Server
from tests.marks import DEVICES
from tests.project import ROOT
from tests.test_deeplab import NEAR
from tests.test_faults import those

OVERRIDES = {
    **{key: PARAMS[key] for key in ("experiment", "dataset", "defaults", "gallery")},
    "classifiers": {"two_branches": {"method": "oaa_localization"}},
    "localizations": {
        "climbed": {"model": "classifiers/base", "climbing": {"iterations": 2}},
        "two_branches": {"model": "classifiers/two_branches"},
    },
    "refinements": {name: {"network": {"regression": {"reduction": "pooled"}}} for name in ("drs_refined", "drs_oaa")},
    "walks": {"climbed": {"affinity": "affinities/cam", "maps": "localizations/climbed"}},
    "pseudo_labels": {
        "climbed": {"source": "walks/climbed"},
        "two_branches": {"source": "localizations/two_branches"},
    },
    "segmentations": {
        "two_branches": {"labels": "pseudo_labels/two_branches"},
        "climbed": {"labels": "pseudo_labels/climbed"},
        **{name: {"labels": "ground_truth", "network": {name: settings}} for name, settings in NEAR.items()},
    },
    "boxes": {"cam": {"model": "classifiers/base"}},
    "test": {"scales": [1.0, 0.75], "flip": True, "crf": {}},
}
EPOCHS = 8  # of the steps that must not wait; AGEN's delay is shorter
PARTS = ("suppression", "attention_drop", "climbing")  # of a block, besides its method or network


def kind(job: Job) -> str:
    """What the job runs: its stage, the registered method or network of its block, and the block's parts."""
    block: Any = job.block
    choice = getattr(block, "method", None) or getattr(block, "network", None)
    return " ".join(
        [job.stage, *([choice.name] if choice else []), *(part for part in PARTS if getattr(block, part, None))]
    )


def every_kind() -> dict[str, Any]:
    """params.yaml with short trainings in bf16, and no more rows than it takes to run every kind of job."""
    raw = parameters.read([ROOT / "params.yaml"], OVERRIDES)
    for defaults in raw["defaults"].values():
        if "training" in defaults:
            defaults["training"] |= {**SHORT, "epochs": 2, "precision": "bf16"}
    for section in ("classifiers", "refinements", "affinities", "segmentations", "one_step"):
        for block in raw[section].values():
            for key in set(SHORT) & set(block.get("training", {})):
                del block["training"][key]
    rows: list[str] = []
    kinds: set[str] = set()
    for row in references.rows(parameters.validate(raw)):
        graph = Graph(parameters.validate({**raw, "rows": [row], "first": [], "method": row}))
        found = {kind(job) for job in graph.jobs if STAGES[job.stage].gpu}
        if not found <= kinds:
            rows.append(row)
            kinds |= found
    return {**raw, "rows": rows, "first": [], "method": rows[0]}


@pytest.fixture(scope="module", params=DEVICES)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    server = Server(request.param, "--deterministic")
    folder = tmp_path_factory.mktemp("devices") / "demo"
    folder.mkdir()
    yield Project(folder, every_kind(), server)
    server.close()


def jobs(project: Project, trains: bool) -> dict[str, Job]:
    """The first job of each kind that uses a GPU, and that trains or not."""
    stages = {name for name, stage in STAGES.items() if stage.gpu and stage.trains == trains}
    found: dict[str, Job] = {}
    for job in project.graph.jobs:
        if job.stage in stages:
            found.setdefault(kind(job), job)
    return found


def test_they_are_all_there(project: Project) -> None:
    """A registered method or network without a row here needs a block in params.yaml."""
    found = " ".join(jobs(project, True)).split()
    registries: list[Any] = [METHODS, REFINEMENTS, SEGMENTATIONS, ONE_STEP]
    assert {name for registry in registries for name in registry.names() if registry.file(name)} <= set(found)
    assert set(PARTS[:2]) <= set(found)
    assert "localization climbing" in jobs(project, False)
    assert {job.stage for trains in (True, False) for job in jobs(project, trains).values()} == {
        name for name, stage in STAGES.items() if stage.gpu
    }


def test_they_compute_in_bf16_on_the_device(project: Project) -> None:
    """But for the pictures of layers, which are fp32."""
    name = "CPU" if project.server.device == "cpu" else torch.cuda.get_device_name()
    for label, job in {**jobs(project, True), **jobs(project, False)}.items():
        precision = "fp32" if job.stage == "features" else "bf16"
        used = json.loads((project.folder / job.folder / "manifest.json").read_text())["arithmetic"]
        assert used, label
        assert all(re.match(rf"{precision}.* on {re.escape(name)}", text) for text in used), (label, used)


def test_killed_trainings_end_with_the_same_bytes(project: Project) -> None:
    wrong = []
    for label, job in jobs(project, True).items():
        with project.copy(job) as folder:  # the same bytes in every run
            run = project.server.run(folder, job)
            again = f"ends with {run.status}: {run.error}" if run.status else project.difference(folder, job)
        checkpoints = [
            number for number in those(run.accesses, "change os.rename") if ".checkpoint" in run.accesses[number - 1]
        ]
        assert len(checkpoints) >= 3, label
        with project.copy(job) as folder:
            killed = project.server.run(folder, job, Fault(checkpoints[len(checkpoints) // 2]))
            assert killed.status < 0, label
            resumed = project.recovers(folder, job)
        wrong += [f"{label}: {text}" for text in (again, resumed) if text]
    assert not wrong, "\n".join(wrong)


def test_inference_gives_the_same_bytes(project: Project) -> None:
    wrong = []
    for label, job in jobs(project, False).items():
        with project.copy(job) as folder:
            run = project.server.run(folder, job)
            text = f"ends with {run.status}: {run.error}" if run.status else project.difference(folder, job)
            wrong += [f"{label}: {text}"] if text else []
    assert not wrong, "\n".join(wrong)


class Trained(Exception):
    """The steps of a training that must not wait are done."""


@pytest.fixture
def strict(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a step in each epoch of a training on 'meta', or on a GPU that may not be waited for in the last epoch.

    Two parts wait for a GPU in each step on purpose and have tests of their own: the accumulator, and the CRF of AGEN's
    boundary loss.
    """
    on_gpu = project.server.device != "cpu"
    device = prepare(project.server.device, 1) if on_gpu else torch.device("meta")

    def run(loop: Loop) -> None:
        loop.task.network.train()
        loop.step, loop.steps_per_epoch = 1, 1000  # no loss is logged, for which the loop waits
        epochs = range(EPOCHS)
        with closing(load(loop.dataset, loop.settings.batch_size, epochs, 0, loop.plan)) as batches:
            for loop.epoch in epochs:
                loop.batches_done = 0
                group = loop._next_group(batches)
                with waiting_refused() if on_gpu and loop.epoch == EPOCHS - 1 else nullcontext():
                    loop._train(group)
        raise Trained

    def take(accumulator: AttentionAccumulator, maps: torch.Tensor, logits: torch.Tensor, *_: Any) -> None:
        assert maps.device.type == logits.device.type == device.type

    def boundary(logits: torch.Tensor, images: torch.Tensor, *_: Any) -> Any:
        assert logits.device.type == images.device.type == device.type
        return type("BoundaryLoss", (), {"value": lambda _: logits.sum()})()

    monkeypatch.setattr(pipeline.workflow.fit, "prepare", lambda *_: device)
    monkeypatch.setattr(Loop, "run", run)
    monkeypatch.setattr(AttentionAccumulator, "take", take)
    monkeypatch.setattr(pipeline.methods.agen, "BoundaryLoss", boundary)
    if not on_gpu:
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # 'meta' has none


@contextmanager
def waiting_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("strict")
def test_training_steps_mix_no_devices_and_wait_for_none(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    for job in jobs(project, True).values():
        with pytest.raises(Trained):
            stage.run(job.stage, import_module(f"stages.{job.stage}").main, [job.name, "--force", "--threads", "1"])
