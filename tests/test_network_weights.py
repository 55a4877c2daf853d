"""Initial weights of backbones: torchvision's, a file's, and files that do not fit."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import schema
from pipeline.config.registry import SEGMENTATIONS, Choice
from pipeline.errors import PipelineError
from pipeline.networks.backbones import Backbone
from pipeline.networks.vision import import_torchvision
from pipeline.training import models
from tests.networks import build, randomise_batch_norms

MOBILENET_FILE = Path("../shared/weights/mobilenet_v2_imagenet_fp16.pth")


def first_conv(backbone: Backbone) -> Tensor:
    return next(module.weight for module in backbone.modules() if isinstance(module, nn.Conv2d))


class TestPublished:
    """With torchvision's state dict, every output is torchvision's."""

    @pytest.mark.parametrize(
        ("name", "stride", "replaced"),
        [
            ("resnet50", 32, [False, False, False]),
            ("resnet50", 16, [False, False, True]),
            ("resnet101", 8, [False, True, True]),
        ],
    )
    def test_resnet_is_torchvisions(self, name: str, stride: int, replaced: list[bool], tmp_path: Path) -> None:
        models = import_torchvision().models
        torch.manual_seed(0)
        published = getattr(models, name)(weights=None, replace_stride_with_dilation=replaced).eval()
        randomise_batch_norms(published)
        torch.save(published.state_dict(), tmp_path / "weights.pth")
        backbone = build(name, stride, weights=str(tmp_path / "weights.pth")).eval()
        extract = models._utils.IntermediateLayerGetter(published, {name: name for name in backbone.taps})
        x = torch.randn(1, 3, 49, 65)
        with torch.no_grad():
            expected = extract(x)
            for tap, value in backbone.features(x, list(backbone.taps)).items():
                torch.testing.assert_close(value, expected[tap])

    def test_mobilenet_is_torchvisions(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        published = import_torchvision().models.mobilenet_v2(weights=None).eval()
        randomise_batch_norms(published)
        torch.save(published.state_dict(), tmp_path / "weights.pth")
        backbone = build("mobilenet_v2", 32, weights=str(tmp_path / "weights.pth")).eval()
        x = torch.randn(1, 3, 65, 97)
        with torch.no_grad():
            for tap, end in {"stage1": 2, "stage2": 4, "stage3": 7, "stage4": 14, "stage5": 19}.items():
                torch.testing.assert_close(backbone.features(x, [tap])[tap], published.features[:end](x))

    def test_vgg16_is_torchvisions(self, tmp_path: Path) -> None:
        vgg = import_torchvision().models.vgg
        torch.manual_seed(0)
        published = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
        state = {f"features.{name}": value for name, value in published.state_dict().items()}
        torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
        backbone = build("vgg16", 16, weights=str(tmp_path / "weights.pth"))
        x = torch.randn(1, 3, 48, 64)
        with torch.no_grad():
            expected = published[:30](x)
        assert expected.any()
        torch.testing.assert_close(backbone(x), expected)


TRAINING = schema.Training(2, 0.1, epochs=1)
SMALL = schema.Backbone("small", frozen_batch_norm=True)
HEAD = schema.Head(1, 8)
NETWORKS: dict[str, models.Block] = {
    "classifier": schema.Classifier(SMALL, TRAINING, head=HEAD),
    "suppressed": schema.Classifier(SMALL, TRAINING, head=HEAD, suppression=schema.Suppression()),
    "integral": schema.Refinement("classifiers/base", SMALL, TRAINING, head=HEAD),
    "largefov": schema.Segmentation(
        "ground_truth", Choice(SEGMENTATIONS, "deeplab_largefov", {"channels": 8}), SMALL, TRAINING
    ),
    "v3plus": schema.Segmentation(
        "ground_truth", Choice(SEGMENTATIONS, "deeplab_v3plus", {"channels": 8, "rates": [1, 2, 3]}), SMALL, TRAINING
    ),
}


class TestWholeNetworks:
    """Of a network around a backbone, the backbone is taken."""

    def test_torchvisions_segmentation_network(self, tmp_path: Path) -> None:
        """In the layout of its COCO files, at their stride 8, with auxiliary classifier."""
        torch.manual_seed(0)
        published = import_torchvision().models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=True
        )
        published = published.eval()
        randomise_batch_norms(published)
        state = published.state_dict()
        assert {name.split(".")[0] for name in state} == {"backbone", "classifier", "aux_classifier"}
        heads = {name: torch.zeros(0) for name in state if "classifier" in name}
        torch.save(state | heads, tmp_path / "coco.pth")
        backbone = build("resnet50", weights=str(tmp_path / "coco.pth")).eval()
        x = torch.randn(1, 3, 49, 65)
        with torch.no_grad():
            torch.testing.assert_close(backbone(x), published.backbone(x)["out"])

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("plain", [False, True], ids=["model.pt", "state dict"])
    def test_a_network_of_ours(self, name: str, plain: bool, tmp_path: Path) -> None:
        torch.manual_seed(0)
        network = models.build(NETWORKS[name], 3)
        randomise_batch_norms(network)
        if plain:
            torch.save(network.state_dict(), tmp_path / "model.pt")
        else:
            models.save(tmp_path / "model.pt", network, NETWORKS[name], 3)
        found = build("small", weights=str(tmp_path / "model.pt")).state_dict()
        expected = network.get_submodule("backbone").state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)

    def test_another_backbone_is_refused(self, tmp_path: Path) -> None:
        models.save(tmp_path / "model.pt", models.build(NETWORKS["largefov"], 3), NETWORKS["largefov"], 3)
        with pytest.raises(PipelineError, match=r"model\.pt: does not fit the backbone: .* and \d+ more$"):
            build("mobilenet_v2", weights=str(tmp_path / "model.pt"))

    @pytest.mark.parametrize("start", ["", "base.", "module.base."])
    def test_a_caffe_network_is_refused_in_one_line(self, start: str, tmp_path: Path) -> None:
        path = tmp_path / "deeplabv1_resnet101-coco.pth"
        names = ["layer1.conv1.conv.weight", "layer2.block1.reduce.conv.weight", "layer2.block1.conv3x3.conv.weight"]
        torch.save({start + name: torch.zeros(1) for name in names}, path)
        with pytest.raises(PipelineError) as caught:
            build("resnet101", weights=str(path))
        assert caught.value.lines == (
            f"{path}: was converted from Caffe (BGR input, strides in the 1x1 convolutions) and does not fit the"
            " backbone; use a file in torchvision's layout, or 'imagenet'",
        )


STATE = build("small").state_dict()


def under(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


class TestWrappings:
    """The forms in which public code saves a network."""

    @pytest.mark.parametrize(
        "content",
        [
            under("module."),
            {"state_dict": STATE, "epoch": 3},
            {"model": STATE},
            {"network": STATE},
            {"model": {"state_dict": STATE}, "args": {"lr": 0.1}},
            {
                "state_dict": under("module."),
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
                "arch": "x",
            },
            {
                "state_dict": under("model.backbone.") | {"model.head.weight": torch.ones(3)},
                "hyper_parameters": {"a": 1},
            },
            {"state_dict": under("module.encoder_q.") | {"module.queue": torch.ones(3)}},
            {"state_dict": STATE, "state_dict_ema": under("", {name: 0 * value for name, value in STATE.items()})},
            under("encoder."),
            under("_orig_mod."),
            {**STATE, "epoch": 3},
            {"model": {name: value.numpy() for name, value in STATE.items()}, "__author__": "x"},
        ],
        ids=lambda content: ", ".join(list(content)[:3]),
    )
    def test_are_opened(self, content: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        loaded = build("small", weights=str(path)).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in STATE.items())

    def test_arrays_of_numpy(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "weights.npz", **{name: value.numpy() for name, value in STATE.items()})
        loaded = build("small", weights=str(tmp_path / "weights.npz")).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in STATE.items())

    @pytest.mark.parametrize("prefix", ["module.", "encoder.", "module.encoder.features_of."])
    @pytest.mark.parametrize("head", ["fc.weight", "head.fc.weight", "classifier.1.weight"])
    def test_torchvisions_names_under_a_prefix(self, prefix: str, head: str, tmp_path: Path) -> None:
        torch.manual_seed(1)
        published = import_torchvision().models.resnet50(weights=None).state_dict()
        backbone = {name: value for name, value in published.items() if not name.startswith("fc.")}
        torch.save({"state_dict": under(prefix, {**backbone, head: torch.ones(2)})}, tmp_path / "w.pth")
        loaded = build("resnet50", weights=str(tmp_path / "w.pth"))
        assert torch.equal(first_conv(loaded), published["conv1.weight"])

    def test_two_backbones_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "moco.pth"
        torch.save({"state_dict": under("module.encoder_q.") | under("module.encoder_k.")}, path)
        with pytest.raises(PipelineError) as caught:
            build("small", weights=str(path))
        assert caught.value.lines == (
            f"{path}: holds the backbone 2 times, under 'module.encoder_q.', 'module.encoder_k.'; "
            "save the one to use with torch.save(state_dict, ...)",
        )

    def test_code_in_a_file_does_not_run(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "attacked"),)

        torch.save({"state_dict": STATE, "extra": Attack()}, tmp_path / "w.pth")
        with pytest.raises(PipelineError, match=r"contains more than tensors \(posix\.mkdir\)"):
            build("small", weights=str(tmp_path / "w.pth"))
        assert not (tmp_path / "attacked").exists()


class TestFiles:
    @pytest.mark.parametrize("name", ["vgg16", "resnet50", "resnet38", "mobilenet_v2", "small"])
    def test_own_weights_in_half_precision_load_from_a_file(self, name: str, tmp_path: Path) -> None:
        torch.manual_seed(1)
        state = {
            key: value.half() if value.is_floating_point() else value for key, value in build(name).state_dict().items()
        }
        torch.save(state, tmp_path / "weights.pth")
        loaded = build(name, weights=str(tmp_path / "weights.pth")).state_dict()
        assert list(loaded) == list(state)
        for key, value in loaded.items():
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, state[key].to(value.dtype)), key

    def test_published_float16_file_loads(self) -> None:
        if not MOBILENET_FILE.exists():
            pytest.skip(f"{MOBILENET_FILE} is missing")
        state = torch.load(MOBILENET_FILE, weights_only=True)
        backbone = build("mobilenet_v2", weights=str(MOBILENET_FILE))
        assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
        assert torch.equal(first_conv(backbone), state["features.0.0.weight"].float())
        last = backbone.state_dict()["stages.stage5.18.0.weight"]
        assert torch.equal(last, state["features.18.0.weight"].float())

    def test_all_faults_in_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        state = build("small").state_dict()
        faults = {f"stages.conv2.{name}": torch.zeros(1) for name in "abcd"}
        missing = [key for key in state if key != "stages.conv6.1.0.weight"]
        torch.save({key: state[key] for key in missing} | faults, path)
        with pytest.raises(PipelineError) as caught:
            build("small", weights=str(path))
        assert str(caught.value) == (
            f"{path}: does not fit the backbone: stages.conv6.1.0.weight is missing; "
            "stages.conv2.a is unexpected; stages.conv2.b is unexpected and 2 more"
        )

    def test_another_shape_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(build("small").state_dict() | {"stages.conv2.0.0.weight": torch.zeros(32, 1, 3, 3)}, path)
        with pytest.raises(PipelineError, match=r"stages\.conv2\.0\.0\.weight is 32x1x3x3, not 32x3x5x5"):
            build("small", weights=str(path))

    def test_another_networks_weights_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save({"fc.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, path)
        with pytest.raises(PipelineError, match="does not fit") as caught:
            build("vgg16", weights=str(path))
        assert "fc.weight" not in str(caught.value)

    def test_a_file_without_batch_counts_loads(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        state = build("small").state_dict()
        torch.save({key: value for key, value in state.items() if "num_batches_tracked" not in key}, path)
        assert torch.equal(first_conv(build("small", weights=str(path))), state["stages.conv2.0.0.weight"])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "missing"),
            (b"", "damaged"),
            (b"\x89PNG not weights", "damaged"),
            ([1, 2], "contains no state dict"),
            ({"state_dict": {}}, "contains no state dict"),
            ({"state": {}, "num_classes": 3}, "contains no state dict"),
            ({"state": {"epoch": 3}}, "contains no state dict"),
            (
                {"epoch": 3, "arch": "vgg16"},
                r"contains no state dict but the keys epoch \(int\), arch \(str\); save one",
            ),
            ({"path": Path("x")}, r"contains more than tensors \(pathlib\.PosixPath\), which is not unpickled"),
            ({"args": Namespace(lr=1)}, r"contains more than tensors \(argparse\.Namespace\), which is not unpickled"),
            (
                {"student": {"a.w": torch.ones(1)}, "teacher": {"a.w": torch.ones(1)}},
                r"2 state dicts \(student, teacher\)",
            ),
            ({"objects": np.array([{}])}, "damaged or contains more than tensors"),
            (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
            (b"\x12\x01" + bytes(70), "is MXNet parameters"),
            (b"\x89HDF\r\n\x1a\n" + bytes(70), "is HDF5"),
            (b"\x1f\x8b\x08" + bytes(70), "is compressed with gzip"),
            (b"\x10" + bytes(7) + b'{"a":{"dtype":"F32"}}', "is a safetensors file"),
        ],
    )
    def test_what_is_no_state_dict_is_refused(self, content: object, message: str, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(PipelineError, match=message) as caught:
            build("small", weights=str(path))
        assert len(caught.value.lines) == len(str(caught.value).splitlines()) == 1
        assert str(path) in str(caught.value)

    def test_imagenet_without_a_network_names_the_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def offline(*_: Any, **__: Any) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(PipelineError, match=r"checkpoints/vgg16-\w+\.pth: is missing .*; save https://") as caught:
            build("vgg16", weights="imagenet")
        assert str(tmp_path) in str(caught.value)

    def test_imagenet_weights_are_checked_and_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        published = import_torchvision().models.mobilenet_v2(weights=None).state_dict()

        def download(url: str, **options: Any) -> dict[str, Tensor]:
            assert "mobilenet_v2" in url
            assert options["check_hash"]
            assert options["weights_only"]
            return published

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
        backbone = build("mobilenet_v2", weights="imagenet")
        assert torch.equal(first_conv(backbone), published["features.0.0.weight"])

    @pytest.mark.parametrize("name", ["resnet38", "small"])
    def test_imagenet_where_none_is_published(self, name: str) -> None:
        with pytest.raises(PipelineError, match="no library publishes any for this backbone"):
            build(name, weights="imagenet")
