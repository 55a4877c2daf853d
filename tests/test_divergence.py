"""NaN, infinity and empty labels: a training ends before anything is published, and no such file is accepted."""

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import schema
from pipeline.config.params import load
from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.config.schema import Accumulate, Augmentation, Backbone, Training
from pipeline.data.geometry import Window
from pipeline.data.index import Image, Index
from pipeline.data.loading import Batch, TrainingSet
from pipeline.errors import PipelineError
from pipeline.inference.segment import segmentations
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.networks.backbones import build_backbone
from pipeline.networks.finite import check_outputs, not_finite
from pipeline.networks.vision import import_torchvision
from pipeline.runtime import Runtime
from pipeline.stores import manifest
from pipeline.stores.files import sha256
from pipeline.stores.raster import RasterStore, RasterWriter
from pipeline.training import models
from pipeline.training.loop import Loop, Stateless
from pipeline.workflow.fit import empty_labels
from pipeline.workflow.graph import Graph
from pipeline.workflow.stage import run
from tests.test_kill import SHORT, make_inputs, project  # noqa: F401
from tests.voc_tree import make_index

CPU = torch.device("cpu")
TRAININGS = [
    ("classifier", "base"),
    ("classifier", "drs"),
    ("classifier", "edam"),
    ("refinement", "drs"),
    ("affinity", "drs"),
    ("segmentation", "cam"),
    ("segmentation", "v2"),
    ("one_step", "agen"),
]
SECTIONS = {"refinement": "refinements", "affinity": "affinities", "segmentation": "segmentations"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index(make_index(tmp_path_factory.mktemp("tree"), train=9))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "name"), TRAININGS)
def test_no_training_publishes_weights_that_diverged_in_its_last_step(
    project: Path,  # noqa: F811
    stage: str,
    name: str,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only step of the training has a finite loss, and its update overflows."""
    make_inputs(stage)
    monkeypatch.setattr("pipeline.training.loop.learning_rate", lambda *_: math.inf)
    section = {"classifier": "classifiers", "one_step": "one_step"}.get(stage) or SECTIONS[stage]
    settings: dict[str, Any] = {
        section: {name: {"training": {"epochs": None, "iterations": 1, "precision": precision}}}
    }
    short = {**SHORT, section: SHORT.get(section, {}) | settings[section]}
    job = Graph(load([Path("params.yaml")], short)).find(stage, name)
    options = [name, "--device", "cpu", "--checkpoint-every", "0", "--set", json.dumps(short)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(stage, import_module(f"stages.{stage}").main, options)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {stage} {name}: ")
    assert line.endswith("NaN or infinity after step 0; lower training.lr")
    assert not any(path.exists() for path in job.outputs.values())
    assert not list(job.folder.glob(".checkpoint-*"))


class Scripted(Stateless):
    """A training of one weight whose losses a test gives; a weight that the loss does not use is set with the last."""

    def __init__(self, losses: Sequence[float], unused: float = 0.0) -> None:
        self.network = torch.nn.Linear(1, 1)
        self.network.register_buffer("unused", torch.zeros(()))
        self.losses, self.unused = list(losses), unused

    def about(self) -> dict[str, str]:
        return {}

    def new_layers(self) -> Sequence[torch.nn.Module]:
        return []

    def loss(self, batch: Batch, epoch: int) -> Tensor:
        value = self.losses.pop(0)
        if not self.losses:
            self.network.unused.fill_(self.unused)  # type: ignore[operator]
        return self.network.weight.sum() * 0 + value


def train(task: Scripted, index: Index, path: Path | None = None, **settings: Any) -> dict[str, Any]:
    data = TrainingSet(index.images("train")[:] * 5, 3, Augmentation(crop=20), seed=0)  # 45 images
    training = Training(1, 0.1, precision="fp32", **settings)
    return Loop(task, data, training, CPU, runtime=Runtime(checkpoint_every=1e9), path=path, label="x").run()


@pytest.mark.parametrize("step", [0, 7, 44, 60])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_ends_the_training_at_its_step(index: Index, tmp_path: Path, step: int, value: float) -> None:
    losses = [1.0] * 90
    losses[step] = value
    with pytest.raises(PipelineError, match=rf"^x: the loss is {value} at step {step}; lower training\.lr$"):
        train(Scripted(losses), index, tmp_path / "state", epochs=2)
    assert not (tmp_path / "state").exists()


def test_a_loss_between_two_optimizer_steps_ends_the_training(index: Index) -> None:
    losses = [1.0, math.nan, 1.0]
    with pytest.raises(PipelineError, match=r"^x: the loss is nan at step 0; lower training\.lr$"):
        train(Scripted(losses), index, iterations=1, accumulation=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_no_loss_uses_are_checked(index: Index, tmp_path: Path, value: float) -> None:
    with pytest.raises(PipelineError, match=r"^x: unused contains NaN or infinity after step 9; lower training\.lr$"):
        train(Scripted([1.0] * 10, value), index, tmp_path / "state", iterations=10)
    assert not (tmp_path / "state").exists()


def test_an_epoch_without_any_loss_is_reported(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    train(Scripted([0.0] * 45 + [1.0] * 45), index, epochs=2)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: x: the loss of epoch 1 is exactly 0: the network learned nothing, perhaps because all pixels of its "
        "labels are ignored"
    ]


class TestLabels:
    def store(self, path: Path, images: Sequence[Image], values: Sequence[int]) -> RasterStore:
        with RasterWriter(path, "labels") as writer:
            for image, value in zip(images, values, strict=True):
                writer.append(image.id, np.full((image.height, image.width), value, np.uint8))
        return RasterStore(path)

    @pytest.mark.parametrize(
        ("values", "warning"),
        [
            ([255] * 9, "{} ignores all pixels of all images, so that the network learns nothing; loosen its rule"),
            (
                [255] * 8 + [0],
                "{} labels no object pixels, so that the network learns background only; loosen its rule",
            ),
            ([0] * 8 + [2], None),
        ],
    )
    def test_what_is_missing_is_told(
        self, index: Index, tmp_path: Path, values: list[int], warning: str | None
    ) -> None:
        images = index.images("train")
        labels = self.store(tmp_path / "labels.h5", images, values)
        assert empty_labels(labels, images) == (warning and warning.format(labels.path))

    def test_a_stage_warns_before_it_trains_and_in_its_log(
        self,
        project: Path,  # noqa: F811
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Masks whose pixels are all ignored."""
        short = {"segmentations": {"cam": {"training": {"epochs": 1}}}}
        graph = Graph(load([Path("params.yaml")], short))
        labels = graph.find("ground_truth").outputs["labels"]
        images = Index(graph.find("index").outputs["index"]).images("train")
        self.store(labels, images, [255] * len(images))
        record = manifest.read(labels.parent) or {}
        manifest.write(labels.parent, **record | {"outputs": {labels.name: sha256(labels)}})
        options = ["cam", "--device", "cpu", "--set", json.dumps(short)]
        run("segmentation", import_module("stages.segmentation").main, options)
        warning = f"{labels} ignores all pixels of all images, so that the network learns nothing; loosen its rule"
        before, after = capsys.readouterr().out.split(f"warning: segmentation cam: {warning}\n")
        assert "segmentation cam: epoch" not in before
        assert "warning: segmentation cam: the loss of epoch 1 is exactly 0" in after
        log = json.loads(graph.find("segmentation", "cam").outputs["log"].read_text())
        assert log["warning"] == warning


class TestFiles:
    """Weights that are not finite, wherever they come from."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_user_supplied_weights(self, tmp_path: Path, value: float) -> None:
        path = tmp_path / "weights.pth"
        state = build_backbone(Backbone("small")).state_dict()
        state["stages.conv2.0.0.weight"].view(-1)[5] = value
        torch.save(state, path)
        with pytest.raises(PipelineError) as caught:
            build_backbone(Backbone("small", weights=str(path)))
        assert caught.value.lines == (f"{path}: stages.conv2.0.0.weight contains NaN or infinity; use another file",)

    def test_a_model(self, tmp_path: Path) -> None:
        block = schema.Segmentation(
            "ground_truth",
            Choice(SEGMENTATIONS, "deeplab_largefov", {"channels": 8}),
            Backbone("small"),
            Training(2, 0.1, epochs=1),
        )
        network = models.build(block, 3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.view(-1)[-1] = math.nan
        path = tmp_path / "model.pt"
        models.save(path, network, block, 3)
        with pytest.raises(PipelineError) as caught:
            models.load(path, 3, CPU)
        (line,) = caught.value.lines
        assert line.startswith(f"{path}: ")
        assert line.endswith(
            "more tensors contain NaN or infinity; delete it and train the network again with a lower training.lr"
        )

    def test_a_damaged_file_in_torchs_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch does not compare the hash of a file that it has downloaded before."""
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        vision = import_torchvision().models
        cached = tmp_path / "checkpoints" / vision.MobileNet_V2_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
        cached.parent.mkdir()
        torch.save(vision.mobilenet_v2(weights=None).state_dict(), cached)
        with pytest.raises(PipelineError) as caught:
            build_backbone(Backbone("mobilenet_v2", weights="imagenet"))
        digits = cached.stem[-8:]
        assert caught.value.lines == (f"{cached}: damaged: its sha256 does not start with {digits}; delete it",)


class TestOutputs:
    """Maps and labels are stored as integers, which cannot hold NaN: it is refused before."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_the_first_bad_image_is_named(self, index: Index, value: float) -> None:
        images = index.images("train")[:3]
        outputs = torch.zeros(3, 2, 4, 4)
        check_outputs(outputs, images)
        outputs[1, 1, 3, 3] = value
        with pytest.raises(PipelineError, match=rf"NaN or infinity for image {images[1].id}; train it again with"):
            check_outputs(outputs, images)

    def test_images_with_the_same_name_are_all_checked(self, index: Index) -> None:
        """Such as arrays, which have none."""
        images = [index.images("train")[0]] * 2
        outputs = torch.zeros(2, 2, 4, 4)
        outputs[0, 0, 0, 0] = math.nan
        with pytest.raises(PipelineError, match=f"for image {images[0].id}"):
            check_outputs(outputs, images)

    def test_a_prediction(self, index: Index) -> None:
        images = index.images("evaluation")[:1]

        class Network(torch.nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                return torch.full((len(inputs), 4, 5, 5), math.nan)

        with pytest.raises(PipelineError, match=f"for image {images[0].id}"):
            list(segmentations(Network(), images, schema.Test(), CPU, map))

    def test_cumulative_attention(self, index: Index) -> None:
        image = index.images("train")[0]
        accumulator = AttentionAccumulator([image], Accumulate(cells=4), epochs=1)
        tags = torch.zeros(1, 3)
        tags[0, image.tags[0] - 1] = 1
        maps = torch.ones(1, 3, 4, 4)
        maps[0, image.tags[0] - 1, 2, 2] = math.nan
        with pytest.raises(PipelineError, match=f"attention contains NaN or infinity for image {image.id}; lower"):
            accumulator.update(maps, torch.zeros(1, 3), tags, [image.id], [Window()], 0)


def test_not_finite_names_tensors_of_all_kinds() -> None:
    tensors = {
        "half": torch.tensor([1.0, math.inf], dtype=torch.float16),
        "whole": torch.tensor([3]),
        "empty": torch.zeros(0),
        "large": torch.tensor(1e300, dtype=torch.float64),
        "bf16": torch.tensor([[math.nan]], dtype=torch.bfloat16, requires_grad=True),
        "fine": torch.tensor([[-3e38]]),
    }
    assert not_finite(tensors) == ["half", "bf16"]
    assert not_finite({}) == []
