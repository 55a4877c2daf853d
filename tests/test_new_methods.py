"""What a new method or network takes: one class in one file. Toys, registered here, run through the real stages."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import params as parameters
from pipeline.config.reader import NonNegative
from pipeline.config.registry import METHODS, ONE_STEP, REFINEMENTS, Choice, Registry
from pipeline.config.schema import Backbone, Head, OneStep, Refinement, Training
from pipeline.data.loading import TrainingSet
from pipeline.errors import PipelineError
from pipeline.methods.base import Method, Step
from pipeline.methods.cam import Cam
from pipeline.methods.one_step import Mapper, OneStepNetwork
from pipeline.networks.backbones import build_backbone
from pipeline.refinement.base import RefinementNetwork, Target
from pipeline.refinement.integral import IntegralModel
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore
from pipeline.training import models
from pipeline.workflow.stage import run
from stages import classifier, evaluation, features, ground_truth, index, localization, one_step, prediction, refinement
from tests.drawn import RAW, experiment
from tests.project import ROOT, link_code
from tests.test_one_step import AGEN
from tests.voc_tree import make_tree, minimal_params

K = 3


class FlipToy(Cam):
    """A method whose loss takes two forwards of the images, and the epoch: maps shall flip with their image."""

    map_name = "Toy map"

    @dataclass(frozen=True)
    class Settings:
        weight: NonNegative = 1.0

        def faults_in(self, block: Any) -> Iterator[str]:
            if block.training.epochs == 1:
                yield "training.epochs: 1 is too few for the toy"

    @property
    def companions(self) -> int:
        return 2

    def describe(self) -> str:
        return f"toy of weight {self.settings.weight:g}"

    def training_step(self, images: Tensor, tags: Tensor, epoch: int, occluded: Tensor | None = None) -> Step:
        output, flipped = self(images, occluded), self(images.flip(3))
        difference = (output.maps - flipped.maps.flip(3)).float().abs().mean()
        return Step(self.loss(output, tags) + epoch * self.settings.weight * difference, output)


class MaskToy(OneStepNetwork):
    """A one-step network: the classes' mean logits learn the tags, and no pixel may show an absent class."""

    def __init__(self, block: OneStep, num_classes: int) -> None:
        super().__init__(block, num_classes)
        self.body = build_backbone(block.backbones["body"])
        self.scores = nn.Conv2d(self.body.out_channels, num_classes + 1, 1)

    def describe(self) -> str:
        return "mask toy"

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.scores]

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.body(images)).float()

    def losses(self, images: Tensor, tags: Tensor, epoch: int, mapper: Mapper = map) -> dict[str, Tensor]:
        logits = self(images)
        shown = logits.softmax(1)[:, 1:].mean((2, 3))
        means = logits[:, 1:].mean((2, 3))
        return {
            "tags": functional.binary_cross_entropy_with_logits(means, tags),
            "absent": 0.1 * (shown * (1 - tags)).mean(),
        }


class MeanToy(IntegralModel):
    """A refinement network with a loss of its own."""

    @dataclass(frozen=True)
    class Settings:
        power: NonNegative = 1.0

    def describe(self) -> str:
        return "mean toy"

    def loss(self, images: Tensor, target: Target, tags: Tensor) -> Tensor:
        logits = self(images).float()
        wanted = target((logits.shape[2], logits.shape[3])) ** self.settings.power
        return functional.mse_loss(logits.sigmoid(), wanted)


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Registered as a file's decorator does it, and removed afterwards."""
    entries: list[tuple[Registry[Any], type]] = [(METHODS, FlipToy), (ONE_STEP, MaskToy), (REFINEMENTS, MeanToy)]
    for registry, entry in entries:
        registry.register("toy")(entry)
    yield
    for registry, _ in entries:
        del registry._loaded["toy"]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Params of a small tree in the working directory, with a block of each toy."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    params = minimal_params(make_tree(Path("data")))
    training = {"batch_size": 2, "lr": 0.02, "epochs": 2, "lr_new": 1.0}
    small = {"backbone": {"name": "small"}, "training": training, "head": {"convs": 0}}
    params["classifiers"]["toy"] = {**small, "method": {"toy": {"weight": 3}}}
    params["refinements"] = {"toy": {**small, "source": "classifiers/toy", "network": "toy"}}
    params["one_step"] = {"mask": {"network": "toy", "backbones": {"body": {"name": "small"}}, "training": training}}
    params["localizations"] |= {
        "toy": {"model": "classifiers/toy"},
        "mean": {"model": "refinements/toy"},
        "mask": {"model": "one_step/mask", "normalise": "none"},
    }
    return params


def start(raw: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    parameters.load([Path("params.yaml")], resolve=True)
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])


def work(stage: str, main: Any, name: str) -> None:
    run(stage, main, [name, "--device", "cpu", "--threads", "1", "--force"])


