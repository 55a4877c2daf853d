"""A model exported to ONNX gives the probabilities of the library, in onnxruntime, at any size of the photo."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import wsss
from pipeline.config import params
from pipeline.config.registry import ONE_STEP, SEGMENTATIONS
from pipeline.config.schema import OneStep, Segmentation, Test
from pipeline.data.loading import MEAN, NORMALISED, STD
from pipeline.inference.model_file import ModelFile
from pipeline.training import models
from wsss.onnx import export_onnx

TRAINING = {"batch_size": 1, "lr": 0.1, "epochs": 1, "precision": "fp32"}
SMALL = {"name": "small"}
BLOCKS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "deeplab_largefov": (Segmentation, {"network": {"deeplab_largefov": {"channels": 8, "rate": 2}}}),
    "deeplab_v2": (Segmentation, {"network": {"deeplab_v2": {"rates": [1, 2], "extra_scales": [0.5, 0.75]}}}),
    "deeplab_v3plus": (Segmentation, {"network": "deeplab_v3plus", "backbone": {"name": "resnet50"}}),
    "agen": (OneStep, {"network": {"agen": {"shared": ["conv2", "conv2"], "grid": 6, "agm_channels": [8, 8]}}}),
}


def build(name: str, flip: bool) -> wsss.Model:
    """An untrained model, whose batch norms are as after a training."""
    torch.manual_seed(0)
    kind, raw = BLOCKS[name]
    raw = {"training": TRAINING, **raw}
    if kind is Segmentation:
        raw = {"labels": "ground_truth", "backbone": SMALL, **raw}
    else:
        raw = {"backbones": {"classification": SMALL, "segmentation": SMALL}, **raw}
    network = models.build(params.read_block(kind, raw, name), 3).eval()
    metadata = {"normalisation": {"mean": MEAN.tolist(), "std": STD.tolist()}}
    content = ModelFile(network, ("cat", "dog", "bird"), NORMALISED, Test(flip=flip), 100, "fp32", metadata)
    return wsss.Model(content, torch.device("cpu"), content.test, content.megapixels)


def test_all_networks_are_tried() -> None:
    assert BLOCKS.keys() == {*SEGMENTATIONS.names(), *ONE_STEP.names()}


@pytest.mark.parametrize(("name", "flip"), [(name, name != "agen") for name in BLOCKS])
def test_onnxruntime_agrees(name: str, flip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.settings.has_bf16", lambda device: False)
    model = build(name, flip)
    path = tmp_path / "model.onnx"
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(model.classes)
    random = np.random.default_rng(0)
    for size in ((96, 128), (75, 101), (160, 49)):
        photo = random.integers(0, 255, (*size, 3)).astype(np.uint8)
        (probabilities,) = session.run(None, {"image": photo})
        expected = model.predict(photo)
        assert probabilities.shape == (4, *size)
        assert np.abs(probabilities - expected.probabilities).max() < 1e-3
        assert (probabilities.argmax(0) != expected.mask).mean() < 0.002


def test_without_its_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(wsss.PipelineError, match=r"onnxscript: is not installed; pip install 'wsss\[onnx\]'"):
        wsss.export_onnx(build("deeplab_largefov", False), tmp_path / "model.onnx")
