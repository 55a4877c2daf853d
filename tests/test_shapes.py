"""Convolutions of padded inputs: equal outputs, and few shapes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config.registry import SEGMENTATIONS
from pipeline.inference.shapes import MOST, FewShapes, differ
from pipeline.runtime import Runtime
from pipeline.training.settings import autocast
from pipeline.workflow import apply
from tests import test_deeplab
from tests.marks import DEVICES
from tests.networks import build, randomise_batch_norms

# Largest differences, relative to the largest output; cuDNN may choose another algorithm for another shape.
CONVOLUTION = {"cpu": 1e-5, "cuda": 1e-4}
SCORES = {("cpu", "fp32"): 1e-4, ("cuda", "fp32"): 1e-3, ("cpu", "bf16"): 0.1, ("cuda", "bf16"): 0.1}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds the inputs of fp32 convolutions to TF32 by default, which these tests are too strict for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Seen(TorchFunctionMode):
    """Notes the shapes of the inputs of convolutions, and of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.convolved: set[tuple[int, ...]] = set()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.conv2d:
            self.convolved.add((*arguments[0].shape, *arguments[1].shape))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 2), ((4, 1), (2, 1))])
def test_a_convolution_computes_the_same(kernel: int, stride: int, padding: Any, dilation: Any, device: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups=2).to(device)
    for size in ((1, 33, 47), (3, 50, 17), (5, 64, 65), (2, 128, 300)):
        x = torch.randn(size[0], 4, *size[1:], device=device).contiguous(memory_format=torch.channels_last)
        expected = conv(x)
        with FewShapes():
            found = conv(x)
        torch.testing.assert_close(found, expected, rtol=CONVOLUTION[device], atol=CONVOLUTION[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", SEGMENTATIONS.names())
@pytest.mark.parametrize("backbone", ["small", "mobilenet_v2", "resnet50", "timm:tf_efficientnet_lite0"])
def test_scores_are_those_of_images_that_are_not_padded(backbone: str, head: str, precision: str, device: str) -> None:
    """Within ``SCORES`` of the largest score; padding that was seen would change scores near the rims by far more."""
    torch.manual_seed(0)
    network = test_deeplab.segmentation(head, backbone, **test_deeplab.NARROW[head])
    randomise_batch_norms(network)
    network.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for batch, height, width in ((1, 75, 100), (3, 67, 90)):
        x = torch.randn(batch, 3, height, width, device=device)
        with torch.inference_mode(), autocast(torch.device(device), precision):
            expected = network(x).float()
            with FewShapes():
                found = network(x).float()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < SCORES[device, precision] * expected.abs().max()


def test_gradients_are_those_of_images_that_are_not_padded() -> None:
    """Climbing follows gradients."""
    torch.manual_seed(0)
    network = build("small").eval()
    x = torch.randn(3, 3, 50, 35, requires_grad=True)
    (expected,) = torch.autograd.grad(network(x).square().sum(), x)
    with FewShapes():
        (found,) = torch.autograd.grad(network(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_shapes_are_few() -> None:
    """Photos of 60 sizes whose longer side is 500, in batches of 1 to 8."""
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)
    )
    random = np.random.default_rng(0)
    sizes = [(int(random.integers(1, 9)), 500, int(side)) for side in random.choice(np.arange(300, 500), 60, False)]
    counts = []
    for padded in (False, True):
        with Seen() as seen, torch.no_grad():
            for batch, height, width in sizes:
                x = torch.empty(batch, 3, height, width)
                if padded:
                    with FewShapes():
                        network(x)
                else:
                    network(x)
        counts.append(len(seen.convolved))
    assert counts[0] > 170
    assert counts[1] <= 3 * 4 * 7  # layers, batches, widths


def test_sizes_differ() -> None:
    assert not differ([(72, 72)] * 2000)
    assert not differ([(side, 72) for side in range(MOST)])
    assert differ([(side, 72) for side in range(MOST + 1)])


def test_no_more_sizes_are_looked_at_than_needed() -> None:
    sizes = iter([(side, 72) for side in range(100)])
    assert differ(sizes)
    assert len(list(sizes)) == 100 - MOST - 1
    endless: Iterator[tuple[int, int]] = iter(lambda: (1, 1), None)
    assert not differ(endless)


@pytest.mark.parametrize(
    ("device", "resized", "sizes", "pads"),
    [("cuda", False, 20, True), ("cuda", True, 20, False), ("cuda", False, 3, False), ("cpu", False, 20, False)],
)
def test_only_images_of_many_sizes_on_cuda_are_padded(
    device: str, resized: bool, sizes: int, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Photo:
        def __init__(self, number: int) -> None:
            self.size = number % sizes, 10

    active: list[bool] = []

    def note(*arguments: Any, **named: Any) -> None:
        active.append(any(isinstance(mode, FewShapes) for mode in torch.overrides._get_current_function_mode_stack()))

    monkeypatch.setattr(apply, "write_blocks", note)
    application: Any = apply.Application.__new__(apply.Application)
    application._device, application.network, application._work = torch.device(device), nn.Identity(), _work()
    images: Any = [Photo(number) for number in range(40)]
    application.write(images, lambda network, block, device: [], None, resized)
    assert active == [pads]


def _work() -> Any:
    class Work:
        class job:
            label = "x"

        checkpoint = Path("x")
        runtime = Runtime()

    return Work
