"""Backbones and heads: one contract for all, and each network's own facts."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES
from pipeline.errors import PipelineError
from pipeline.networks.backbones import Backbone
from pipeline.networks.heads import ClassAwareHead
from pipeline.networks.resnet38 import BottleneckBlock, WideBlock
from pipeline.networks.vision import import_torchvision
from tests.networks import build, convs, on_meta, randomise_batch_norms, size

TAPS = {
    "vgg16": {"conv1_2": 64, "conv2_2": 128, "conv3_3": 256, "conv4_3": 512, "conv5_3": 512},
    "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet101": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet38": {"b2": 128, "b3": 256, "b4": 512, "b5": 1024, "b6": 2048, "b7": 4096},
    "mobilenet_v2": {"stage1": 16, "stage2": 24, "stage3": 32, "stage4": 96, "stage5": 1280},
    "small": {"conv2": 32, "conv4": 64, "conv6": 128},
}
STRIDES = {
    "vgg16": (4, 8, 16),
    "resnet50": (4, 8, 16, 32),
    "resnet101": (4, 8, 16, 32),
    "resnet38": (8,),
    "mobilenet_v2": (4, 8, 16, 32),
    "small": (4, 8),
}


@pytest.fixture(scope="module", params=BACKBONES.names())
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    backbone = build(request.param)
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backbone


class TestContract:
    """What every backbone promises."""

    @pytest.mark.parametrize(
        ("name", "output_stride"), [(name, stride) for name, strides in STRIDES.items() for stride in strides]
    )
    @pytest.mark.parametrize(("height", "width"), [(65, 81), (97, 33)])
    def test_taps_tell_channels_and_strides(self, name: str, output_stride: int, height: int, width: int) -> None:
        backbone = on_meta(lambda: build(name, output_stride))
        assert {tap: channels for tap, (channels, _) in backbone.taps.items()} == TAPS[name]
        assert backbone.out_stride == output_stride
        assert backbone.out_channels == list(TAPS[name].values())[-1]
        x = torch.empty(2, 3, height, width, device="meta")
        features = backbone.features(x, list(TAPS[name]))
        assert list(features) == list(TAPS[name])
        for tap, (channels, stride) in backbone.taps.items():
            assert features[tap].shape == (2, channels, -(-height // stride), -(-width // stride))
        assert backbone(x).shape == list(features.values())[-1].shape

    @pytest.mark.parametrize("name", BACKBONES.names())
    def test_stride_lost_without_dilation(self, name: str) -> None:
        plain, dilated = (
            on_meta(partial(build, name, min(STRIDES[name]), dilated=dilated)) for dilated in (False, True)
        )
        assert {conv.dilation[0] for conv in convs(plain)} == {1}
        assert max(conv.dilation[0] for conv in convs(dilated)) > 1
        x = torch.empty(1, 3, 65, 81, device="meta")
        assert plain(x).shape == dilated(x).shape

    def test_it_starts_from_he_normal(self, backbone: Backbone) -> None:
        for conv in (module for module in backbone.modules() if isinstance(module, nn.Conv2d)):
            expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.2)
            assert conv.bias is None or not conv.bias.any()

    def test_forward_is_the_last_tap(self, backbone: Backbone) -> None:
        backbone.eval()
        x = torch.randn(1, 3, 33, 41)
        first, last = (list(backbone.taps)[index] for index in (0, -1))
        with torch.no_grad():
            features = backbone.features(x, [last, first])
            assert list(features) == [last, first]
            assert torch.equal(features[last], backbone(x))
            assert torch.equal(features[first], backbone.stages[first](x))

    def test_unknown_tap_is_refused(self, backbone: Backbone) -> None:
        with pytest.raises(ValueError, match=f"no tap pool9; the taps are {next(iter(backbone.taps))}, "):
            backbone.features(torch.zeros(1, 3, 33, 33), ["pool9"])

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_gradients_are_finite_and_reach_every_layer(self, backbone: Backbone, precision: torch.dtype) -> None:
        backbone.train()
        backbone.zero_grad()
        x = torch.randn(2, 3, 33, 41).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            y = backbone(x)
        assert y.dtype == precision
        y.float().square().mean().backward()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_cuda_agrees_with_cpu(self, backbone: Backbone) -> None:
        backbone.eval()
        x = torch.randn(1, 3, 33, 41)
        with torch.no_grad():
            expected = backbone(x)
            there = copy.deepcopy(backbone).cuda()
            found = there(x.cuda()).cpu()
            with torch.autocast("cuda", torch.bfloat16):
                coarse = there(x.cuda()).float().cpu()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * scale)  # TF32 convolutions
        torch.testing.assert_close(coarse, expected, rtol=0, atol=1e-1 * scale)

    @pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "small"])
    def test_dilation_computes_what_the_stride_skipped(self, name: str) -> None:
        """Every s-th feature of the dilated network is the strided network's: no pixel is shifted."""
        coarse = STRIDES[name][-1]
        torch.manual_seed(0)
        strided, dilated = build(name, coarse).double().eval(), build(name, coarse // 2).double().eval()
        randomise_batch_norms(strided)
        dilated.load_state_dict(strided.state_dict())
        x = torch.randn(1, 3, 71, 90, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(dilated(x)[..., ::2, ::2], strided(x))

    @pytest.mark.parametrize("name", [name for name in BACKBONES.names() if name != "vgg16"])
    def test_frozen_batch_norms_stay(self, name: str) -> None:
        backbone = on_meta(partial(build, name, frozen_batch_norm=True))
        norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        for mode in (None, True, False, True):  # None: as built
            if mode is not None:
                assert backbone.train(mode) is backbone
            assert not any(norm.training for norm in norms)
            assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
        assert backbone.training
        assert backbone.stages.training
        assert all(conv.weight.requires_grad for conv in convs(backbone))

    def test_frozen_statistics_do_not_move(self) -> None:
        for frozen in (True, False):
            backbone = build("small", frozen_batch_norm=frozen).train()
            before = {key: value.clone() for key, value in backbone.state_dict().items()}
            backbone(torch.randn(2, 3, 32, 32) + 1)
            moved = any(not torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
            assert moved is not frozen


class TestGeometry:
    """The facts that papers and published models state."""

    @pytest.mark.parametrize(
        ("name", "enum", "classifier"),
        [
            ("vgg16", "VGG16_Weights", 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000),
            ("resnet50", "ResNet50_Weights", 2048 * 1000 + 1000),
            ("resnet101", "ResNet101_Weights", 2048 * 1000 + 1000),
            ("mobilenet_v2", "MobileNet_V2_Weights", 1280 * 1000 + 1000),
        ],
    )
    def test_size_is_the_published_one_less_the_classifier(self, name: str, enum: str, classifier: int) -> None:
        published = getattr(import_torchvision().models, enum).IMAGENET1K_V1.meta["num_params"]
        assert size(on_meta(lambda: build(name))) == published - classifier

    def test_sizes(self) -> None:
        found = {name: size(on_meta(partial(build, name))) for name in BACKBONES.names()}
        assert found == {
            "vgg16": 14_714_688,
            "resnet50": 23_508_032,
            "resnet101": 42_500_160,
            "resnet38": 105_070_912,
            "mobilenet_v2": 2_223_872,
            "small": 288_992,
        }

    def test_vgg16_is_the_papers_at_stride_8(self) -> None:
        backbone = on_meta(lambda: build("vgg16"))
        layers = [layer for stage in backbone.stages.values() for layer in stage]
        pools = [(pool.kernel_size, pool.stride) for pool in layers if isinstance(pool, nn.MaxPool2d)]
        assert pools == [(2, 2), (2, 2), (2, 2), (3, 1)]
        assert [conv.dilation[0] for conv in convs(backbone)] == [1] * 10 + [2] * 3
        assert backbone(torch.empty(1, 3, 320, 320, device="meta")).shape == (1, 512, 40, 40)
        assert backbone(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 512, 41, 41)

    def test_resnet38_has_the_published_blocks(self) -> None:
        found = [
            (c.in_channels, c.out_channels, c.stride[0], c.dilation[0])
            for c in convs(on_meta(lambda: build("resnet38")))
        ]
        assert found == [
            (3, 64, 1, 1),
            *[(64, 128, 2, 1), *[(128, 128, 1, 1)] * 5],
            *[(128, 256, 2, 1), *[(256, 256, 1, 1)] * 5],
            *[(256, 512, 2, 1), *[(512, 512, 1, 1)] * 11],
            *[(512, 512, 1, 1), (512, 1024, 1, 2), *[(1024, 512, 1, 2), (512, 1024, 1, 2)] * 2],
            (512, 1024, 1, 4),
            (1024, 2048, 1, 4),
        ]  # fmt: skip

    @pytest.mark.parametrize(("name", "stride"), [("vgg16", 32), ("resnet38", 16), ("small", 16)])
    def test_stride_that_cannot_be_is_refused(self, name: str, stride: int) -> None:
        with pytest.raises(PipelineError, match=rf"{name}: output_stride {stride} .*; use "):
            build(name, stride)

    def test_unknown_backbone_lists_the_known(self) -> None:
        with pytest.raises(PipelineError, match=r"'alexnet' is none of mobilenet_v2, resnet101, .*, vgg16"):
            build("alexnet")


class TestFrozenStages:
    @pytest.mark.parametrize(
        ("name", "held"),
        [
            ("resnet38", {"b2": ["conv1a", "b2"]}),  # EDAM's public code
            ("resnet50", {"layer1": ["conv1", "bn1", "layer1"], "layer2": ["layer2"]}),
            ("vgg16", {"conv1_2": ["0", "2"], "conv2_2": ["5", "7"]}),  # torchvision's numbers
        ],
    )
    def test_parameters_of_the_first_stages_do_not_learn(self, name: str, held: dict[str, list[str]]) -> None:
        backbone = on_meta(partial(build, name, frozen=tuple(held)))
        parts = tuple(f"stages.{tap}.{part}." for tap, found in held.items() for part in found)
        for parameter, value in backbone.named_parameters():
            assert value.requires_grad is not parameter.startswith(parts), parameter

    def test_a_step_moves_the_rest_alone(self) -> None:
        """Affine parameters and statistics of batch norms are frozen with their stage, whatever the mode was before."""
        backbone = build("small", frozen=("conv2", "conv4")).eval().train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        features = backbone.features(torch.randn(2, 3, 32, 32) + 1, ["conv4", "conv6"])
        assert not features["conv4"].requires_grad  # backward ends where learning does
        features["conv6"].square().mean().backward()
        learning = [value for value in backbone.parameters() if value.requires_grad]
        torch.optim.SGD(learning, lr=0.1).step()
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, before[key]) is not key.startswith("stages.conv6."), key

    def test_what_enters_them_still_has_a_gradient(self) -> None:
        backbone = build("small", frozen=("conv2", "conv4", "conv6"))
        images = torch.randn(1, 3, 32, 32, requires_grad=True)
        backbone(images).sum().backward()
        assert images.grad is not None
        assert images.grad.any()

    @pytest.mark.parametrize("frozen", [("conv3",), ("conv4",), ("conv2", "conv6"), ("conv4", "conv2")])
    def test_others_than_the_first_are_refused(self, frozen: tuple[str, ...]) -> None:
        message = f"backbone.frozen: {', '.join(frozen)} must be the first of the taps conv2, conv4, conv6"
        with pytest.raises(PipelineError, match=f"^{message}$"):
            build("small", frozen=frozen)


class TestFormulas:
    """Outputs against plain arithmetic in float64."""

    def test_small_is_its_formula(self) -> None:
        torch.manual_seed(0)
        backbone = build("small", 4).eval()
        randomise_batch_norms(backbone)
        x = torch.randn(2, 3, 41, 55)
        y = x.double()
        weights = iter(value.double() for key, value in backbone.state_dict().items() if "num_batches" not in key)
        for stride, padding, dilation in [(2, 2, 1), (2, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2)]:
            y = F.conv2d(y, next(weights), stride=stride, padding=padding, dilation=dilation)
            gamma, beta, mean, variance = (next(weights).reshape(1, -1, 1, 1) for _ in range(4))
            y = ((y - mean) / (variance + 1e-5).sqrt() * gamma + beta).clamp(min=0)
        assert not list(weights)
        torch.testing.assert_close(backbone(x).double(), y, rtol=0, atol=1e-5 * float(y.max()))

    def test_vgg_classifier_is_its_formula(self) -> None:
        """The classification network of OAA and DRS: VGG-16 at stride 8, three 3x3 convolutions of 512, one 1x1."""
        torch.manual_seed(0)
        backbone, head = build("vgg16"), ClassAwareHead(512, schema.Head(), 20)
        x = torch.randn(1, 3, 40, 56)
        weights = iter(value.double() for part in (backbone, head) for value in part.state_dict().values())
        y = x.double()
        for stage, depth in enumerate((2, 2, 3, 3, 3, 3), 1):
            if stage in (2, 3, 4):
                y = F.max_pool2d(y, 2, 2)
            if stage == 5:
                y = F.max_pool2d(y, 3, 1, 1)
            dilation = 2 if stage == 5 else 1
            for _ in range(depth):
                y = F.conv2d(y, next(weights), next(weights), padding=dilation, dilation=dilation).clamp(min=0)
        maps = F.conv2d(y, next(weights), next(weights))
        assert not list(weights)
        assert maps.shape == (1, 20, 5, 7)
        with torch.no_grad():
            found = head(backbone(x)).double()
        torch.testing.assert_close(found, maps, rtol=0, atol=1e-5 * float(maps.abs().max()))

    def test_head_with_batch_norm_is_its_formula(self) -> None:
        torch.manual_seed(0)
        head = ClassAwareHead(8, schema.Head(2, 6, batch_norm=True), 4).double().eval()
        randomise_batch_norms(head)
        x = y = torch.randn(2, 8, 9, 7, dtype=torch.float64)
        weights = iter(value for name, value in head.state_dict().items() if "num_batches" not in name)
        for _ in range(2):
            y = F.conv2d(y, next(weights), next(weights), padding=1)
            gamma, beta, mean, variance = (next(weights) for _ in range(4))
            y = F.batch_norm(y, mean, variance, gamma, beta).clamp(min=0)
        torch.testing.assert_close(head(x), F.conv2d(y, next(weights), next(weights)))
        assert not list(weights)

    def test_resnet38_blocks_are_their_formulas(self) -> None:
        def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).clamp(min=0)

        torch.manual_seed(0)
        x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
        wider = WideBlock(8, 6, 16, 2, (1, 2)).double().eval()
        same = WideBlock(8, 6, 8, 1, (2, 2)).double().eval()
        bottleneck = BottleneckBlock(8, 16, 4, 0.5).double().eval()
        for block in (wider, same, bottleneck):
            randomise_batch_norms(block)
        for block, stride, first in ((wider, 2, 1), (same, 1, 2)):
            y = norm_relu(x, block.bn1)
            z = norm_relu(F.conv2d(y, block.conv1.weight, stride=stride, padding=first, dilation=first), block.bn2)
            shortcut = x if block.shortcut is None else F.conv2d(y, block.shortcut.weight, stride=stride)
            torch.testing.assert_close(block(x), shortcut + F.conv2d(z, block.conv2.weight, padding=2, dilation=2))
        y = norm_relu(x, bottleneck.bn1)
        z = norm_relu(F.conv2d(y, bottleneck.conv1.weight), bottleneck.bn2)
        z = norm_relu(F.conv2d(z, bottleneck.conv2.weight, padding=4, dilation=4), bottleneck.bn3)
        expected = F.conv2d(y, bottleneck.shortcut.weight) + F.conv2d(z, bottleneck.conv3.weight)
        torch.testing.assert_close(bottleneck(x), expected)


class TestHead:
    def test_layers_are_the_papers(self) -> None:
        head = ClassAwareHead(512, schema.Head(), 20)
        assert [(c.in_channels, c.out_channels, c.padding) for c in convs(head)] == [(512, 512, (1, 1))] * 3
        assert size(head) == 3 * (9 * 512 * 512 + 512) + 512 * 20 + 20
        assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert all(conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05) for conv in convs(head))
        assert not any(conv.bias.any() for conv in [*convs(head), head.classifier] if conv.bias is not None)

    def test_classify_takes_penultimate(self) -> None:
        torch.manual_seed(0)
        head = ClassAwareHead(6, schema.Head(convs=2, channels=8), 3)
        x = torch.randn(2, 6, 5, 7)
        features = head.penultimate(x)
        assert features.shape == (2, 8, 5, 7)
        assert features.min() == 0
        assert torch.equal(head.classify(features), head(x))
        features[:, :, 2, 3] = 0  # an occluded cell scores the bias, and leaves the others as they were
        occluded = head.classify(features)
        assert torch.equal(occluded[:, :, 2, 3], head.classify(torch.zeros(2, 8, 1, 1))[..., 0, 0])
        assert torch.equal(occluded[:, :, :2], head(x)[:, :, :2])

    def test_without_convolutions_it_is_the_classifier(self) -> None:
        head = ClassAwareHead(6, schema.Head(convs=0), 3)
        x = torch.randn(1, 6, 4, 4)
        assert torch.equal(head.penultimate(x), x)
        assert head(x).shape == (1, 3, 4, 4)
