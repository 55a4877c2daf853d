"""Files of networks, and the stages that compute with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import schema
from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.config.schema import Backbone, Classifier, Head, Refinement, Segmentation, Training
from pipeline.config.views import Localization
from pipeline.data.index import Index
from pipeline.errors import PipelineError
from pipeline.runtime import Runtime
from pipeline.stores.raster import RasterStore
from pipeline.training import models
from pipeline.workflow.graph import Job
from pipeline.workflow.stage import Work
from stages import localization, prediction
from tests.test_inference import CPU, K, exact  # noqa: F401
from tests.voc_tree import make_index

TRAINING = Training(batch_size=2, lr=0.1, epochs=1)
LARGE_FOV = Choice(SEGMENTATIONS, "deeplab_largefov", {"channels": 8, "rate": 2})
BLOCKS: list[Any] = [
    Classifier(Backbone("small"), TRAINING, head=Head(1, 8)),
    Refinement("classifiers/base", Backbone("small", output_stride=4), TRAINING, head=Head(0, 8)),
    Segmentation("ground_truth", LARGE_FOV, Backbone("small"), TRAINING),
]


def file_of(block: Any, path: Path) -> nn.Module:
    torch.manual_seed(0)
    network = models.build(block, K)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean.normal_()
    models.save(path, network, block, K)
    return network.eval()


class TestModels:
    @pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
    def test_what_is_saved_is_loaded(self, tmp_path: Path, block: Any) -> None:
        network = file_of(block, tmp_path / "model.pt")
        loaded = models.load(tmp_path / "model.pt", K, CPU)
        assert type(loaded) is type(network)
        assert not loaded.training
        state, expected = loaded.state_dict(), network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        x = torch.randn(1, 3, 32, 40)
        one, other = (getattr(found, "maps", found) for found in (network(x), loaded(x)))
        torch.testing.assert_close(one, other)

    def test_initial_weights_are_not_asked_for_again(self, tmp_path: Path) -> None:
        """The file that training started from may be gone."""
        network = models.build(BLOCKS[0], K)
        block = Classifier(Backbone("small", weights="gone.pth"), TRAINING, head=Head(1, 8))
        models.save(tmp_path / "model.pt", network, block, K)
        assert models.load(tmp_path / "model.pt", K, CPU)

    def test_another_number_of_classes_is_refused(self, tmp_path: Path) -> None:
        file_of(BLOCKS[0], tmp_path / "model.pt")
        with pytest.raises(PipelineError, match=r"model\.pt: was trained on 3 classes, the dataset has 20"):
            models.load(tmp_path / "model.pt", 20, CPU)


class TestStages:
    """The two stages on a small tree with untrained networks."""

    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        return make_index(tmp_path / "tree", train=5, evaluation=3)

    def work(self, folder: Path, index: Path, block: Any, settings: Any, output: str) -> Work:
        file_of(block, folder / "model.pt")
        inputs = {"index": index, "model": folder / "model.pt"}
        stores = {name: folder / f"{name}.h5" for name in (output, "doubt")}
        outputs = {**stores, "model": folder / "model.safetensors"}
        values = {"experiment": "test", "seed": 0, "dataset.working_megapixels": 2.5}
        job = Job("test", "x", inputs, outputs, values, settings, used_blocks=(block,))
        return Work(job, inputs, outputs, Runtime(device="cpu", threads=1), "", folder / "checkpoint")

    def test_localization_covers_the_training_images(self, tmp_path: Path, index: Path) -> None:
        settings = Localization("classifiers/base", scales=(1.0, 0.5), flip=True)
        localization.main(self.work(tmp_path, index, BLOCKS[0], settings, "maps"))
        store = RasterStore(tmp_path / "maps.h5")
        images = Index(index).images("train")
        assert list(store) == [image.id for image in images]
        assert [tuple(store.classes(image.id)) for image in images] == [image.tags for image in images]
        assert store.get("img_003", 1).shape == (6, 8)

    @pytest.mark.parametrize(("number", "stage"), [(0, "localization"), (2, "prediction")])
    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    def test_a_network_is_used_in_the_precision_of_its_training(
        self, tmp_path: Path, index: Path, number: int, stage: str, precision: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def note(device: torch.device, wanted: str) -> torch.autocast:
            asked.append(wanted)
            return torch.autocast(device.type, torch.bfloat16, enabled=False)

        for module in ("localize", "segment"):
            monkeypatch.setattr(f"pipeline.inference.{module}.autocast", note)
        block = replace(BLOCKS[number], training=replace(TRAINING, precision=precision))
        if stage == "localization":
            localization.main(self.work(tmp_path, index, block, Localization("classifiers/base"), "maps"))
        else:
            prediction.main(self.work(tmp_path, index, block, schema.Test(), "labels"))
        assert set(asked) == {precision}

    def test_prediction_covers_the_evaluation_images(self, tmp_path: Path, index: Path) -> None:
        prediction.main(self.work(tmp_path, index, BLOCKS[2], schema.Test(flip=True), "labels"))
        store = RasterStore(tmp_path / "labels.h5")
        assert list(store) == [image.id for image in Index(index).images("evaluation")]
        assert all(store.get(name).shape == (24, 32) and store.get(name).max() <= K for name in store)
        doubt = RasterStore(tmp_path / "doubt.h5")
        assert list(doubt) == list(store)
        assert all(doubt.classes(name) == [0] and doubt.get(name).shape == (3, 4) for name in doubt)
