"""Networks on backbones from timm: methods, segmentation heads, model files and ONNX."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wsss
from pipeline.config import params, schema
from pipeline.config.registry import METHODS, SEGMENTATIONS, Choice
from pipeline.data.loading import MEAN, NORMALISED, STD
from pipeline.errors import PipelineError
from pipeline.inference.model_file import ModelFile
from pipeline.networks.vision import import_torchvision
from pipeline.training import models
from tests.networks import on_meta

os.environ["HF_HUB_OFFLINE"] = "1"
import_torchvision()
pytest.importorskip("timm")


def classifier(name: str, stride: int, method: str = "cam", **block: Any) -> schema.Classifier:
    training = schema.Training(2, 0.1, epochs=1)
    backbone = schema.Backbone(f"timm:{name}", stride)  # type: ignore[arg-type]
    head = schema.Head(0)
    return schema.Classifier(backbone, training, Choice(METHODS, method, block.pop("settings", {})), head, **block)


class TestMethods:
    @pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "mobilevit_xxs"])
    @pytest.mark.parametrize("method", ["cam", "seam", "amr", "amr_stem"])
    def test_a_step_of_each(self, name: str, method: str) -> None:
        settings = {"settings": {"shared": "stem"}} if method == "amr_stem" else {}
        block = classifier(name, 16, method.partition("_")[0], suppression=schema.Suppression(), **settings)
        torch.manual_seed(0)
        network = models.build(block, 3)
        loss, output = network.training_step(torch.randn(2, 3, 65, 65), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), 0)  # type: ignore[operator]
        assert output.maps.shape == (2, 3, 5, 5)
        loss.backward()
        assert loss.isfinite()

    def test_irn_takes_all_taps(self) -> None:
        training = schema.Training(2, 0.1, epochs=1)
        affinity = schema.Affinity("pseudo_labels/x", schema.Backbone("timm:tf_efficientnet_lite0", 16), training)
        network = on_meta(lambda: models.build(affinity, 3)).eval()
        assert network(torch.empty(1, 3, 65, 81, device="meta")).shape == (1, 1, 17, 21)

    @pytest.mark.parametrize("head", SEGMENTATIONS.names())
    def test_segmentation_heads_take_it(self, head: str) -> None:
        training = schema.Training(2, 0.1, epochs=1)
        backbone = schema.Backbone("timm:convnext_atto", 16)
        block = schema.Segmentation("ground_truth", Choice(SEGMENTATIONS, head), backbone, training)
        network = on_meta(lambda: models.build(block, 3)).eval()
        found = network(torch.empty(1, 3, 65, 81, device="meta"))
        assert found.shape[1] == 4

    def test_a_model_file_holds_the_normalisation(self, tmp_path: Path) -> None:
        """A model loads with the mean and deviation that it was trained with, whatever timm says by then."""
        block = classifier("tf_efficientnet_lite0", 16)
        network = models.build(block, 3)
        scale: Tensor = network.backbone.stages.stage1.normalise.scale  # type: ignore[union-attr]
        assert scale.flatten().tolist() == pytest.approx((STD / 0.5).tolist())
        scale *= 2
        models.save(tmp_path / "model.pt", network, block, 3)
        loaded = models.load(tmp_path / "model.pt", 3, torch.device("cpu"))
        assert torch.equal(loaded.backbone.stages.stage1.normalise.scale, scale)  # type: ignore[union-attr]

    def test_a_model_of_another_timm_is_refused_in_one_line(self, tmp_path: Path) -> None:
        block = classifier("resnet18", 16)
        network = models.build(block, 3)
        models.save(tmp_path / "model.pt", network, block, 3)
        content = torch.load(tmp_path / "model.pt", weights_only=True)
        content["state"]["backbone.stages.stage1.other"] = content["state"].pop("backbone.stages.stage1.conv1.weight")
        with pytest.raises(PipelineError, match=r"m: does not fit the network that this version builds \(2 names"):
            models.rebuild(content, "m", torch.device("cpu"))


@pytest.mark.slow
def test_onnx_has_the_normalisation_and_the_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with TensorFlow's padding and a mean of 0.5, on photos of any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pipeline.training.settings.has_bf16", lambda device: False)
    raw = {
        "labels": "ground_truth",
        "network": {"deeplab_largefov": {"channels": 8, "rate": 2}},
        "backbone": {"name": "timm:tf_mobilenetv3_small_minimal_100", "output_stride": 16},
        "training": {"batch_size": 1, "lr": 0.1, "epochs": 1, "precision": "fp32"},
    }
    torch.manual_seed(0)
    network = models.build(params.read_block(schema.Segmentation, raw, "block"), 3).eval()
    metadata = {"normalisation": {"mean": MEAN.tolist(), "std": STD.tolist()}}
    content = ModelFile(network, ("cat", "dog", "bird"), NORMALISED, schema.Test(), 100, "fp32", metadata)
    model = wsss.Model(content, torch.device("cpu"), content.test, content.megapixels)
    wsss.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    for size in ((96, 128), (75, 101), (160, 49)):
        photo = random.integers(0, 255, (*size, 3)).astype(np.uint8)
        (probabilities,) = session.run(None, {"image": photo})
        assert np.abs(probabilities - model.predict(photo).probabilities).max() < 1e-3
