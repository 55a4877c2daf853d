"""A label rule, a segmentation network and a backbone that only this file knows run through the real stages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from pipeline.config import params as parameters
from pipeline.config import schema
from pipeline.config.reader import Count, Share
from pipeline.config.registry import BACKBONES, RULES, SEGMENTATIONS
from pipeline.data.index import Index
from pipeline.labels.base import IGNORE, Cues, Rule
from pipeline.networks.base import Backbone, Tap
from pipeline.networks.segmentation import SegmentationHead
from pipeline.report import protocol
from pipeline.stores.raster import Raster, RasterStore
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from stages import classifier, evaluation, ground_truth, index, localization, prediction, pseudo_labels, saliency
from stages import segmentation as segmentation_stage
from tests.project import link_code
from tests.voc_tree import make_tree, minimal_params


@dataclass(frozen=True, kw_only=True)
class Brightest(Rule):
    """Where the strongest class reaches ``level``, it wins; elsewhere salient pixels are ignored."""

    level: Share = 0.5

    @property
    def needs_saliency(self) -> bool:
        return True

    def label(self, cues: Cues) -> Raster:
        strongest = np.asarray(cues.classes, np.uint8)[cues.scores.argmax(axis=0)]
        rest = np.where(cues.salient >= 0.5, IGNORE, 0)
        return np.where(cues.scores.max(axis=0) >= self.level, strongest, rest).astype(np.uint8)

    def describe(self) -> str:
        return f"the brightest class from {self.level:g}"


class Pointwise(SegmentationHead):
    """Two 1x1 convolutions on the last tap."""

    @dataclass(frozen=True)
    class Settings:
        width: Count = 8

        def describe(self) -> str:
            return f"pointwise network of {self.width} channels"

    def __init__(self, backbone: Backbone, settings: Settings, outputs: int) -> None:
        super().__init__(list(backbone.taps)[-1])
        self.layers = nn.Sequential(
            nn.Conv2d(backbone.out_channels, settings.width, 1), nn.ReLU(), nn.Conv2d(settings.width, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


def strided(settings: schema.Backbone) -> Backbone:
    """One convolution of stride 4."""
    stage = nn.Sequential(nn.Conv2d(3, 8, 5, 4, padding=2), nn.ReLU())
    return Backbone({"only": stage}, {"only": Tap(8, 4)}, settings.frozen_batch_norm, (nn.ReLU,))


@pytest.fixture
def registered() -> Iterator[None]:
    """The three, registered for the length of a test."""
    entries: list[tuple[Any, str, Any]] = [
        (RULES, "brightest", Brightest),
        (SEGMENTATIONS, "pointwise", Pointwise),
        (BACKBONES, "strided", strided),
    ]
    for registry, name, entry in entries:
        registry.register(name)(entry)
    yield
    for registry, name, _ in entries:
        del registry._loaded[name]


@pytest.mark.usefixtures("registered")
def test_from_tags_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other file names them: params, graph, stages and report find them by the registry."""
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    raw = minimal_params(make_tree(Path("data")), Path("data/Saliency"))
    raw["classifiers"]["base"] |= {"backbone": {"name": "strided", "output_stride": 4}, "head": {"convs": 0}}
    raw["pseudo_labels"]["cam"]["rule"] = {"brightest": {"level": 0.6}}
    raw["segmentations"]["cam"] |= {
        "backbone": {"name": "strided", "output_stride": 4},
        "network": {"pointwise": {"width": 5}},
    }
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    learn = ["--device", "cpu", "--threads", "1"]
    run("index", index.main, [])
    run("ground_truth", ground_truth.main, [])
    run("saliency", saliency.main, [])
    run("classifier", classifier.main, ["base", *learn])
    run("localization", localization.main, ["cam", *learn])
    run("pseudo_labels", pseudo_labels.main, ["cam"])
    run("segmentation", segmentation_stage.main, ["cam", *learn])
    run("prediction", prediction.main, ["cam", *learn])
    run("evaluation", evaluation.main, ["predictions/cam"])

    results = Path("results/test")
    images = Index(results / "index/index.json").images("train")
    labels = RasterStore(results / "pseudo_labels/cam/labels.h5")
    for image in images:
        assert set(np.unique(labels.get(image.id))) <= {0, IGNORE, *image.tags}
    assert any(set(image.tags) & set(np.unique(labels.get(image.id)).tolist()) for image in images)
    model = torch.load(results / "segmentations/cam/model.pt", weights_only=True)
    assert model["settings"]["network"] == {"pointwise": {"width": 5}}
    assert model["state"]["head.layers.0.weight"].shape == (5, 8, 1, 1)
    assert 0 <= json.loads((results / "evaluation/predictions/cam/scores.json").read_text())["miou"] <= 1

    graph = Graph(parameters.load([Path("params.yaml")]))
    trained = ("classifiers/base", "segmentations/cam")
    logs = {name: json.loads((results / name / "log.json").read_text()) for name in trained}
    provenance = protocol.provenance(graph.params, "cam", logs)
    assert provenance["Pseudo labels"] == "rule brightest, the brightest class from 0.6"
    assert provenance["Segmentation network"] == "pointwise network of 5 channels, strided from random weights"
    assert set(map(str, graph.find("pseudo_labels", "cam").inputs)) >= {"saliency"}
