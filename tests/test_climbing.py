"""Anti-adversarial climbing: on a linear classifier whose climb can be computed by hand, and on trained ones' kin."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Suppression
from pipeline.config.views import Climbing, Localization
from pipeline.data.index import Image
from pipeline.inference import climbing
from pipeline.inference.climbing import climb
from pipeline.inference.localize import localization_maps
from pipeline.methods.base import Method, Output
from tests.marks import DEVICES
from tests.method_contract import build_method, small_classifier

CPU = torch.device("cpu")
K = 3
COLOURS = np.array([[1.0, -0.2, 0.1], [-0.3, 0.8, 0.4], [0.5, 0.5, -1.0]])  # of each class, the weights of R, G and B
BIAS = np.array([0.1, -0.2, 0.05])
Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 would hide small errors."""
    for module in ("localize", "climbing"):
        monkeypatch.setattr(
            f"pipeline.inference.{module}.autocast",
            lambda device, precision: torch.autocast(device.type, torch.bfloat16, enabled=False),
        )


class Linear(Method):
    """A class's map is a weighted sum of the image's colours, pixel by pixel; its logit is the map's mean."""

    map_name = "Linear"

    def __init__(self) -> None:
        super().__init__(small_classifier(), K)
        self.classifier = nn.Conv2d(3, K, 1)
        self.classifier.weight.data = torch.from_numpy(COLOURS).float()[:, :, None, None]
        self.classifier.bias.data = torch.from_numpy(BIAS).float()  # type: ignore[union-attr]
        self.seen: list[Tensor] = []

    def new_layers(self) -> Iterable[nn.Module]:
        return [self.classifier]

    def layers(self) -> dict[str, list[nn.Module]]:
        return {"all": [self.classifier]}

    def describe(self) -> str:
        return self.map_name

    def forward(self, images: Tensor, occluded: Tensor | None = None) -> Output:
        self.seen.append(images.detach().clone())
        maps = self.classifier(images)
        return Output(maps.mean((2, 3)), maps)


def by_hand(image: Array, number: int, settings: Climbing) -> tuple[list[Array], list[float], list[Array]]:
    """3 x H x W -> maps, logits and images along the climb of one class, one pixel at a time."""

    def class_map(x: Array, k: int) -> Array:
        found: Array = np.tensordot(COLOURS[k], x, 1) + BIAS[k]
        return found

    x, pixels = image.copy(), image[0].size
    first = np.maximum(class_map(image, number), 0)
    maps, logits, images = [first], [float(class_map(image, number).mean())], [x]
    for _ in range(settings.iterations):
        current = np.maximum(class_map(x, number), 0)
        gradient = np.zeros_like(x)
        for row, column in np.ndindex(*x.shape[1:]):
            gradient[:, row, column] += COLOURS[number] / pixels
            for other in set(range(K)) - {number}:
                if class_map(x, other).mean() > 0:
                    gradient[:, row, column] -= COLOURS[other] / pixels
            attended = current[row, column] > settings.threshold * current.max()
            if attended and current[row, column] > 0:
                rising = np.sign(current[row, column] - first[row, column])
                gradient[:, row, column] -= settings.weight * rising * COLOURS[number]
        x = np.clip(x + settings.step * gradient / np.abs(gradient).max(), image.min(), image.max())
        maps.append(np.maximum(class_map(x, number), 0))
        logits.append(float(class_map(x, number).mean()))
        images.append(x)
    return maps, logits, images


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 5, 6, generator=torch.Generator().manual_seed(0))


PRESENT = [[0, 2], [1], [2, 0, 1]]


