"""Where AMR's modulation stands in every backbone, and DRS in both of AMR's branches."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.schema import Backbone, Suppression
from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise
from pipeline.errors import PipelineError
from pipeline.inference.features import feature_maps
from pipeline.methods.amr import Amr
from tests.method_contract import K, build_method, small_classifier
from tests.test_amr import amr, made

PLACES = {"vgg16": 13, "resnet50": 16, "resnet101": 33, "resnet38": 17, "mobilenet_v2": 17, "small": 6}


class TestBackbones:
    @pytest.mark.parametrize("name", PLACES)
    def test_places(self, name: str) -> None:
        """Every layer of a plain network, every block of a residual one; names in the state dict stay."""
        with torch.device("meta"):
            method = build_method(replace(amr(), backbone=Backbone(name)), K)  # type: ignore[arg-type]
            cam = build_method(replace(small_classifier(), backbone=Backbone(name)), K)  # type: ignore[arg-type]
        assert isinstance(method, Amr)
        assert len(method.modulations) == PLACES[name]
        found = [module for modules in method.compensation.backbone.increments().values() for module in modules]
        assert len(set(found)) == PLACES[name]
        names = set(method.state_dict())
        expected = set(cam.state_dict())
        assert {n for n in names if not n.startswith(("compensation.", "modulations."))} == expected
        assert {n.removeprefix("compensation.") for n in names if n.startswith("compensation.")} == expected

    def test_chosen_layers_alone_are_modulated(self) -> None:
        method = made(replace(amr(layers=("stage4", "stage5")), backbone=Backbone("mobilenet_v2")))
        places = method.compensation.backbone.increments()
        hooked = {name: sum(len(module._forward_hooks) for module in found) for name, found in places.items()}
        assert len(method.modulations) == len(places["stage4"]) + len(places["stage5"])
        assert hooked == {name: len(found) if name in ("stage4", "stage5") else 0 for name, found in places.items()}

    def test_layers_that_are_not_there_are_refused(self) -> None:
        with pytest.raises(PipelineError, match=r"^method\.amr\.layers: no layer conv2; the layers are conv4, conv6$"):
            made(amr(shared="stem", layers=("conv2", "conv4")))

    @pytest.mark.parametrize(
        ("name", "layer"),
        [("resnet50", "Bottleneck"), ("resnet38", "WideBlock"), ("mobilenet_v2", "InvertedResidual")],
    )
    def test_blocks_are_modulated_before_the_addition(self, name: str, layer: str) -> None:
        """What a block adds to its input is what its AMM gives; the shortcut is untouched."""
        with torch.device("meta"):
            method = build_method(replace(amr(), backbone=Backbone(name)), K)  # type: ignore[arg-type]
        assert isinstance(method, Amr)
        backbone = method.compensation.backbone
        blocks = [block for found in backbone.layers().values() for block in found if type(block) in backbone.residuals]
        block, modulation = next(
            found
            for found in zip(blocks, method.modulations, strict=True)
            if type(found[0]).__name__ == layer
            and getattr(found[0], "downsample", None) is None
            and getattr(found[0], "shortcut", None) is None
            and getattr(found[0], "use_res_connect", True)
        )
        block, modulation = block.to_empty(device="cpu").eval(), modulation.to_empty(device="cpu").eval()
        torch.manual_seed(0)
        for module in (block, modulation):
            for part in module.modules():
                if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                    part.reset_parameters()
        for parameter in modulation.parameters():
            nn.init.normal_(parameter)
        raw: list[Tensor] = []
        modulation.register_forward_pre_hook(lambda _module, inputs: raw.append(inputs[0].clone()))
        first = next(part for part in block.modules() if isinstance(part, nn.Conv2d))
        x = torch.rand(2, first.in_channels, 6, 5) + 0.1
        with torch.no_grad():
            found = block(x.clone())
            expected = x + modulation(raw[0])
        if layer == "Bottleneck":
            expected = expected.relu()
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, (x + raw[0]).relu() if layer == "Bottleneck" else x + raw[0], rtol=0.01)

    @pytest.mark.parametrize("shared", ["nothing", "stem"])
    def test_a_residual_network_learns(self, shared: str) -> None:
        settings = replace(amr(shared=shared), backbone=Backbone("mobilenet_v2", 16))
        method = made(settings).train()
        loss = method.loss(method(torch.randn(2, 3, 48, 48)), torch.eye(K)[:2])
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())

    def test_features_keep_their_scale_through_a_network_without_norms(self) -> None:
        """13 layers of VGG-16, two sets of weights each: features neither vanish nor explode."""
        method = made(replace(amr(), backbone=Backbone("vgg16"))).eval()
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            plain, modulated = (b(images).std() for b in (method.backbone, method.compensation.backbone))
        assert 0.05 < float(modulated / plain) < 20


class TestSuppression:
    """DRS in both branches."""

    def test_all_layers_of_both(self) -> None:
        method = made(replace(amr(), suppression=Suppression()))
        assert len(method.suppressors) == 2 * (6 + 1)
        assert list(method.layers()) == [
            *("conv2", "conv4", "conv6", "head"),
            *("compensation_conv2", "compensation_conv4", "compensation_conv6", "compensation_head"),
        ]

    def test_over_a_shared_stem(self) -> None:
        method = made(replace(amr(shared="stem"), suppression=Suppression(0.5)))
        assert len(method.suppressors) == 7 + 5
        assert "compensation_conv2" not in method.layers()

    def test_layers_are_chosen_by_branch(self) -> None:
        torch.manual_seed(0)
        images = torch.randn(2, 3, 32, 32)
        outputs = {}
        for layers in ((), ("conv6", "head"), ("compensation_conv6",)):
            method = made(replace(amr(), suppression=Suppression(0.4, layers))).eval()
            with torch.no_grad():
                outputs[layers] = method(images)
        free, spotlight, compensation = outputs.values()
        assert not torch.equal(free.spotlight.maps, spotlight.spotlight.maps)
        assert torch.equal(free.compensation.maps, spotlight.compensation.maps)
        assert torch.equal(free.spotlight.maps, compensation.spotlight.maps)
        assert not torch.equal(free.compensation.maps, compensation.compensation.maps)

    def test_suppression_comes_after_modulation(self) -> None:
        """What the next layer gets is what the AMM gives, cut at half of each channel's maximum."""
        method = made(replace(amr(), suppression=Suppression(0.5, ("compensation_conv6",)))).eval()
        given: list[Tensor] = []
        method.modulations[-1].register_forward_hook(lambda _module, _inputs, output: given.append(output))
        with torch.no_grad():
            found = method.compensation.backbone(torch.randn(2, 3, 32, 32))
        torch.testing.assert_close(found, torch.minimum(given[0], given[0].amax((2, 3), keepdim=True) / 2))
        assert not torch.equal(found, given[0])

    def test_the_features_of_both_can_be_looked_at(self, tmp_path: Path) -> None:
        """Eight layers, the compensation branch's as its AMMs leave them."""
        rgb = np.random.default_rng(0).integers(0, 256, (32, 40, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "a.png"), rgb)
        image = Image("a", tmp_path / "a.png", 32, 40, (1,), None, None)
        method = made(amr()).eval()
        found = {number: raster for _, number, raster in feature_maps(method, [image], torch.device("cpu"))}
        assert [found[number].shape for number in (1, 2, 3, 4)] == [(8, 10), (8, 10), (4, 5), (4, 5)]
        assert [found[number].shape for number in (5, 6, 7, 8)] == [(8, 10), (8, 10), (4, 5), (4, 5)]
        with torch.no_grad():
            features = method.compensation.backbone(normalise(read_rgb(image))[None])[0].mean(0)
        expected = 255 * (features - features.min()) / (features.max() - features.min())
        assert np.abs(found[7] - expected.numpy()).max() <= 0.51
