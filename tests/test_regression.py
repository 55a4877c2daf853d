"""Localization map refinement learning: the target, the loss and the maps that are read off."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.registry import REFINEMENTS, Choice
from pipeline.config.schema import Backbone, Head, Refinement, Training
from pipeline.config.views import Localization
from pipeline.data.index import Image
from pipeline.inference.localize import localization_maps
from pipeline.refinement.regression import RegressionNetwork, strongest
from tests.marks import DEVICES

K = 3


def network(**settings: Any) -> RegressionNetwork:
    torch.manual_seed(0)
    training = Training(4, 1e-3, epochs=1)
    choice = Choice(REFINEMENTS, "regression", settings)
    block = Refinement("localizations/x", Backbone("small"), training, choice, Head(1, 32))
    return RegressionNetwork(block, K)


def test_each_pixel_keeps_its_strongest_class() -> None:
    maps = torch.tensor([0.2, 0.9, 0.4, 0.0]).view(1, 1, 2, 2), torch.tensor([0.3, 0.1, 0.4, 0.0]).view(1, 1, 2, 2)
    found = strongest(torch.cat(maps, 1))
    assert torch.equal(found[0, 0], torch.tensor([[0.0, 0.9], [0.4, 0.0]]))
    assert torch.equal(found[0, 1], torch.tensor([[0.3, 0.0], [0.4, 0.0]]))


@pytest.mark.parametrize("target", ["strongest", "full"])
def test_the_loss_is_the_mean_square_over_all_classes_and_pixels(target: str) -> None:
    """In float64 loops; an absent class's target is 0 and counts."""
    model = network(target=target).eval()
    images = torch.randn(2, 3, 16, 24)
    maps = torch.rand(2, K, 16, 24)
    maps[:, 2] = 0
    with torch.no_grad():
        values = torch.nn.functional.interpolate(model(images), size=(16, 24), mode="bilinear").double().numpy()
        loss = model.loss(images, lambda size: maps if size == (16, 24) else torch.empty(0), torch.ones(2, K))
    total = 0.0
    for b, y, x in np.ndindex(2, 16, 24):
        wanted = maps[b, :, y, x].double().numpy()
        if target == "strongest":
            wanted = np.where(wanted == wanted.max(), wanted, 0)
        total += float(((values[b, :, y, x] - wanted) ** 2).sum())
    assert float(loss) == pytest.approx(total / (2 * K * 16 * 24), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", ["strongest", "full"])
def test_pooled_it_is_the_mean_over_the_tags_of_the_batch(target: str, device: str) -> None:
    """Absent classes do not count, whatever their outputs are."""
    model = network(target=target, reduction="pooled").eval().to(device)
    images, tags = torch.randn(3, 3, 16, 24), torch.zeros(3, K)
    tags[0, [0, 2]] = tags[1, 1] = 1
    maps = torch.rand(3, K, 16, 24) * tags[:, :, None, None]
    with torch.no_grad():
        outputs = model(images.to(device)).cpu()
        values = torch.nn.functional.interpolate(outputs, size=(16, 24), mode="bilinear").double().numpy()
        loss = model.loss(images.to(device), lambda size: maps.to(device), tags.to(device))
    total = 0.0
    for b, k in ((0, 0), (0, 2), (1, 1)):
        wanted = maps[b, k].double().numpy()
        if target == "strongest":
            wanted = np.where(wanted == maps[b].amax(0).numpy(), wanted, 0)
        total += float(((values[b, k] - wanted) ** 2).sum())
    assert float(loss) == pytest.approx(total / (3 * 16 * 24), rel=1e-5)


def test_pooled_a_batch_without_tags_teaches_nothing() -> None:
    """All its images are negatives."""
    model = network(reduction="pooled")
    loss = model.loss(torch.randn(2, 3, 16, 24), lambda size: torch.zeros(2, K, *size), torch.zeros(2, K))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_the_output_is_linear_and_its_maps_are_not_negative() -> None:
    model = network().eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        values, maps = model(images), model.localize(images)
    assert values.min() < 0 < values.max()
    assert torch.equal(maps, values.clamp(min=0))


def test_added_layers_start_from_a_narrow_normal() -> None:
    weights = [parameter for name, parameter in network().head.named_parameters() if name.endswith("weight")]
    assert [round(float(weight.detach().std()), 3) for weight in weights] == pytest.approx([0.01, 0.01], abs=0.003)


def test_it_learns_a_map() -> None:
    model = network().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images = torch.randn(2, 3, 64, 64)
    images[:, :, :32] += 2
    maps = torch.zeros(2, K, 64, 64)
    maps[:, 0, :32] = 1
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(images, lambda size: maps, torch.ones(2, K)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = model.localize(images).mean((0, 3))
    assert found[0, :3].min() > 0.7
    assert found[0, 5:].max() < 0.3
    assert found[1:].max() < 0.3


class Fixed(torch.nn.Module):
    """Maps that are given, whatever the image."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def localize(self, images: Tensor) -> Tensor:
        return self.maps.expand(len(images), *self.maps.shape)


@pytest.mark.parametrize(("normalise", "expected"), [("max", [64, 255]), ("none", [128, 255])])
def test_values_are_divided_by_the_maximum_or_cut_at_one(normalise: Any, expected: list[int], tmp_path: Path) -> None:
    """A map of 0.5 and 2: without normalisation the weak pixel keeps its 0.5."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((1, 2, 3), np.uint8))
    image = Image("a", tmp_path / "a.png", 1, 2, (1,), None, None)
    settings = Localization("refinements/x", normalise=normalise, stride=1, fusion="max")
    maps = Fixed(torch.tensor([0.5, 2.0]).view(1, 1, 2))
    (row,) = localization_maps(maps, [image], settings, torch.device("cpu"))
    assert row[2].tolist() == [expected]
