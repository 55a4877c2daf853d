"""Backbones from timm: one contract over families, their weights and normalisation, and networks that are refused."""

import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import params, schema
from pipeline.config.registry import BACKBONES
from pipeline.data.loading import MEAN, normalise, resize
from pipeline.errors import PipelineError
from pipeline.networks.backbones import Backbone, backbone_faults
from pipeline.networks.timm_backbone import Normalise, Stage, TimmWeights
from pipeline.networks.vision import import_torchvision
from tests.networks import build, on_meta, randomise_batch_norms

os.environ["HF_HUB_OFFLINE"] = "1"
import_torchvision()
timm = pytest.importorskip("timm")

WEIGHTS = Path("../shared/weights")
VOC = Path("../shared/data/voc12_mini/JPEGImages")
# Family: a small network, the output strides it supports, and the layers of DRS and the residual blocks
FAMILIES: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "resnet": ("resnet18", (8, 16, 32), 1 + 8, 8),
    "resnest": ("resnest14d", (8, 16, 32), 3 + 4, 4),
    "res2net": ("res2net50_48w_2s", (16,), 1 + 16, 16),
    "regnet": ("regnety_002", (8, 16, 32), 1 + 13, 13),
    "resnetv2": ("resnetv2_18d", (8, 16, 32), 2 + 8, 8),
    "efficientnet": ("tf_efficientnet_lite0", (8, 16, 32), 1 + 16, 16),
    "mobilenetv3": ("mobilenetv3_small_050", (8, 16, 32), 1 + 12, 12),
    "convnext": ("convnext_atto", (8, 16, 32), 12, 12),
    "densenet": ("densenet121", (32,), 1 + 2 * 58 + 3 + 1, 0),
    "hrnet": ("hrnet_w18_small", (4,), 3, 0),
    "vgg": ("vgg11_bn", (32,), 8 + 1, 0),
    "mobilevit": ("mobilevit_xxs", (8, 16, 32), 5, 0),
}
CASES = [(name, stride) for name, strides, *_ in FAMILIES.values() for stride in {strides[0], strides[-1]}]


def small(name: str) -> Backbone:
    torch.manual_seed(0)
    strides = next(strides for each, strides, *_ in FAMILIES.values() if each == name)
    return build(f"timm:{name}", 16 if 16 in strides else strides[-1])


