"""AGEN's labels on the fly and its losses against the paper's formulas in NumPy and float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Crf
from pipeline.data.loading import normalise
from pipeline.methods.agen_losses import BoundaryLoss, inside, online_labels, photos, seeding_loss
from tests.method_contract import Array
from tests.networks import resize

K = 5
SIZE = (24, 40)
FEW = Crf(iterations=3, gaussian_xy=1, gaussian_weight=2, bilateral_xy=5, bilateral_rgb=13, bilateral_weight=4)
TAGS = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).float()


def padded_images() -> Tensor:
    made = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    made[1, :, :, 30:] = 0
    return made


def softmax(x: Array, axis: int) -> Array:
    found = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(found / found.sum(axis, keepdims=True))


def labelled(maps: Array, tags: Array, out: tuple[int, int], delta: float, power: float, reading: str) -> NDArray[Any]:
    """Eq. 2 to 4 and the thresholds, image by image."""
    found = np.full((len(maps), *out), 255)
    for number, (raw, present) in enumerate(zip(maps, tags, strict=True)):
        scores, known = {}, True
        for c in np.flatnonzero(present):
            m = resize(np.maximum(raw[c], 0), *out)
            known = known and m.max() > 0
            scores[int(c) + 1] = m / m.max() if m.max() > 0 else m
        strongest = np.max([*scores.values()], axis=0) if scores else np.zeros(out)
        if known:
            scores[0] = (1 - strongest) ** power
        votes = np.zeros(out, int)
        for class_id, score in scores.items():
            if reading == "value":
                sure = score > delta
            elif reading == "share":
                sure = (score >= (1 - delta) * score.max()) & (score > 0)
            else:
                sure = (score >= np.sort(score, axis=None)[::-1][round(delta * score.size) - 1]) & (score > 0)
            found[number][sure] = class_id
            votes += sure
        found[number][votes != 1] = 255
    return found


class TestOnlineLabels:
    @pytest.mark.parametrize(("reading", "delta"), [("value", 0.3), ("share", 0.4), ("rank", 0.25)])
    @pytest.mark.parametrize("power", [1.0, 8.0])
    def test_they_are_their_formula(self, reading: str, delta: float, power: float) -> None:
        maps = torch.randn(3, K, 5, 8, generator=torch.Generator().manual_seed(2)) + 0.5
        found = online_labels(maps, TAGS, SIZE, delta, power, reading).numpy()
        wanted = labelled(maps.double().numpy(), TAGS.numpy(), SIZE, delta, power, reading)
        assert (found != wanted).mean() < 0.003  # float32 at the threshold
        assert {0, 1, 2, 3, 4, 255} >= set(np.unique(found)) >= {1, 2, 255}
        assert not (found == 5).any()  # no image has it

    @pytest.mark.parametrize("reading", ["value", "share", "rank"])
    def test_cells_by_hand(self, reading: str) -> None:
        """Two classes side by side, both in the middle, nothing at the right."""
        maps = torch.tensor([[[4.0, 4, 0, 0], [0, 8, 8, -1]]])[:, :, None]
        maps = torch.cat([maps, torch.full((1, 1, 1, 4), 9.0)], 1)  # an absent class
        found = online_labels(maps, torch.tensor([[1.0, 1, 0]]), (1, 4), 0.5, 8, reading)
        assert found.tolist() == [[[1, 255, 2, 0]]]

    def test_a_pixel_of_which_nothing_is_sure_is_ignored(self) -> None:
        found = online_labels(torch.tensor([[[[10.0, 3, 0.5]]]]), torch.ones(1, 1), (1, 3), 0.4)
        assert found.tolist() == [[[1, 255, 0]]]

    def test_a_silent_class_leaves_no_background(self) -> None:
        maps = torch.stack([torch.tensor([[[5.0, 0]], [[-1, -1]]])] * 3)
        tags = torch.tensor([[1.0, 1], [1, 0], [0, 0]])
        assert online_labels(maps, tags, (1, 2), 0.4)[:, 0].tolist() == [[1, 255], [1, 0], [0, 0]]

    def test_no_gradient_flows_through_them(self) -> None:
        found = online_labels(torch.randn(1, 2, 3, 3, requires_grad=True), torch.ones(1, 2), (6, 6), 0.3)
        assert not found.requires_grad
        assert found.dtype == torch.int64


def seeded(logits: Array, labels: NDArray[Any]) -> float:
    """Eq. 12 over a batch."""
    chances = np.log(softmax(logits, 1))
    total = 0.0
    for part in ((labels > 0) & (labels < 255), labels == 0):
        b, y, x = np.nonzero(part)
        if len(b):
            total -= chances[b, labels[b, y, x], y, x].mean()
    return total


class TestSeedingLoss:
    @pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 3), (0,), ()], ids=["both", "objects", "background", "nothing"])
    def test_it_is_its_formula(self, kept: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        logits = (3 * torch.randn(2, 4, 5, 7)).requires_grad_()
        labels = torch.randint(0, 6, (2, 5, 7))
        labels[~torch.isin(labels, torch.tensor(kept))] = 255
        found = seeding_loss(logits, labels)
        assert found.item() == pytest.approx(seeded(logits.detach().double().numpy(), labels.numpy()), rel=1e-5)
        found.backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.any() == bool(kept)
        assert not logits.grad.movedim(1, -1)[labels == 255].any()

    def test_objects_count_as_much_as_background_however_few(self) -> None:
        logits = torch.zeros(1, 3, 1, 10)
        logits[0, 1, 0, 0] = 5
        few, many = torch.tensor([[[1] + 9 * [0]]]), torch.tensor([[[1, 0] + 8 * [255]]])
        assert seeding_loss(logits, few).item() == pytest.approx(seeding_loss(logits, many).item())


class TestBoundaryLoss:
    def photo(self) -> NDArray[np.uint8]:
        random = np.random.default_rng(0)
        made = random.integers(80, 120, (2, 28, 42, 3))
        made[:, 8:20, 10:30] += 90
        return made.astype(np.uint8)

    def golden(self, logits: Array, photo: NDArray[np.uint8], crf: Crf) -> float:
        """KL(R || S) with pydensecrf used plainly, at the size of the logits."""
        densecrf = pytest.importorskip("pydensecrf.densecrf")
        total = []
        for scores, picture in zip(logits, photo, strict=True):
            classes, height, width = scores.shape
            s = softmax(scores, 0) + 1e-4
            s /= s.sum(0)
            field = densecrf.DenseCRF2D(width, height, classes)
            field.setUnaryEnergy(np.ascontiguousarray(-np.log(s).reshape(classes, -1), np.float32))
            field.addPairwiseGaussian(sxy=crf.gaussian_xy, compat=crf.gaussian_weight)
            field.addPairwiseBilateral(
                sxy=crf.bilateral_xy,
                srgb=crf.bilateral_rgb,
                rgbim=np.ascontiguousarray(picture),
                compat=crf.bilateral_weight,
            )
            r = np.maximum(np.array(field.inference(crf.iterations), float).reshape(s.shape), 1e-4)
            r /= r.sum(0)
            total.append((r * np.log(r / s)).sum(0))
        return float(np.mean(total))

    def test_it_is_its_formula(self) -> None:
        photo = self.photo()
        logits = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        images = torch.stack([normalise(picture) for picture in photo])
        found = BoundaryLoss(logits, images, 12, FEW, map).value()
        reduced = photos(images, (8, 12))
        wanted = self.golden(resize(logits.detach().double().numpy(), 8, 12), reduced, FEW)
        assert found.item() == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0.01

    def test_its_gradient_is_that_of_the_cross_entropy_with_the_marginals(self) -> None:
        """S - R over the number of pixels, but for the floors: R is a constant."""
        torch.manual_seed(0)
        logits = torch.randn(1, 3, 4, 6, requires_grad=True)
        images = torch.stack([normalise(picture) for picture in self.photo()[:1]])
        loss = BoundaryLoss(logits, images, 6, FEW, map)
        marginals = list(loss.marginals)
        loss.marginals = iter(marginals)
        loss.value().backward()  # type: ignore[no-untyped-call]
        wanted = (logits.detach().softmax(1) - torch.from_numpy(np.stack(marginals))) / 24
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, wanted, atol=2e-4, rtol=0)
        assert wanted.abs().max() > 4e-3

    def test_sure_logits_leave_it_finite(self) -> None:
        logits = torch.zeros(1, 3, 4, 6)
        logits[:, 1, :, 3:] = 200
        logits.requires_grad_()
        loss = BoundaryLoss(logits, torch.randn(1, 3, 28, 42), 6, FEW, map).value()
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_photos_are_the_images_reduced(self) -> None:
        photo = self.photo()
        images = torch.stack([normalise(picture) for picture in photo])
        assert np.array_equal(photos(images, (28, 42)), photo)
        means = photo.astype(float).reshape(2, 14, 2, 14, 3, 3).mean((2, 4))
        found = photos(images, (14, 14))
        assert found.dtype == np.uint8
        assert np.abs(found - means).max() < 0.51

    def test_padding_is_seen(self) -> None:
        images = padded_images()
        assert inside(images, SIZE)[[0, 2]].all()
        assert torch.equal(inside(images, SIZE)[1], (torch.arange(40) < 30).expand(SIZE))
        assert torch.equal(inside(images, (3, 4))[1], (torch.arange(4) < 3).expand(3, 4))
