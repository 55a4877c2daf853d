"""OAA's network for object localization (OAA Sec. 4.5, Fig. 12): its contract, its loss, and its training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.schema import Classifier
from pipeline.data.geometry import Window
from pipeline.methods.base import Method, Step
from pipeline.methods.oaa import AttentionAccumulator
from pipeline.methods.oaa_localization import OaaLocalization
from tests.method_contract import Arithmetic, Array, MethodContract, build_method, small_classifier
from tests.method_contract import K as CLASSES
from tests.test_attention_drop import batch_of, task
from tests.test_oaa import ALL, GRID, IMAGES, WHOLE, K, accumulator, feed, tag_row

Settings = OaaLocalization.Settings
CPU = torch.device("cpu")


def block(**settings: Any) -> Classifier:
    return small_classifier("oaa_localization", Settings(**settings), accumulate=ALL)


class TestOaaLocalization(MethodContract):
    block = block()

    def branch(self, weights: dict[str, Array], features: Array, name: str) -> Array:
        head = Arithmetic.conv(features, weights[f"{name}.convs.0.weight"], weights[f"{name}.convs.0.bias"], padding=1)
        scores = weights[f"{name}.classifier.weight"], weights[f"{name}.classifier.bias"]
        return Arithmetic.conv(np.maximum(head, 0), *scores)

    def expected(self, weights: dict[str, Array], images: Array) -> tuple[Array, Array]:
        """F1: a class-aware head, whose maps' means are the logits (OAA Eq. 1)."""
        maps = self.branch(weights, Arithmetic.small_backbone(weights, images), "head")
        return maps.mean((2, 3)), maps

    def step(self, method: Method, images: Tensor, tags: Tensor) -> Step:
        """With attention over the left half of each image."""
        loss, output = method.training_step(images, tags, 0)
        attention = torch.zeros(output.maps.shape)
        attention[..., : attention.shape[3] // 2] = tags[:, :, None, None]
        return Step(loss + method.attention_loss(output, attention, torch.ones(len(tags)) > 0, tags), output)

    def test_f2_alone_localizes(self, method: Method, images: Tensor) -> None:
        method.eval()
        weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
        features = Arithmetic.small_backbone(weights, images.double().numpy())
        expected = np.maximum(self.branch(weights, features, "integral"), 0)
        with torch.no_grad():
            found = method.localize(images)
        assert np.abs(found.numpy() - expected).max() < 1e-4 * expected.max()

    def test_new_layers_are_all_but_the_backbone(self, method: Method) -> None:
        new = {id(parameter) for layer in method.new_layers() for parameter in layer.parameters()}
        others = {id(value) for name, value in method.named_parameters() if not name.startswith("backbone.")}
        assert new == others

    def test_each_branch_is_a_layer(self, method: Method) -> None:
        assert list(method.layers()) == ["conv2", "conv4", "conv6", "head", "integral"]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_of_the_known_images_alone(weight: float) -> None:
    """OAA Eq. 9 by hand: means over N+ and N- of each class, summed over classes; the batch has three images."""
    method = build_method(block(weight=weight), CLASSES)
    output = method(torch.randn(3, 3, 24, 32))
    tags = torch.eye(CLASSES)[[0, 1, 4]]
    attention = torch.rand(3, CLASSES, 3, 4).mul(2).sub(1).relu() * tags[:, :, None, None]
    found = method.attention_loss(output, attention, torch.tensor([True, False, True]), tags)
    q = 1 / (1 + np.exp(-output.integral.detach().double().numpy()))  # type: ignore[attr-defined]
    p, total = attention.double().numpy(), 0.0
    for sample in (0, 2):
        for k in range(CLASSES):
            inside = p[sample, k] > 0
            if inside.any():
                total -= (p[sample, k][inside] * np.log(q[sample, k][inside])).mean()
            total -= np.log(1 - q[sample, k][~inside]).mean()
    assert float(found.detach()) == pytest.approx(weight * total / 3, rel=1e-5)
    none = method.attention_loss(output, attention, torch.zeros(3) > 0, tags)
    assert float(none) == 0
    assert not none.requires_grad


class TestCumulative:
    """What the accumulator returns to the network."""

    def of(self, kept: AttentionAccumulator, numbers: list[int], windows: list[Window] | None = None) -> Any:
        tags = torch.tensor([tag_row(IMAGES[number]) for number in numbers])
        ids = [IMAGES[number].id for number in numbers]
        return kept.cumulative(ids, tags, windows or [WHOLE] * len(ids), GRID, CPU)

    def test_pairs_without_a_map_are_zero_and_their_images_unknown(self) -> None:
        kept = accumulator()
        found, known = self.of(kept, [0, 1])
        assert known.tolist() == [False, False]
        assert not found.any()
        feed(kept, np.ones(GRID), 0)
        found, known = self.of(kept, [1, 0])
        assert known.tolist() == [False, True]
        assert found[1, 0].unique().tolist() == [1]
        assert found.sum() == GRID[0] * GRID[1]

    def test_an_image_is_known_once_all_of_its_tags_are(self) -> None:
        """Image 1 has the tags 2 and 4; only 4 passes the gate."""
        kept = accumulator(replace(ALL, gate="strict"))
        feed(kept, np.ones(GRID), 1, logits=[1.0, 0.5, 0.0, 2.0])
        found, known = self.of(kept, [1])
        assert known.tolist() == [False]
        assert found[0, 3].all()
        assert not found[0, 1].any()

    def test_it_is_the_maximum_so_far_in_the_samples_window(self) -> None:
        kept = accumulator()
        first, second = np.zeros((2, *GRID))
        first[0, 0], first[3, 5], second[3, 5], second[1, 1] = 4, 1, 2, 1
        feed(kept, first)
        feed(kept, second, epoch=1)
        expected = torch.zeros(GRID)
        expected[0, 0], expected[3, 5], expected[1, 1] = 1, 1, 128 / 255
        (whole, flipped, left), _ = self.of(kept, [0, 0, 0], [WHOLE, Window(flip=True), Window(0, 0, 1, 0.5)])
        torch.testing.assert_close(whole[0], expected)
        torch.testing.assert_close(flipped[0], expected.flip(1))
        assert left[0, 3].max() < 1e-6  # its right end is outside of the window
        assert left[0, 0, 0] == pytest.approx(1)

    def test_images_without_a_class_are_known(self) -> None:
        kept = accumulator()
        found, known = kept.cumulative([IMAGES[0].id], torch.zeros(1, K), [WHOLE], GRID, CPU)
        assert known.all()
        assert not found.any()


class TestTraining:
    """The classifier stage's task."""

    def network(self) -> type[Method]:
        torch.manual_seed(0)
        return OaaLocalization

    def test_f2_learns_once_its_images_have_maps(self, tmp_path: Path) -> None:
        trained = task(block(), tmp_path, self.network())
        loss = trained.loss(batch_of([0, 2]), 0)
        trained.end_batch()
        loss.backward()  # type: ignore[no-untyped-call]
        branch = trained.network.integral
        assert all(value.grad is None for value in branch.parameters())  # type: ignore[union-attr]
        loss = trained.loss(batch_of([0, 1]), 1)
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(value.grad is not None and value.grad.any() for value in branch.parameters())  # type: ignore[union-attr]

    def test_its_target_is_the_attention_of_f1_before_this_step(self, tmp_path: Path) -> None:
        trained = task(block(), tmp_path, self.network())
        attention = np.zeros(GRID)
        attention[1, 2] = 1
        feed(trained.accumulator, attention, 0)
        network = trained.network
        seen: list[Tensor] = []
        original = network.attention_loss

        def record(output: Any, maps: Tensor, known: Tensor, tags: Tensor) -> Tensor:
            seen.append(maps)
            assert maps.shape == output.maps.shape
            return original(output, maps, known, tags)

        network.attention_loss = record  # type: ignore[method-assign]
        batch = batch_of([0, 2])
        loss = trained.loss(batch, 1)
        (maps,) = seen
        assert maps[0, 0].argmax() == 1 * 8 + 3  # the centre of cell (1, 2) of 4 x 6 lies in that of 5 x 8
        assert not maps[1].any()
        network.attention_loss = lambda *_: torch.zeros(())  # type: ignore[method-assign]
        assert float(loss.detach()) > float(trained.loss(batch, 1).detach())

    def test_f2_learns_the_cumulative_attention(self, tmp_path: Path) -> None:
        """A fixed one here: the left half of each image, for its tags."""
        trained = task(block(reduction="pooled"), tmp_path, self.network())
        attention = np.zeros(GRID)
        attention[:, :3] = 1
        for number in (0, 2, 4):
            feed(trained.accumulator, attention, number)
        batch = batch_of([0, 2, 4])
        optimizer = torch.optim.SGD(trained.network.parameters(), 0.02, 0.9)
        for _ in range(60):
            loss = trained.loss(batch, 1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            maps = trained.network.eval().localize(batch.images)[batch.tags > 0]
        assert maps[..., :3].mean() > 4 * maps[..., 5:].mean()