def test_a_method_and_a_refinement_from_tags_to_maps(raw: dict[str, Any]) -> None:
    start(raw)
    work("classifier", classifier.main, "toy")
    work("features", features.main, "toy")
    work("refinement", refinement.main, "toy")
    for name in ("toy", "mean"):
        work("localization", localization.main, name)
        run("evaluation", evaluation.main, [f"localizations/{name}"])
    results = Path("results/test")
    text = "toy of weight 3, small from random weights"
    log = json.loads((results / "classifiers/toy/log.json").read_text())
    assert log["about"] == {"text": text, "map_name": "Toy map"}
    refined = json.loads((results / "refinements/toy/log.json").read_text())
    assert refined["about"] == {"text": "mean toy small from random weights", "map_name": "Refined map"}
    accumulated = RasterStore(results / "classifiers/toy/maps.h5")
    maps = RasterStore(results / "localizations/mean/maps.h5")
    assert set(accumulated) == set(maps) != set()
    before = sha256(results / "classifiers/toy/model.pt")
    raw["classifiers"]["toy"]["method"]["toy"]["weight"] = 0
    start(raw)
    work("classifier", classifier.main, "toy")
    assert sha256(results / "classifiers/toy/model.pt") != before  # the second epoch has the toy's own term
    again = json.loads((results / "classifiers/toy/log.json").read_text())
    assert again["epochs"][0]["loss"] == log["epochs"][0]["loss"]  # the first has not


def test_a_one_step_network_from_tags_to_a_prediction(raw: dict[str, Any]) -> None:
    start(raw)
    work("one_step", one_step.main, "mask")
    work("prediction", prediction.main, "mask")
    work("localization", localization.main, "mask")
    run("evaluation", evaluation.main, ["predictions/mask"])
    results = Path("results/test")
    log = json.loads((results / "one_step/mask/log.json").read_text())
    assert all(set(entry) == {"epoch", "loss", "tags", "absent"} for entry in log["epochs"])
    assert log["epochs"][1]["tags"] + log["epochs"][1]["absent"] == pytest.approx(log["epochs"][1]["loss"], abs=1e-4)
    assert log["about"] == {
        "text": "mask toy, small from random weights",
        "map_name": "Probability",
        "labels": "on the fly",
    }
    assert set(RasterStore(results / "predictions/mask/labels.h5")) == {"img_004", "img_005"}
    assert "miou" in json.loads((results / "evaluation/predictions/mask/scores.json").read_text())


def test_a_method_asks_for_neighbours_that_share_a_class(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    class Recorded(TrainingSet):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            groups.append(self.group)

    monkeypatch.setattr("pipeline.workflow.fit.TrainingSet", Recorded)
    start(raw)
    for name in ("base", "toy"):
        work("classifier", classifier.main, name)
    assert groups == [1, 2]


def test_the_report_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = RAW["classifiers"]["base"]
    mask = {"network": "toy", "backbones": {"body": {"name": "small"}}, "training": small["training"]}
    toy = {**small, "method": "toy"}
    experiment({**RAW, "classifiers": {"base": toy}, "one_step": {"mask": mask}}, train=3, held=2)
    html = Path("results/drawn/report.html").read_text()
    for text in ("toy of weight 1, small from random weights", "mask toy, small", "Toy map", "on the fly"):
        assert text in html


def test_its_faults_are_found_before_anything_runs(raw: dict[str, Any]) -> None:
    raw["classifiers"]["toy"]["method"] = {"toy": {"wieght": 1}}
    raw["refinements"]["toy"]["network"] = {"toy": {"power": -1}}
    raw["seed"] = -1
    with pytest.raises(PipelineError) as caught:
        parameters.validate(raw, "p.yaml", resolve=True)
    assert list(caught.value.lines) == [
        "p.yaml: seed: -1 must be at least 0",
        "p.yaml: classifiers.toy.method.toy.wieght: unknown key; did you mean weight?",
        "p.yaml: refinements.toy.network.toy.power: -1.0 must be at least 0",
    ]


def test_a_stage_checks_its_own_block(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    start(raw)
    raw["classifiers"]["toy"]["training"]["epochs"] = 1
    raw["refinements"]["toy"]["network"] = {"toy": {"power": -1}}  # another stage's
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SystemExit):
        work("classifier", classifier.main, "toy")
    error = "error: params.yaml: classifiers.toy.training.epochs: 1 is too few for the toy\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("base", "registry", "lacking"),
    [
        (Method, METHODS, "describe, forward, layers, map_name, new_layers"),
        (OneStepNetwork, ONE_STEP, "describe, forward, losses, new_layers"),
        (RefinementNetwork, REFINEMENTS, "describe, loss"),
    ],
)
def test_what_the_report_needs_cannot_be_forgotten(base: type, registry: Registry[Any], lacking: str) -> None:
    with pytest.raises(TypeError, match=f"must define {lacking}$"):
        registry.register("bare")(type("Bare", (base,), {}))
    assert "bare" not in registry