class TestContract:
    @pytest.mark.parametrize(("name", "output_stride"), CASES)
    def test_taps_tell_channels_and_strides(self, name: str, output_stride: int) -> None:
        backbone = on_meta(partial(build, f"timm:{name}", output_stride)).eval()
        info = on_meta(partial(timm.create_model, name, features_only=True)).feature_info
        expected = info.channels() if "hrnet" not in name else [64, 128, 16 + 32 + 64 + 128]
        assert [tap.channels for tap in backbone.taps.values()] == expected
        assert backbone.out_stride == output_stride
        for height, width in ((65, 81), (97, 33), (64, 96)):
            x = torch.empty(1, 3, height, width, device="meta")
            for tap, value in backbone.features(x, list(backbone.taps)).items():
                channels, stride = backbone.taps[tap]
                assert value.shape == (1, channels, -(-height // stride), -(-width // stride))

    @pytest.mark.parametrize("name", [name for name, *_ in FAMILIES.values()])
    def test_features_are_timms(self, name: str) -> None:
        """On an image that needs no padding, in the network's own normalisation, with the same weights and stride."""
        torch.manual_seed(0)
        backbone = small(name).eval()
        options = {} if backbone.out_stride in (4, 32) else {"output_stride": backbone.out_stride}
        reference = timm.create_model(name, features_only=True, **options).eval()
        randomise_batch_norms(backbone)
        for ours, theirs in zip(_published(backbone), reference.state_dict().items(), strict=False):
            assert ours[0].endswith(theirs[0]), (ours[0], theirs[0])
        if "hrnet" not in name:
            assert len(_published(backbone)) == len(reference.state_dict())
        state = dict(zip(reference.state_dict(), (value for _, value in _published(backbone)), strict=False))
        reference.load_state_dict(state, strict="hrnet" not in name)
        levels = torch.randint(0, 256, (1, 3, 64, 96))
        mean, std = (
            torch.tensor(each).view(3, 1, 1)
            for each in (reference.pretrained_cfg["mean"], reference.pretrained_cfg["std"])
        )
        images = normalise(levels[0].permute(1, 2, 0).numpy().astype(np.uint8))[None]
        with torch.no_grad():
            if "hrnet" in name:
                reference.incre_modules = None
                _, *branches = reference((levels / 255 - mean) / std)
                finest = branches[0].shape[2:]
                expected = [torch.cat([F.interpolate(each, finest, mode="bilinear") for each in branches], 1)]
            else:
                expected = reference((levels / 255 - mean) / std)
            found = list(backbone.features(images, list(backbone.taps)).values())[-len(expected) :]
        for ours, theirs in zip(found, expected, strict=True):
            assert float(theirs.std()) > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))

    @pytest.mark.parametrize("name", [name for name, *_ in FAMILIES.values()])
    def test_training_reaches_every_layer(self, name: str) -> None:
        """In bf16, channels last, with frozen batch norms, on an image whose sides are odd."""
        torch.manual_seed(0)
        stride = small(name).out_stride
        backbone = build(f"timm:{name}", stride, frozen_batch_norm=True)
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert not any(norm.training for norm in norms)
        assert not any(value.requires_grad for norm in norms for value in norm.parameters())
        x = torch.randn(2, 3, 65, 49).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = backbone(x)
        assert y.shape[1:] == (backbone.out_channels, -(-65 // stride), -(-49 // stride))
        y.float().square().mean().backward()
        for key, parameter in backbone.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key

    @pytest.mark.parametrize(("name", "layers", "blocks"), [(each[0], each[2], each[3]) for each in FAMILIES.values()])
    def test_drs_and_amr_find_their_places(self, name: str, layers: int, blocks: int) -> None:
        backbone = on_meta(partial(small, name))
        found = backbone.layers()
        assert all(found.values())
        assert sum(map(len, found.values())) == layers
        increments = sum(map(len, backbone.increments().values()))
        assert increments == (blocks or layers)
        assert bool(backbone.residuals) is bool(blocks)

    @pytest.mark.parametrize("name", ["regnety_002", "tf_efficientnet_lite0", "convnext_atto", "hrnet_w18_small"])
    def test_increments_are_what_a_block_adds(self, name: str) -> None:
        """Zero increments turn a block that keeps its input's shape into its shortcut."""
        backbone = small(name).eval()
        if not backbone.residuals:
            pytest.skip("each stage is one layer")
        blocks = {
            module: backbone.residuals[type(module)]
            for module in backbone.modules()
            if type(module) in backbone.residuals
        }
        inputs: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for block, branch in blocks.items():
            block.get_submodule(branch).register_forward_hook(lambda _module, _inputs, output: output * 0)
            block.register_forward_hook(
                lambda module, given, output: inputs.update({module: (given[0].clone(), output)})
            )
        with torch.no_grad():
            backbone(torch.randn(1, 3, 64, 64))
        same = [pair for pair in inputs.values() if pair[0].shape == pair[1].shape]
        assert len(inputs) == len(blocks)
        identities = [torch.equal(before, after) or torch.equal(before.relu(), after) for before, after in same]
        assert sum(identities) >= len(same) // 2
        for before, after in same:
            assert torch.equal(before.relu(), after) or torch.equal(before, after) or not after.any()

    @pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "regnetx_002"])
    def test_dilation_computes_what_the_stride_skipped(self, name: str) -> None:
        torch.manual_seed(0)
        strided, dilated = (build(f"timm:{name}", stride).double().eval() for stride in (32, 16))
        randomise_batch_norms(strided)
        dilated.load_state_dict(strided.state_dict())
        x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(dilated(x)[..., ::2, ::2], strided(x))

    @pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
    def test_without_dilation_only_strides_change(self, name: str) -> None:
        plain, dilated = (on_meta(partial(build, f"timm:{name}", 8, dilated=each)) for each in (False, True))
        assert max(max(conv.dilation) for conv in plain.modules() if isinstance(conv, nn.Conv2d)) == 1
        assert max(max(conv.dilation) for conv in dilated.modules() if isinstance(conv, nn.Conv2d)) > 1
        x = torch.empty(1, 3, 65, 81, device="meta")
        assert plain.eval()(x).shape == dilated.eval()(x).shape == (1, plain.out_channels, 9, 11)

    def test_frozen_stages(self) -> None:
        backbone = on_meta(partial(build, "timm:resnet18", 16, frozen=("stage1", "stage2")))
        frozen = ("stages.stage1.", "stages.stage2.")
        assert all(value.requires_grad is not key.startswith(frozen) for key, value in backbone.named_parameters())