class TestClimb:
    @pytest.mark.parametrize(
        "settings", [Climbing(4, 0.3, 0.0), Climbing(5, 0.1, 7.0), Climbing(3, 0.2, 0.02, 0.2)], ids=str
    )
    def test_by_hand(self, images: Tensor, settings: Climbing) -> None:
        """Of each present class, on its own; what is not present is 0."""
        found = climb(Linear(), images, PRESENT, settings).numpy()
        for sample, classes in enumerate(PRESENT):
            for number in range(K):
                if number in classes:
                    maps, _, _ = by_hand(images[sample].double().numpy(), number, settings)
                    assert np.abs(found[sample, number] - np.mean(maps, 0)).max() < 1e-4
                    assert np.abs(maps[-1] - maps[0]).max() > 0.05
                else:
                    assert not found[sample, number].any()

    def test_the_climb_goes_through_the_images_by_hand(self, images: Tensor) -> None:
        network, settings = Linear(), Climbing(4, 0.3, 0.5)
        climb(network, images[:1], [[1]], settings)
        _, _, expected = by_hand(images[0].double().numpy(), 1, settings)
        assert len(network.seen) == len(expected) == 5
        for seen, image in zip(network.seen, expected, strict=True):
            assert np.abs(seen[0].numpy() - image).max() < 1e-4
        largest = (network.seen[1] - network.seen[0]).abs().max()
        assert largest <= 0.3 + 1e-6
        assert min(x.min() for x in network.seen) >= images[0].min()
        assert max(x.max() for x in network.seen) <= images[0].max()

    def test_no_iterations_are_the_plain_maps(self, images: Tensor) -> None:
        network = Linear()
        found = climb(network, images, PRESENT, Climbing(iterations=0))
        with torch.no_grad():
            plain = network.localize(images)
        for sample, classes in enumerate(PRESENT):
            torch.testing.assert_close(found[sample, classes], plain[sample, classes])

    def test_the_score_grows_with_every_step(self, images: Tensor) -> None:
        network = Linear()
        climb(network, images[:1], [[0]], Climbing(8, 0.05, 0.0))
        logits = [float(network.classifier(x).mean((2, 3))[0, 0].detach()) for x in network.seen]
        assert len(logits) == 9
        assert all(after > before for before, after in pairwise(logits))
        assert logits[-1] > logits[0] + 0.1

    def test_attended_places_are_held(self, images: Tensor) -> None:
        """With the term they end near where they were; without it they gain as the rest does."""
        changes = {}
        for weight in (0.0, 7.0):
            network = Linear()
            climb(network, images[:1], [[0]], Climbing(12, 0.05, weight))
            first, last = (network.classifier(network.seen[at])[0, 0].detach() for at in (0, -1))
            attended = first > 0.5 * first.max()
            changes[weight] = float((last - first)[attended].abs().mean())
        assert changes[7.0] < 0.3 * changes[0.0]

    def test_other_classes_lose(self, images: Tensor) -> None:
        """A class that is positive beside the one that climbs: with colours in common it would gain, but is held."""
        network = Linear()
        bright = images[:1] + 1
        climb(network, bright, [[0]], Climbing(6, 0.1, 0.0))
        first, last = (network.classifier(network.seen[at]).mean((2, 3))[0].detach() for at in (0, -1))
        assert first[1] > 0
        assert last[1] < first[1]
        assert last[0] > first[0]

    def test_images_do_not_depend_on_their_neighbours(self, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = Climbing(3)
        together = climb(Linear(), images, PRESENT, settings)
        for sample, classes in enumerate(PRESENT):
            torch.testing.assert_close(
                climb(Linear(), images[sample : sample + 1], [classes], settings)[0], together[sample]
            )
        monkeypatch.setattr(climbing, "pixels_per_batch", lambda device: 2 * climbing.SHARE * 30)
        network = Linear()
        torch.testing.assert_close(climb(network, images, PRESENT, settings), together)
        assert [len(x) for x in network.seen] == 4 * [2] + 4 * [2] + 4 * [2]

    def test_it_leaves_nothing_behind(self, images: Tensor) -> None:
        network, before = Linear(), images.clone()
        found = climb(network, images, PRESENT, Climbing(2))
        assert not found.requires_grad
        assert torch.equal(images, before)
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_a_score_without_a_gradient_stays_where_it_is(self) -> None:
        network = Linear()
        nn.init.zeros_(network.classifier.weight)
        images = torch.randn(1, 3, 4, 4)
        found = climb(network, images, [[0]], Climbing(2))
        assert found.isfinite().all()
        assert torch.equal(network.seen[-1], images)


@pytest.mark.parametrize(
    "settings",
    [
        small_classifier(),
        small_classifier(method="amr"),
        small_classifier(method="edam"),
        small_classifier(method="seam"),
        small_classifier(suppression=Suppression()),
        small_classifier(method="amr", suppression=Suppression()),
    ],
    ids=["cam", "amr", "edam", "seam", "drs", "amr+drs"],
)
def test_every_method_climbs(settings: Any) -> None:
    """The score of each class grows, twice the same, and the network stays what it is."""
    torch.manual_seed(0)
    method = build_method(settings, K).eval()
    state = {name: value.clone() for name, value in method.state_dict().items()}
    images, present = torch.randn(2, 3, 32, 40), [[0], [0, 2]]
    scores: list[list[float]] = []

    def note(_module: nn.Module, _inputs: Any, output: Output) -> None:
        """Of the three climbs: the own logit minus those of the others that are positive."""
        own = output.logits.detach()[[0, 1, 2], [0, 0, 2]]
        scores.append((own + own.relu() - output.logits.detach().relu().sum(1)).tolist())

    method.register_forward_hook(note)
    found = climb(method, images, present, Climbing(6, 0.05, 0.0))
    assert found.shape == (2, K, 4, 5)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found[0, 0].any()
    assert not found[0, 1:].any()
    assert len(scores) == 7
    assert all(after > before for before, after in zip(scores[0], scores[-1], strict=True))
    assert torch.equal(climb(method, images, present, Climbing(6, 0.05, 0.0)), found)
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_seam_climbs_deterministically(device: str, deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refined maps depend on the cells' mean colours. CUDA's pooling has no deterministic gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding would amplify that of float32
    torch.manual_seed(0)
    method = build_method(small_classifier(method="seam"), K).eval().to(device)
    images = torch.randn(2, 3, 32, 40, device=device)
    torch.use_deterministic_algorithms(False)
    expected = climb(method, images, [[0], [0, 2]], Climbing(3, 0.05, 1.0))
    torch.use_deterministic_algorithms(True)
    pool = functional.adaptive_avg_pool2d

    def refuse_gradients(values: Tensor, size: tuple[int, int]) -> Tensor:
        assert not values.requires_grad
        return pool(values, size)

    monkeypatch.setattr(functional, "adaptive_avg_pool2d", refuse_gradients)
    found = climb(method, images, [[0], [0, 2]], Climbing(3, 0.05, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(climb(method, images, [[0], [0, 2]], Climbing(3, 0.05, 1.0)), found)


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Image]:
    def save(name: str, tags: Sequence[int], height: int = 24, width: int = 32) -> Image:
        rgb = np.random.default_rng(len(name)).integers(30, 226, (6, 8, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{name}.png"), cv2.resize(rgb, (width, height)))
        return Image(name, tmp_path / f"{name}.png", height, width, tuple(tags), None, None)

    return save


class TestLocalization:
    def maps(self, network: nn.Module, images: list[Image], **settings: Any) -> dict[tuple[str, int], list[Any]]:
        found = localization_maps(network, images, Localization("classifiers/base", **settings), CPU)
        return {(name, tag): values.tolist() for name, tag, values in found}

    def test_off_without_settings_and_plain_without_iterations(self, photo: Callable[..., Image]) -> None:
        images = [photo("one", (1, 3)), photo("three", (2,)), photo("other", (1, 2, 3), 32, 24)]
        for settings in ({}, {"scales": (1.0, 0.5), "flip": True}, {"scales": (1.0, 1.5), "fusion": "max"}):
            plain = self.maps(Linear(), images, **settings)
            assert set(plain) == {(image.id, tag) for image in images for tag in image.tags}
            assert self.maps(Linear(), images, climbing=Climbing(0), **settings) == plain
            climbed = self.maps(Linear(), images, climbing=Climbing(4, 0.3, 0.0), **settings)
            assert set(climbed) == set(plain)
            assert all(climbed[key] != plain[key] for key in plain)

    def test_every_view_climbs_and_is_unflipped(self, photo: Callable[..., Image]) -> None:
        """Two scales and two flips of one image of two tags: five passes of each, of both tags at once."""
        network = Linear()
        image = photo("one", (1, 3))
        both = self.maps(network, [image], climbing=Climbing(4), flip=True, scales=(1.0, 0.5))
        assert [tuple(x.shape[2:]) for x in network.seen] == 10 * [(24, 32)] + 10 * [(12, 16)]
        assert all(len(x) == 2 for x in network.seen)
        torch.testing.assert_close(network.seen[5], network.seen[0].flip(3))
        # a classifier of single pixels sees the flipped image flipped, so that its maps must fall on the others
        single = self.maps(Linear(), [image], climbing=Climbing(4), scales=(1.0, 0.5))
        assert all(np.abs(np.subtract(both[key], single[key])).max() <= 1 for key in single)