TRAINING = Training(2, 0.02, epochs=1, lr_new=1.0)
SMALL = Backbone("small")
NETWORKS: dict[str, Refinement | OneStep] = {
    name: Refinement("classifiers/x", SMALL, TRAINING, Choice(REFINEMENTS, name), Head(1, 8))
    for name in ("integral", "regression")
} | {"agen": OneStep(Choice(ONE_STEP, "agen", AGEN), {"classification": SMALL, "segmentation": SMALL}, TRAINING)}


def test_every_registered_network_is_under_contract() -> None:
    registered = {name for registry in (REFINEMENTS, ONE_STEP) for name in registry.names() if registry.file(name)}
    assert registered == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
class TestNetworkContract:
    def build(self, name: str) -> Any:
        torch.manual_seed(0)
        return models.build(NETWORKS[name], K)

    def test_the_report_can_name_it_and_its_maps(self, name: str) -> None:
        about = self.build(name).about()
        wanted = {"text", "map_name"} | ({"labels"} if isinstance(NETWORKS[name], OneStep) else set())
        assert set(about) == wanted
        assert all(isinstance(text, str) and text.strip() for text in about.values())
        assert "small from random weights" in about["text"]

    def test_its_loss_reaches_every_parameter_that_learns(self, name: str) -> None:
        network, images, tags = self.build(name), torch.randn(2, 3, 40, 48), torch.eye(K)[:2]
        if isinstance(network, OneStepNetwork):
            terms = network.losses(images, tags, 3)
            assert list(terms) == list(network.losses(images, tags, 0))
            assert all(isinstance(value, float) for value in network.logged().values())
            loss = torch.stack(list(terms.values())).sum()
        else:
            loss = network.loss(images, lambda size: torch.rand(2, K, *size) * tags[:, :, None, None], tags)
        assert loss.shape == ()
        loss.backward()
        assert [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None] == []

    def test_a_batch_without_classes_has_a_finite_loss(self, name: str) -> None:
        network, images, tags = self.build(name), torch.randn(2, 3, 40, 48), torch.zeros(2, K)
        if isinstance(network, OneStepNetwork):
            loss = torch.stack(list(network.losses(images, tags, 3).values())).sum()
        else:
            loss = network.loss(images, lambda size: torch.zeros(2, K, *size), tags)
        loss.backward()
        assert loss.isfinite()
        assert all(value.grad is None or value.grad.isfinite().all() for value in network.parameters())

    def test_maps_are_not_negative_and_survive_saving(self, name: str, tmp_path: Path) -> None:
        network, images = self.build(name).eval(), torch.randn(2, 3, 40, 48)
        models.save(tmp_path / "model.pt", network, NETWORKS[name], K)
        loaded: Any = models.load(tmp_path / "model.pt", K, torch.device("cpu"))
        assert loaded.block == NETWORKS[name]
        with torch.no_grad():
            found, again = network.localize(images), loaded.localize(images)
        assert found.shape[:2] == (2, K)
        assert found.min() >= 0
        torch.testing.assert_close(again, found)


def test_params_and_the_stages_without_networks_do_not_import_torch() -> None:
    names = "evaluation, ground_truth, index, mixture, pseudo_labels, report, saliency"
    code = (
        f"import sys; from pathlib import Path; from stages import {names}\n"
        "from pipeline.config import params; from pipeline.workflow import graph\n"
        "graph.Graph(params.load([Path('params.yaml')])).find('report').params\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


DEFAULTS = {"schema.py": {"cam", "integral"}}
SHARED = [
    *(
        "pipeline/config/dataset.py",
        "pipeline/config/schema.py",
        "pipeline/config/validation.py",
        "pipeline/config/views.py",
        "pipeline/config/params.py",
        "pipeline/training/models.py",
    ),
    *(str(file.relative_to(ROOT)) for file in (ROOT / "stages").glob("*.py")),
    *(str(file.relative_to(ROOT)) for file in (ROOT / "pipeline/report").glob("*.py") if file.stem != "published"),
    *(str(file.relative_to(ROOT)) for file in (ROOT / "pipeline/training").glob("*.py")),
]


@pytest.mark.parametrize("path", SHARED)
def test_no_name_of_a_method_stands_outside_of_its_file(path: str) -> None:
    """As a string or an import; published figures name the papers."""
    registries = (METHODS, ONE_STEP, REFINEMENTS)
    files = {name: file for registry in registries for name in registry.names() if (file := registry.file(name))}
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files.values()}
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert imported & modules == set()
    assert texts & set(files) == DEFAULTS.get(Path(path).name, set())
