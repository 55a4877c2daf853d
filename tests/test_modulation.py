"""The attention modulation module: its weights by hand, what cannot make it infinite, and its gradients."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.methods.amr import Amr
from pipeline.methods.modulation import SpatialModulation, _Pool, attention_modulation, modulate


class TestModulation:
    """AMR Eq. 7 and 8: of 0, 1, 2, 3, 4 the mean is 2 and the biased variance 2."""

    values = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    bell = (math.exp(-1), math.exp(-0.25), 1.0, math.exp(-0.25), math.exp(-1))

    def test_gaussian_by_hand(self) -> None:
        assert modulate(self.values)[0].tolist() == pytest.approx([v / sum(self.bell) * 5 for v in self.bell], rel=1e-5)

    def test_density_by_hand(self) -> None:
        """exp(-(x - mu)^2 / (2 sigma^2)) / (sqrt(2 pi) sigma), as in the public code."""
        expected = [v / math.sqrt(2 * math.pi * 2) for v in self.bell]
        assert modulate(self.values, "density")[0].tolist() == pytest.approx(expected, rel=1e-5)

    def test_threshold_by_hand(self) -> None:
        values = torch.tensor([[0.0, 1.0, 2.0, 7.0]])  # mean 2.5
        assert modulate(values, "threshold")[0].tolist() == [0, 0, 0, 1]

    def test_the_batch_is_one_tensor_where_it_is_asked_for(self) -> None:
        values = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 2.0]])
        row = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 2.0]])
        for function in ("gaussian", "density", "threshold"):
            found = modulate(values, function, "batch").flatten()
            torch.testing.assert_close(found, modulate(row, function)[0])
            assert not torch.allclose(found, modulate(values, function).flatten())

    def test_mean_and_deviation_are_constants_for_the_gradient(self) -> None:
        """d/dx exp(-z^2 / 2) / m = -z / sigma * weight, and nothing from the other values."""
        values = self.values.clone().requires_grad_()
        weights = modulate(values)
        (gradient,) = torch.autograd.grad(weights[0, 3], values)
        expected = -1 / 2 * float(weights[0, 3].detach())  # z / sigma = (3 - 2) / 2
        assert gradient[0].tolist() == pytest.approx([0, 0, 0, expected, 0], rel=1e-4)

    def test_a_threshold_learns_by_the_logistic_function(self) -> None:
        values = self.values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(modulate(values, "threshold")[0, 3], values)
        share = 1 / (1 + math.exp(-1 / math.sqrt(2)))
        assert gradient[0].tolist() == pytest.approx([0, 0, 0, share * (1 - share) / math.sqrt(2), 0], rel=1e-4)

    @pytest.mark.parametrize("function", ["gaussian", "density", "threshold"])
    @pytest.mark.parametrize(
        "values",
        [
            torch.zeros(1, 4),
            torch.full((2, 3, 5), 7.3),
            torch.full((1, 1), -2.0),
            torch.full((3, 1, 2, 2), 1e30),
            torch.tensor([[1e-40, 2e-40, -1e-40]]),
            torch.tensor([[0.0] * 10_000 + [1e4]]),
            torch.full((2, 6), 0.1, dtype=torch.bfloat16),
        ],
        ids=["zeros", "equal", "one", "huge", "denormal", "outlier", "bf16"],
    )
    def test_nothing_makes_it_infinite(self, values: Tensor, function: str) -> None:
        for statistics in ("sample", "batch"):
            leaf = values.clone().requires_grad_()
            weights = modulate(leaf, function, statistics)
            assert weights.dtype == torch.float32
            assert weights.isfinite().all()
            weights.sum().backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()

    def test_equal_values_are_left_as_they_are(self) -> None:
        for values in (torch.zeros(2, 5), torch.full((2, 5), 0.3), torch.full((2, 1), -4.0)):
            assert modulate(values).tolist() == torch.ones_like(values).tolist()
            assert modulate(values, "threshold").tolist() == torch.ones_like(values).tolist()

    def test_gaussian_weights_are_bounded_and_average_one(self) -> None:
        """Chebyshev: half of all values lie within sqrt(2) deviations, so that no weight is above 2 e."""
        random = torch.Generator().manual_seed(0)
        for power in (0.5, 1, 3, 9):
            values = torch.randn(8, 400, generator=random).sign() * torch.rand(8, 400, generator=random) ** power
            weights = modulate(values)
            torch.testing.assert_close(weights.mean(1), torch.ones(8))
            assert weights.max() <= 2 * math.e
        two = torch.tensor([[0.0] * 50 + [1.0] + [2.0] * 50])
        assert modulate(two).max() > 1.6

    def test_no_weight_is_a_denormal_number(self) -> None:
        values = torch.cat([torch.randn(1, 40_000), torch.tensor([[1e4]])], 1)
        for function in ("gaussian", "density"):
            assert modulate(values, function).min() ** 2 > torch.finfo(torch.float32).tiny


class TestModules:
    def test_pooling_has_the_gradients_of_its_parts(self) -> None:
        """The features pass, too; of equal maxima one gets the gradient."""
        torch.manual_seed(0)
        x = torch.randn(2, 5, 3, 4, dtype=torch.double).relu().requires_grad_()
        to_features, to_pooled = torch.randn(2, 5, 3, 4, dtype=torch.double), torch.randn(2, 2, 3, 4).double()

        def weighed(features: Tensor, pooled: Tensor) -> Tensor:
            return (features * to_features).sum() + (pooled * to_pooled).sum()

        pooled = torch.stack([x.max(1).values, x.mean(1)], 1)
        features, found = _Pool.apply(x)  # type: ignore[no-untyped-call]
        assert torch.equal(features, x)
        torch.testing.assert_close(found, pooled)
        (expected,) = torch.autograd.grad(weighed(x, pooled), x)
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.detach().contiguous(memory_format=layout).requires_grad_()
            (gradient,) = torch.autograd.grad(weighed(*_Pool.apply(leaf)), leaf)  # type: ignore[no-untyped-call]
            torch.testing.assert_close(gradient, expected)

    def test_pooling_has_its_numeric_gradients(self) -> None:
        x = torch.randn(2, 3, 4, 2, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(_Pool.apply, (x,))

    def test_the_batch_norm_follows_train_and_eval(self) -> None:
        torch.manual_seed(0)
        spatial = SpatialModulation(Amr.Settings())
        norm = cast(nn.BatchNorm2d, spatial.sensitivity[1])
        assert norm.momentum == 0.01
        assert spatial.sensitivity[0].bias is None
        x = torch.rand(3, 4, 8, 8)
        before = norm.running_mean.clone()
        spatial.eval()(x)
        assert torch.equal(norm.running_mean, before)
        spatial.train()(x)
        assert not torch.equal(norm.running_mean, before)

    def test_parts_can_be_left_out(self) -> None:
        sizes = {parts: len(attention_modulation(8, Amr.Settings(*parts))) for parts in np.ndindex(2, 2)}
        assert sizes == {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}

    @pytest.mark.parametrize(("channels", "reduction", "middle"), [(64, 16, 4), (64, 4, 16), (8, 16, 1)])
    def test_reduction(self, channels: int, reduction: int, middle: int) -> None:
        modules = attention_modulation(channels, Amr.Settings(reduction=reduction)).modules()
        shapes = [tuple(module.weight.shape) for module in modules if isinstance(module, nn.Linear)]
        assert shapes == [(middle, channels), (channels, middle)]
