"""The integral attention model's losses against plain float64 loops over the formulas, and its stage's target."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.registry import REFINEMENTS, Choice
from pipeline.config.schema import Backbone, Head, Refinement, Training
from pipeline.data.collation import collate, joined
from pipeline.data.geometry import Window
from pipeline.data.loading import Batch, Item, Sample
from pipeline.refinement.integral import IntegralModel, integral_loss
from pipeline.stores.raster import RasterStore, RasterWriter
from stages.refinement import RefinementTask
from stages.refinement import attention as target_of

B, K, H, W = 3, 4, 5, 6
Array = NDArray[np.float64]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def expected(logits: Array, p: Array, tags: Array, loss: str, reduction: str, threshold: float) -> float:
    """The formulas, pixel by pixel: OAA Eq. 6, 7 and 9, summed over classes; or all classes of an image pooled."""
    totals = []
    for sample in range(len(logits)):
        groups: dict[int, dict[str, list[float]]] = {}
        for c in range(K):
            if reduction == "present" and not tags[sample, c]:
                continue
            group = groups.setdefault(0 if reduction == "pooled" else c, {"all": [], "positive": [], "negative": []})
            for q, target in zip(logits[sample, c].flat, p[sample, c].flat, strict=True):
                group["all"].append(-(target * log_sigmoid(q) + (1 - target) * log_sigmoid(-q)))
                if tags[sample, c] and target > threshold:
                    group["positive"].append(-target * log_sigmoid(q))
                else:
                    group["negative"].append(-log_sigmoid(-q))
        parts = {"cross_entropy": ["all"], "enhance": ["positive"], "hybrid": ["positive", "negative"]}[loss]
        totals.append(sum(mean(group[part]) for group in groups.values() for part in parts))
    return sum(totals) / len(totals)


def example(seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits, attention (0 in about half of the pixels, and for absent classes) and tags."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (B, K, H, W))
    tags = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], float)
    attention = np.maximum(random.uniform(-1, 1, (B, K, H, W)), 0) * tags[:, :, None, None]
    return logits, attention, tags


def loss_of(logits: Array, attention: Array, tags: Array, **settings: Any) -> Tensor:
    scores, target, present = (torch.from_numpy(values).float() for values in (logits, attention, tags))
    return integral_loss(scores, target, present, **settings)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("reduction", ["class", "present", "pooled"])
@pytest.mark.parametrize("loss", ["hybrid", "cross_entropy", "enhance"])
def test_losses_are_their_formulas(loss: str, reduction: str, threshold: float) -> None:
    for seed in range(3):
        logits, attention, tags = example(seed)
        found = loss_of(logits, attention, tags, loss=loss, reduction=reduction, threshold=threshold)
        wanted = expected(logits, attention, tags, loss, reduction, threshold)
        assert found.shape == ()
        assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_by_hand() -> None:
    """One class tagged of two, two pixels, all logits 0: log q is -log 2 everywhere.

    Class 1, p = (0.5, 0): N+ gives 0.5 log 2, N- gives log 2. Class 2: N- gives log 2. Pooled: N- has 3 pixels.
    """
    logits, attention, tags = np.zeros((1, 2, 1, 2)), np.zeros((1, 2, 1, 2)), np.array([[1.0, 0.0]])
    attention[0, 0, 0, 0] = 0.5
    log2 = math.log(2)
    assert float(loss_of(logits, attention, tags)) == pytest.approx(2.5 * log2)
    assert float(loss_of(logits, attention, tags, reduction="present")) == pytest.approx(1.5 * log2)
    assert float(loss_of(logits, attention, tags, reduction="pooled")) == pytest.approx(1.5 * log2)
    assert float(loss_of(logits, attention, tags, loss="enhance")) == pytest.approx(0.5 * log2)
    assert float(loss_of(logits, attention, tags, loss="cross_entropy")) == pytest.approx(2 * log2)


@pytest.mark.parametrize("reduction", ["class", "pooled"])
@pytest.mark.parametrize("loss", ["hybrid", "cross_entropy", "enhance"])
def test_extreme_logits_stay_finite(loss: str, reduction: str) -> None:
    """The worst cases: 'certainly absent' on attention 1 and 'certainly present' off it."""
    _, attention, tags = example()
    attention[attention > 0.5] = 1
    for logits in (np.where(attention > 0, -1e4, 1e4), np.full_like(attention, 1e4), np.full_like(attention, -1e4)):
        values = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        found = integral_loss(
            values, torch.from_numpy(attention).float(), torch.from_numpy(tags).float(), loss, reduction
        )
        found.backward()  # type: ignore[no-untyped-call]
        assert found.isfinite()
        assert values.grad is not None
        assert values.grad.isfinite().all()
    assert found.detach() < 1e5


def test_confident_mistakes_keep_their_gradient() -> None:
    """At +-1e4 every wrong pixel is still pulled with full weight: p / |N+| upwards, 1 / |N-| downwards."""
    logits = torch.tensor([[[[-1e4, -1e4, 1e4, 1e4]]]], requires_grad=True)
    attention = torch.tensor([[[[1.0, 0.5, 0.0, 0.0]]]])
    integral_loss(logits, attention, torch.ones(1, 1)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([-0.5, -0.25, 0.5, 0.5])


def test_absent_classes_are_only_constrained() -> None:
    """Attention of an untagged class is no target: its gradient points down everywhere, and 'enhance' ignores it."""
    logits, attention, tags = example()
    attention[0, 1] = 1  # class 2 is not tagged in image 0
    for reduction in ("class", "pooled"):
        values = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        rest = torch.from_numpy(attention).float(), torch.from_numpy(tags).float()
        integral_loss(values, *rest, "hybrid", reduction).backward()  # type: ignore[no-untyped-call]
        assert values.grad is not None
        assert (values.grad[0, 1] > 0).all()
        values = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        integral_loss(values, *rest, "enhance", reduction).backward()  # type: ignore[no-untyped-call]
        assert values.grad is not None
        assert not values.grad[0, 1].any()
        assert (values.grad[0, 0][rest[0][0, 0] > 0] < 0).all()


@pytest.mark.parametrize("reduction", ["class", "pooled"])
def test_empty_regions_count_nothing(reduction: str) -> None:
    """No attention at all: the constraint alone. Attention everywhere: no constraint."""
    logits, _, _ = example()
    every = np.ones((B, K))
    nothing, all_of_it = np.zeros((B, K, H, W)), np.full((B, K, H, W), 0.7)
    assert float(loss_of(logits, nothing, every, loss="enhance", reduction=reduction)) == 0
    for attention in (nothing, all_of_it):
        found = loss_of(logits, attention, every, reduction=reduction)
        assert float(found) == pytest.approx(expected(logits, attention, every, "hybrid", reduction, 0.0), rel=1e-5)
    constraint_free = loss_of(logits, all_of_it, every, reduction=reduction)
    assert float(constraint_free) == float(loss_of(logits, all_of_it, every, loss="enhance", reduction=reduction))


def test_threshold_is_exclusive() -> None:
    logits, attention, tags = np.zeros((1, 1, 1, 2)), np.array([[[[0.25, 0.75]]]]), np.ones((1, 1))
    log2 = math.log(2)
    assert float(loss_of(logits, attention, tags, threshold=0.25)) == pytest.approx(0.75 * log2 + log2)
    assert float(loss_of(logits, attention, tags, threshold=0.24)) == pytest.approx(0.5 * log2)


def settings(**changes: Any) -> Refinement:
    training = Training(batch_size=2, lr=0.1, epochs=1)
    choice = Choice(REFINEMENTS, "integral", changes)
    return Refinement("classifiers/base", Backbone("small"), training, choice, head=Head(1, 8))


class TestModel:
    def network(self, **changes: Any) -> IntegralModel:
        torch.manual_seed(0)
        return IntegralModel(settings(**changes), K)

    def test_logits_are_maps_at_the_networks_stride(self) -> None:
        assert self.network()(torch.zeros(2, 3, 33, 48)).shape == (2, K, 5, 6)

    def test_loss_passes_the_settings_on(self) -> None:
        images = torch.randn(2, 3, 40, 48)
        attention, tags = torch.rand(2, K, 5, 6), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
        sizes: list[tuple[int, int]] = []

        def target(size: tuple[int, int]) -> Tensor:
            sizes.append(size)
            return attention

        for changes in ({}, {"loss": "enhance"}, {"reduction": "pooled"}, {"threshold": 0.5}):
            network = self.network(**changes).eval()
            found = network.loss(images, target, tags)
            assert torch.equal(found, integral_loss(network(images), attention, tags, **changes))
        assert set(sizes) == {(5, 6)}

    def test_localize_is_the_positive_part(self) -> None:
        network, images = self.network().eval(), torch.randn(2, 3, 40, 48)
        found = network.localize(images)
        assert torch.equal(found, network(images).clamp(min=0))
        assert (found == 0).any()
        assert (found > 0).any()

    def test_new_layers_are_the_head(self) -> None:
        network = self.network()
        found = {id(parameter) for layer in network.new_layers() for parameter in layer.parameters()}
        assert found == {id(parameter) for parameter in network.head.parameters()}


class TestTarget:
    """The stage's target: stored maps through each sample's window, 0 for what is absent or in the padding."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> RasterStore:
        path = tmp_path / "maps.h5"
        with RasterWriter(path, "attention") as writer:
            writer.append("a", np.arange(0, 240, 10).astype(np.uint8).reshape(4, 6), 1)
            writer.append("a", np.full((4, 6), 255, np.uint8), 3)
            writer.append("b", np.full((6, 4), 51, np.uint8), 2)
            writer.add_image("c")  # a pair that was never seen
        return RasterStore(path)

    def batch(self, store: RasterStore, *windows: Window) -> Batch:
        """As the loader ships it."""
        tags = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
        pixels = np.zeros((32, 32, 3), np.uint8)
        items = [
            Item(Sample(pixels, window, (0, 0, 32, 32), None, None), row, name, store.maps(name))
            for name, row, window in zip("abc", tags, windows, strict=True)
        ]
        return collate(items).to(torch.device("cpu"))

    def test_maps_are_found_by_id_and_class(self, store: RasterStore) -> None:
        found = target_of(self.batch(store, Window(), Window(), Window()), (4, 6))
        assert found.shape == (3, K, 4, 6)
        np.testing.assert_allclose(found[0, 0] * 255, np.arange(0, 240, 10).reshape(4, 6), atol=1e-3)
        assert found[0, 2].eq(1).all()
        torch.testing.assert_close(found[1, 1], torch.full((4, 6), 0.2))
        for sample, classes in enumerate([(1, 3), (0, 2, 3), (0, 1, 2, 3)]):
            assert not found[sample, list(classes)].any()

    def test_flips_and_padding_are_followed(self, store: RasterStore) -> None:
        """Image a flipped; b with as much padding below it as it is high."""
        found = target_of(self.batch(store, Window(flip=True), Window(bottom=2.0), Window()), (4, 6))
        expected = np.arange(0, 240, 10).reshape(4, 6)[:, ::-1]
        np.testing.assert_allclose(found[0, 0] * 255, expected, atol=1e-3)
        torch.testing.assert_close(found[1, 1, :2], torch.full((2, 6), 0.2))
        assert not found[1, 1, 2:].any()

    def test_batches_that_are_joined_have_the_targets_of_both(self, store: RasterStore) -> None:
        one = self.batch(store, Window(), Window(0.1, 0.2, 0.7, 0.9), Window())
        other = self.batch(store, Window(flip=True), Window(bottom=2.0), Window())
        expected = torch.cat([target_of(batch, (4, 6)) for batch in (one, other)])
        assert torch.equal(target_of(joined([one, other]), (4, 6)), expected)

    def test_the_loss_learns_the_stored_maps(self, store: RasterStore) -> None:
        torch.manual_seed(0)
        task = RefinementTask(IntegralModel(settings(), K))
        batch = self.batch(store, Window(), Window(), Window())
        batch.images = torch.randn(3, 3, 32, 32)
        optimizer = torch.optim.SGD(task.network.parameters(), lr=0.05)
        losses = []
        for _ in range(8):
            loss = task.loss(batch, 0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
