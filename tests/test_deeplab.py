"""The DeepLab networks: one contract for all, each head against its formula, and several scales of the input."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import schema
from pipeline.config.registry import BACKBONES, SEGMENTATIONS, Choice
from pipeline.errors import PipelineError
from pipeline.networks.deeplab_largefov import LargeFov
from pipeline.networks.deeplab_v2 import DeepLabV2
from pipeline.networks.deeplab_v3plus import DeepLabV3Plus, PooledBatchNorm
from pipeline.networks.segmentation import SegmentationNetwork, build_segmentation
from pipeline.training import models
from tests.method_contract import Arithmetic, Array
from tests.networks import convs, on_meta, randomise_batch_norms, resize, size

K = 5
NARROW: dict[str, dict[str, Any]] = {  # settings that keep a network light
    "deeplab_largefov": {"channels": 16, "rate": 6, "dropout": 0.0},
    "deeplab_v2": {},
    "deeplab_v3plus": {"channels": 16, "rates": (12, 24, 36), "dropout": 0.0},
}
NEAR: dict[str, dict[str, Any]] = {  # rates that fit features of a few cells
    "deeplab_largefov": {"rate": 2, "channels": 32},
    "deeplab_v2": {"rates": (1, 2), "extra_scales": (0.5,)},
    "deeplab_v3plus": {"rates": (1, 2, 3), "channels": 32},
}
STRIDES = {"deeplab_largefov": 8, "deeplab_v2": 8, "deeplab_v3plus": 4}  # of the logits, at the backbone's stride 8


def block(
    network: str = "deeplab_largefov", backbone: str = "small", stride: int = 8, **settings: Any
) -> schema.Segmentation:
    body = schema.Backbone(backbone, stride)  # type: ignore[arg-type]
    choice = Choice(SEGMENTATIONS, network, NARROW[network] | settings)
    return schema.Segmentation("ground_truth", choice, body, schema.Training(batch_size=2, lr=0.1, epochs=1))


def segmentation(*names: Any, classes: int = K, **settings: Any) -> SegmentationNetwork:
    return build_segmentation(block(*names, **settings), classes)


def scaled(network: SegmentationNetwork, *scales: float) -> SegmentationNetwork:
    """The network with further scales of its input, whatever its head."""
    network.head.extra_scales = scales
    return network


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def close(found: Tensor, expected: Array) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.detach().double().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def dilated(x: Array, weight: Array, bias: Array, rate: int) -> Array:
    """A dilated 3x3 convolution as the plain one of its kernel with zeros between."""
    kernel = np.zeros((*weight.shape[:2], 2 * rate + 1, 2 * rate + 1))
    kernel[..., ::rate, ::rate] = weight
    return Arithmetic.conv(x, kernel, bias, padding=rate)


class TestContract:
    """What every segmentation network promises."""

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    @pytest.mark.parametrize("backbone", BACKBONES.names())
    def test_logits_on_every_backbone(self, network: str, backbone: str) -> None:
        made = on_meta(lambda: segmentation(network, backbone))
        stride = STRIDES[network]
        found = made(torch.empty(2, 3, 65, 81, device="meta"))
        assert found.shape == (2, K + 1, -(-65 // stride), -(-81 // stride))
        assert found.dtype == torch.float32

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    def test_extra_scales_fit_every_network(self, network: str) -> None:
        """round(65 * 0.75) is 49, round(81 * 0.75) 61, round(65 * 0.5) 32, round(81 * 0.5) 40: halves to even."""
        made = on_meta(lambda: scaled(segmentation(network), 0.75, 0.5))
        x = torch.empty(2, 3, 65, 81, device="meta")
        shapes = [tuple(logits.shape[2:]) for logits in made.supervised(x)]
        if STRIDES[network] == 8:
            assert shapes == [(9, 11), (7, 8), (4, 5), (9, 11)]
        else:
            assert shapes == [(17, 21), (13, 16), (8, 10), (17, 21)]
        assert made(x).shape[2:] == shapes[0]

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    def test_scores_start_near_zero(self, network: str) -> None:
        torch.manual_seed(0)
        made = segmentation(network, **({} if network == "deeplab_v2" else {"channels": 512}))
        scores = [module for module in made.head.modules() if isinstance(module, nn.Conv2d)]
        last = [conv for conv in scores if conv.out_channels == K + 1]
        assert len(last) == (4 if network == "deeplab_v2" else 1)
        for conv in last:
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
            assert conv.bias is not None
            assert not conv.bias.any()

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    @pytest.mark.parametrize("scales", [(), (0.5,)])
    def test_it_learns(self, network: str, scales: tuple[float, ...]) -> None:
        """A few steps halve the loss on one batch, in the precision and memory format of the training."""
        torch.manual_seed(0)
        made = scaled(segmentation(network, **NEAR[network]), *scales)
        made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        labels = torch.randint(0, K + 1, (4, 4, 4))
        x = F.one_hot(labels, K + 1).permute(0, 3, 1, 2).float()[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        labels = labels.repeat_interleave(8 // STRIDES[network], 1).repeat_interleave(8 // STRIDES[network], 2)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(made(x.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    def test_gradients_reach_every_parameter_in_bf16(self, network: str) -> None:
        torch.manual_seed(0)
        made = scaled(segmentation(network), 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            supervised = made.supervised(torch.randn(2, 3, 48, 64))
        assert [logits.dtype for logits in supervised] == [torch.float32] * 3
        torch.stack([logits.square().mean() for logits in supervised]).sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    @pytest.mark.parametrize("network", SEGMENTATIONS.names())
    def test_saved_it_comes_back(self, network: str, tmp_path: Path) -> None:
        settings = block(network, **NEAR[network])
        made = build_segmentation(settings, K).eval()
        models.save(tmp_path / "model.pt", made, settings, K)
        loaded = models.load(tmp_path / "model.pt", K, torch.device("cpu"))
        x = torch.randn(1, 3, 40, 56)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), made(x))

    @pytest.mark.parametrize(
        ("network", "rates", "fault"),
        [
            ("deeplab_v2", (), "rates: is empty; state one dilation for each parallel convolution"),
            ("deeplab_v3plus", (12,), "rates: must be a list of 3 values, not (12,)"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, network: str, rates: tuple[int, ...], fault: str) -> None:
        with pytest.raises(PipelineError) as caught:
            segmentation(network, rates=rates)
        assert caught.value.lines == (f".{network}.{fault}",)


class TestLargeFov:
    def test_vgg_size_is_the_published(self) -> None:
        """DeepLab-LargeFOV's 20.5 million parameters (Chen et al. 2015, Table 2), for 21 outputs."""
        network = on_meta(lambda: segmentation(backbone="vgg16", classes=20, channels=1024, rate=12))
        assert size(network) == 14_714_688 + (9 * 512 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 21 == 20_505_429
        assert network(torch.empty(2, 3, 321, 321, device="meta")).shape == (2, 21, 41, 41)
        assert [conv.dilation[0] for conv in convs(network.head)] == [12]

    @pytest.mark.parametrize("backbone", ["vgg16", "small"])
    def test_head_is_its_formula(self, backbone: str) -> None:
        torch.manual_seed(0)
        head = segmentation(backbone=backbone, rate=3).head.double().eval()
        x = torch.randn(2, 512 if backbone == "vgg16" else 128, 9, 11, dtype=torch.float64).clamp(min=0)
        weights = iter(head.state_dict().values())
        y = F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 3, 1, 1) if backbone == "vgg16" else x
        y = F.conv2d(y, next(weights), next(weights), padding=3, dilation=3).clamp(min=0)
        y = F.conv2d(y, next(weights), next(weights)).clamp(min=0)
        torch.testing.assert_close(head(x), F.conv2d(y, next(weights), next(weights)))

    def test_batch_norm_precedes_each_relu(self) -> None:
        torch.manual_seed(0)
        head = segmentation(rate=3, batch_norm=True).head.double().eval()
        randomise_batch_norms(head)
        assert isinstance(head, LargeFov)
        y = torch.randn(2, 128, 9, 11, dtype=torch.float64)
        expected = y
        for conv, norm in ((head.fc6, head.norm6), (head.fc7, head.norm7)):
            expected = F.relu(norm(conv(expected)))
        torch.testing.assert_close(head(y), head.fc8(expected))
        assert LargeFov.Settings(batch_norm=True).describe().endswith("batch norm)")

    def test_dropout_follows_fc6_and_fc7(self) -> None:
        torch.manual_seed(0)
        head = segmentation(channels=400, dropout=0.25).head
        assert isinstance(head, LargeFov)
        shares = []

        def note(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            shares.append(float((output[inputs[0] > 0] == 0).float().mean()))

        head.dropout.register_forward_hook(note)
        x = torch.rand(2, 128, 8, 8)
        head(x)
        assert shares == pytest.approx([0.25, 0.25], abs=0.02)
        head.eval()
        head(x)
        assert shares[2:] == [0, 0]


class TestAspp:
    def test_head_is_the_sum_of_its_branches(self) -> None:
        torch.manual_seed(0)
        head = segmentation("deeplab_v2", rates=(2, 3, 5)).head
        for conv in convs(head):
            assert conv.bias is not None
            conv.bias.data.normal_()
        x = torch.randn(2, 128, 9, 11)
        weights, features = arrays(head), x.double().numpy()
        branches = [
            dilated(features, weights[f"branches.{n}.weight"], weights[f"branches.{n}.bias"], rate)
            for n, rate in enumerate((2, 3, 5))
        ]
        close(head(x), branches[0] + branches[1] + branches[2])

    def test_it_is_the_papers_on_resnet101(self) -> None:
        """Four branches of 2048 channels straight to 21 scores; nothing else is new."""
        network = on_meta(lambda: segmentation("deeplab_v2", "resnet101", classes=20))
        assert isinstance(network.head, DeepLabV2)
        found = [(c.in_channels, c.out_channels, c.dilation[0], c.padding[0]) for c in convs(network.head)]
        assert found == [(2048, 21, rate, rate) for rate in (6, 12, 18, 24)]
        assert size(network.head) == 4 * (9 * 2048 * 21 + 21)
        assert network(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 41, 41)


class TestScales:
    """DeepLab-v2 at three scales of its input, in NumPy and float64."""

    SCALES = (0.75, 0.5)

    @pytest.fixture
    def network(self) -> SegmentationNetwork:
        torch.manual_seed(0)
        network = segmentation("deeplab_v2", rates=(1, 2), extra_scales=self.SCALES).eval()
        randomise_batch_norms(network)
        for conv in convs(network.head):
            conv.weight.data.normal_(std=0.1)
        return network

    def logits(self, network: SegmentationNetwork, x: Array) -> Array:
        weights = arrays(network)
        features = Arithmetic.small_backbone(weights, x)
        one, two = (
            dilated(features, weights[f"head.branches.{n}.weight"], weights[f"head.branches.{n}.bias"], n + 1)
            for n in (0, 1)
        )
        return one + two

    @pytest.mark.parametrize(
        ("height", "width", "scaled"),
        [
            (48, 64, [(36, 48), (24, 32)]),
            (41, 58, [(31, 44), (20, 29)]),  # 30.75, 43.5, 20.5 and 29
        ],
    )
    def test_every_scale_and_the_maximum(
        self, network: SegmentationNetwork, height: int, width: int, scaled: list[tuple[int, int]]
    ) -> None:
        images = torch.randn(2, 3, height, width)
        x = images.double().numpy()
        expected = [self.logits(network, x), *(self.logits(network, resize(x, *sides)) for sides in scaled)]
        same = [resize(logits, *expected[0].shape[2:]) for logits in expected]
        expected.append(np.max(same, axis=0))
        with torch.no_grad():
            supervised, answer = network.supervised(images), network(images)
        assert len(supervised) == 4
        for found, wanted in zip(supervised, expected, strict=True):
            close(found, wanted)
        assert torch.equal(answer, supervised[-1])
        for number in range(3):  # each scale wins somewhere
            assert (np.argmax(same, axis=0) == number).mean() > 0.1

    def test_one_scale_is_the_plain_network(self, network: SegmentationNetwork) -> None:
        plain = copy.deepcopy(network)
        plain.head.extra_scales = ()
        images = torch.randn(1, 3, 32, 40)
        with torch.no_grad():
            (only,) = plain.supervised(images)
            assert torch.equal(only, network.supervised(images)[0])
            assert torch.equal(plain(images), only)

    def test_training_answers_the_maximum_too(self, network: SegmentationNetwork) -> None:
        supervised = network.train().supervised(torch.randn(2, 3, 32, 40))
        assert len(supervised) == 4
        assert (supervised[-1] >= supervised[0]).all()

    def test_a_scaled_side_has_at_least_one_pixel(self) -> None:
        network = segmentation("deeplab_v2", extra_scales=(0.1,)).eval()
        assert network(torch.randn(1, 3, 4, 40)).shape == (1, K + 1, 1, 5)


class TestDecoder:
    @pytest.mark.parametrize(
        ("backbone", "tap"),
        [
            ("vgg16", "conv3_3"),
            ("resnet50", "layer1"),
            ("resnet101", "layer1"),
            ("resnet38", "b3"),
            ("mobilenet_v2", "stage2"),
            ("small", "conv2"),
        ],
    )
    def test_low_level_features_are_of_stride_4(self, backbone: str, tap: str) -> None:
        for stride in {"small": (4, 8), "resnet38": (8,)}.get(backbone, (4, 8, 16)):
            network = on_meta(partial(segmentation, "deeplab_v3plus", backbone, stride))
            assert network.head.taps == (tap, list(network.backbone.taps)[-1])
            assert network.backbone.taps[tap].stride == 4

    def test_the_pyramid_is_the_papers(self) -> None:
        network = on_meta(
            lambda: segmentation("deeplab_v3plus", "resnet101", 16, classes=20, rates=(6, 12, 18), channels=256)
        )
        assert isinstance(network.head, DeepLabV3Plus)
        found = [(c.in_channels, c.out_channels, c.dilation[0]) for c in convs(network.head)]
        assert found == [*((2048, 256, rate) for rate in (6, 12, 18)), (304, 256, 1), (256, 256, 1)]
        points = [(c.in_channels, c.out_channels) for c in convs(network.head, 1)]
        assert points == [(2048, 256), (2048, 256), (5 * 256, 256), (256, 48), (256, 21)]
        assert network(torch.empty(1, 3, 513, 513, device="meta")).shape == (1, 21, 129, 129)

    def test_head_is_its_formula(self) -> None:
        torch.manual_seed(0)
        head = segmentation("deeplab_v3plus", rates=(1, 2, 4)).head.double().eval()
        randomise_batch_norms(head)
        low, x = torch.randn(2, 32, 17, 21, dtype=torch.float64), torch.randn(2, 128, 9, 11, dtype=torch.float64)
        weights = iter(value for name, value in head.state_dict().items() if "num_batches" not in name)

        def layer(x: Tensor, rate: int) -> Tensor:
            x = F.conv2d(x, next(weights), padding=rate, dilation=max(1, rate))
            gamma, beta, mean, variance = (next(weights) for _ in range(4))
            return F.batch_norm(x, mean, variance, gamma, beta).clamp(min=0)

        pyramid = [layer(x, rate) for rate in (0, 1, 2, 4)]
        pooled = layer(x.mean((2, 3), keepdim=True), 0)
        context = layer(torch.cat([*pyramid, pooled.expand_as(pyramid[0])], 1), 0)
        context = torch.from_numpy(resize(context.detach().numpy(), 17, 21))
        y = torch.cat([layer(low, 0), context], 1)
        y = F.conv2d(layer(layer(y, 1), 1), next(weights), next(weights))
        assert not list(weights)
        torch.testing.assert_close(head(low, x), y)

    def test_dropout_follows_the_settings(self) -> None:
        network = on_meta(lambda: segmentation("deeplab_v3plus", dropout=0.25))
        assert [part.p for part in network.modules() if isinstance(part, nn.Dropout)] == [0.25]

    def test_a_batch_of_one_image_trains(self) -> None:
        """The pooled branch then uses its running statistics; a batch of two moves them."""
        torch.manual_seed(0)
        network = segmentation("deeplab_v3plus").train()
        (norm,) = (module for module in network.modules() if isinstance(module, PooledBatchNorm))
        assert norm.running_mean is not None
        before = norm.running_mean.clone()
        network(torch.randn(1, 3, 40, 48)).square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
        assert torch.equal(norm.running_mean, before)
        network(torch.randn(2, 3, 40, 48))
        assert not torch.equal(norm.running_mean, before)

    def test_pooled_norm_is_a_batch_norm_but_for_single_values(self) -> None:
        torch.manual_seed(0)
        norm, plain = PooledBatchNorm(3), nn.BatchNorm2d(3)
        x = torch.randn(4, 3, 1, 1)
        torch.testing.assert_close(norm(x), plain(x))
        torch.testing.assert_close(norm(x[:1]), plain.eval()(x[:1]))
        torch.testing.assert_close(norm.eval()(x), plain(x))
