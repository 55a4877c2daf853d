"""Images without a class, from the tags to the masks: they are learned from and are background throughout."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from pipeline.config import schema
from pipeline.config.views import Climbing, Localization
from pipeline.data.build_index import build_index
from pipeline.data.index import Index, write
from pipeline.data.sampling import epoch_order
from pipeline.errors import PipelineError
from pipeline.inference.localize import localization_maps
from pipeline.methods.oaa import passes
from pipeline.refinement.affinity import affinity_loss
from pipeline.stores.raster import RasterStore
from pipeline.training import models
from pipeline.training.segmentation import segmentation_loss
from pipeline.workflow.stage import run
from stages import classifier, evaluation, ground_truth, index, localization, prediction, pseudo_labels, saliency
from stages import segmentation as segmentation_stage
from tests.project import link_code
from tests.voc_tree import make_index, make_tree, minimal_params

Edit = Callable[[dict[str, Any]], dict[str, Any]]


def edit_tags(root: Path, edit: Edit) -> None:
    path = root / "tags.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def test_from_negatives_to_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    link_code(tmp_path)
    dataset = make_tree(Path("data"), train=6)
    negatives = ("img_001", "img_004")
    edit_tags(Path("data"), lambda tags: tags | {name: [] for name in negatives})
    for name in negatives:  # salient, but of no class
        cv2.imwrite(f"data/Saliency/{name}.png", np.full((24, 32), 255, np.uint8))
    raw = minimal_params(dataset, Path("data/Saliency"))
    raw["dataset"]["contradictions"] = "warn"
    raw["classifiers"]["base"] |= {"attention_drop": {"beta": 1.0}, "accumulate": {"skip_epochs": 0}}
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
    for target in ("localizations/cam", "pseudo_labels/cam", "predictions/cam"):
        run("evaluation", evaluation.main, [target])
    results = Path("results/test")
    labels = RasterStore(results / "pseudo_labels/cam/labels.h5")
    maps = RasterStore(results / "localizations/cam/maps.h5")
    for name in negatives:
        assert not labels.get(name).any()
        assert maps.maps(name) == {}
    census = json.loads((results / "index/dataset.json").read_text())
    assert census["splits"]["train"]["negatives"] == 2


def test_an_image_without_an_entry_is_refused_unless_it_is_said_to_be_a_negative(tmp_path: Path) -> None:
    dataset = make_tree(tmp_path)
    edit_tags(tmp_path, lambda tags: {name: ids for name, ids in tags.items() if name != "img_001"})
    with pytest.raises(PipelineError, match=r"has no entry for img_001; tag it or unlist it, or set dataset\.untagged"):
        build_index(dataset)
    survey = build_index(replace(dataset, untagged="negative"))
    assert survey.index["images"]["img_001"]["tags"] == []
    assert "1 listed images have no entry in tags.json and count as without a class" in survey.census.remarks


@pytest.mark.parametrize("climbing", [None, Climbing(iterations=1)])
def test_a_batch_of_negatives_has_no_maps(tmp_path: Path, climbing: Climbing | None) -> None:
    path = make_index(tmp_path, train=2, evaluation=1)
    raw = json.loads(path.read_text())
    for entry in raw["images"].values():
        entry["tags"] = []
    write(path, raw)
    block = schema.Classifier(schema.Backbone("small"), schema.Training(2, 0.1, epochs=1))
    network = models.build(block, 3).eval()
    settings = Localization("classifiers/base", climbing=climbing)
    images = Index(path).images("train")
    assert list(localization_maps(network, images, settings=settings, device=torch.device("cpu"))) == []


def test_losses_and_gates_of_images_without_a_class() -> None:
    logits, tags = torch.randn(2, 3), torch.zeros(2, 3)
    assert not any(passes(logits, tags, gate).any() for gate in ("strict", "top_n", "none"))
    edges = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert affinity_loss(edges, torch.zeros(2, 8, 8), 3).isfinite()
    scores = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = segmentation_loss([scores], torch.zeros(2, 8, 8, dtype=torch.long), tags, "input", self_training=True)
    assert loss.isfinite()
    order = epoch_order([(), (1,), (), (1,), ()], 2, 0, 0)
    assert sorted(order.tolist()) == list(range(5))
    assert sorted(epoch_order([()] * 5, 2, 0, 0).tolist()) == list(range(5))