def _published(backbone: Backbone) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in backbone.state_dict().items() if key not in backbone.constants]


class TestNormalisation:
    def test_is_its_formula(self) -> None:
        levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
        found = Normalise((0.5, 0.4, 0.3), (0.5, 0.2, 0.1))(normalise(levels)[None])[0]
        expected = (levels.astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.2, 0.1]
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1e-5

    def test_is_that_of_the_tag(self) -> None:
        scales = [
            build(f"timm:{name}", 32).stages["stage1"].normalise.scale  # type: ignore[union-attr]
            for name in ("tf_mobilenetv3_small_minimal_100", "mobilenetv3_small_050")
        ]
        assert torch.equal(scales[1], torch.ones(3, 1, 1))
        assert len(MEAN) == 3


class TestWeights:
    @pytest.mark.parametrize("flat", [False, True], ids=["classifier", "features"])
    @pytest.mark.parametrize(
        "name", ["resnet18", "convnext_atto", "densenet121", "mobilenetv3_small_050", "hrnet_w18_small"]
    )
    def test_timms_state_dict_loads(self, name: str, flat: bool, tmp_path: Path) -> None:
        torch.manual_seed(0)
        network = timm.create_model(name, features_only=flat)
        torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
        stride = small(name).out_stride
        backbone = build(f"timm:{name}", stride, weights=str(tmp_path / "weights.pth"))
        theirs = {key.replace("_", "."): value for key, value in network.state_dict().items()}
        for key, value in _published(backbone):
            assert torch.equal(value, theirs[key.split(".", 2)[2].replace("_", ".")]), key

    def test_imagenet_is_timms_download(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(1)
        network = timm.create_model("resnet18")
        create = timm.create_model

        def download(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
            return network if pretrained else create(name, **options)

        monkeypatch.setattr(timm, "create_model", download)
        backbone = build("timm:resnet18", 16, weights="imagenet")
        assert torch.equal(backbone.stages["stage1"].conv1.weight, network.conv1.weight)  # type: ignore[union-attr]

    def test_failures_are_one_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        create = timm.create_model

        def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
            if pretrained:
                raise OSError("no route to host\nand a second line")
            return create(name, **options)

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(
            PipelineError, match=r"^timm:resnet18: the download of its weights failed \(no route to host\); "
        ) as caught:
            build("timm:resnet18", 16, weights="imagenet")
        assert "https://huggingface.co/timm/resnet18" in str(caught.value)
        unpublished = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
        with pytest.raises(PipelineError, match=f"^timm:{unpublished}: timm publishes no weights of this network; "):
            TimmWeights(unpublished).download()

    def test_another_networks_weights_are_refused(self, tmp_path: Path) -> None:
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
        with pytest.raises(PipelineError, match=r"weights.pth: does not fit the backbone: .* and \d+ more$"):
            build("timm:regnety_002", 16, weights=str(tmp_path / "weights.pth"))


CAT, DOG, SHEEP, BIRD, PLANE = range(281, 286), range(151, 269), range(348, 350), range(7, 147), (404, 895)
# VOC images of one object, and the ImageNet classes that are right
PHOTOS: dict[str, Collection[int]] = {
    "2007_002445": CAT,
    "2007_003991": CAT,
    "2007_002852": DOG,
    "2007_003872": DOG,
    "2007_000175": SHEEP,
    "2007_001289": BIRD,
    "2007_000033": PLANE,
    "2007_001288": PLANE,
}


@pytest.mark.parametrize("number", [0, 2])
def test_lite_names_what_voc_images_show(number: int) -> None:
    """The published weights, with this project's images: the class is right, and the logits are timm's own."""
    file = WEIGHTS / f"tf_efficientnet_lite{number}_fp16.pth"
    if not file.exists() or not VOC.exists():
        pytest.skip(f"{file} or {VOC} is missing")
    name = f"tf_efficientnet_lite{number}"
    backbone = build(f"timm:{name}", 32, weights=str(file)).eval()
    whole = timm.create_model(name).eval()
    state = {key: value.float() for key, value in torch.load(file, weights_only=True).items()}
    assert all(key.endswith("num_batches_tracked") for key in whole.load_state_dict(state, strict=False).missing_keys)
    right = 0
    for photo, classes in PHOTOS.items():
        rgb = cv2.cvtColor(cv2.imread(str(VOC / f"{photo}.jpg")), cv2.COLOR_BGR2RGB)
        rgb = resize(rgb.astype(np.uint8), (256, 256))
        with torch.no_grad():
            features = whole.bn2(whole.conv_head(backbone(normalise(rgb)[None])))
            logits = whole.forward_head(features)
            expected = whole(((torch.from_numpy(rgb).permute(2, 0, 1) / 255 - 0.5) / 0.5)[None])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        right += int(logits.argmax()) in classes
    assert right >= len(PHOTOS) - 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "stride", "message"),
        [
            ("swin_tiny_patch4_window7_224", 32, "takes images of one size only; choose a convolutional network"),
            ("vit_tiny_patch16_224", 16, "takes images of one size only; choose a convolutional network"),
            ("mambaout_femto", 32, r"its features are not B x C x h x w \(1 x .*\); choose a convolutional network"),
            ("xception41", 16, "its features are not a chain of stages in timm; choose a convolutional network"),
            ("shvit_s1", 32, "its stride is 64, which is no output_stride; choose a convolutional network"),
            ("densenet121", 8, "output_stride 8 is not supported by timm; use 32, or choose a network .*"),
            ("resnet18", 4, "output_stride 4 is not supported by timm; use 32, or choose a network .*"),
            ("hrnet_w18_small", 8, "output_stride 8 is not supported; use 4"),
            ("resnet19", 16, r"timm [\d.]+ has no such network; did you mean resnet.*\?"),
            ("zzzzzzzz", 16, r"timm [\d.]+ has no such network; timm.list_models\(\) lists its networks"),
            ("resnet18.x", 16, r"timm [\d.]+ has no weights with the tag x; use one of .*a1_in1k.*"),
        ],
    )
    def test_are_one_line(self, name: str, stride: int, message: str) -> None:
        with pytest.raises(PipelineError, match=f"^timm:{name}: {message}$") as caught:
            build(f"timm:{name}", stride)
        assert len(caught.value.lines) == 1

    def test_without_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(PipelineError, match=r"^timm is not installed; pip install timm, or choose"):
            build("timm:resnet18", 16)

    def test_are_found_when_a_run_is_planned(self) -> None:
        raw = params.read([Path("params.yaml")])
        raw["defaults"]["segmentations"]["backbone"] = {"name": "timm:resnet19"}
        raw["classifiers"]["base"] = {"backbone": {"name": "small", "output_stride": 32}}
        with pytest.raises(PipelineError) as caught:
            params.validate(raw, resolve=True)
        lines = caught.value.lines
        assert any(": classifiers.base.backbone: small: output_stride 32 is too large" in line for line in lines)
        assert any(": segmentations.cam.backbone: timm:resnet19: timm" in line for line in lines)
        assert backbone_faults(schema.Backbone("timm:resnet18", 16)) == ()


class TestRegistry:
    def test_a_family_serves_its_names(self) -> None:
        assert "timm:resnet18" in BACKBONES
        assert "timm:" not in BACKBONES
        assert "timm" not in BACKBONES
        assert "timm:" not in BACKBONES.names()
        file = BACKBONES.file("timm:resnet18")
        assert file is not None
        assert file.name == "timm_backbone.py"
        assert "vgg16, timm:NAME; did you mean timm:NAME?" in BACKBONES.unknown("timmNAME")

    def test_stages_do_not_rename_parameters(self) -> None:
        keys = [key for key, _ in _published(small("tf_efficientnet_lite0"))]
        assert "stages.stage1.conv_stem.weight" in keys
        assert "stages.stage4.blocks.3.0.conv_pw.weight" in keys
        assert isinstance(small("resnet18").stages["stage1"], Stage)
