"""Attention in rows of queries, against the formula."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.methods import attention
from pipeline.methods.attention import RowAttention, attend
from tests.method_contract import Array


def sides(samples: int, heads: int, places: int, width: int, kind: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, and what comes back to the output, as a linear layer lays them out."""
    generator = torch.Generator().manual_seed(3)
    shape = (samples, places, heads, width)
    return [torch.randn(shape, generator=generator).to(kind).transpose(1, 2) for _ in range(4)]


def formula(queries: Array, keys: Array, values: Array, grad: Array) -> list[Array]:
    """One head's output, and the gradients of queries, keys and values."""
    scores = queries @ keys.T / np.sqrt(queries.shape[1])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    to_weights = grad @ values.T
    to_scores = weights * (to_weights - (weights * to_weights).sum(1, keepdims=True)) / np.sqrt(queries.shape[1])
    return [weights @ values, to_scores @ keys, to_scores.T @ queries, weights.T @ grad]


@pytest.mark.parametrize("places", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_rows_give_what_the_whole_gives(places: int, kind: torch.dtype, tolerance: float) -> None:
    """And ``attend`` does, whichever way it goes; tolerances are of the greatest value."""
    given = sides(2, 2, places, 8, kind)
    leaves = [side.requires_grad_() for side in given[:3]]
    for compute in (RowAttention.apply, attend):
        out = compute(*leaves)  # type: ignore[no-untyped-call]
        found = [out.detach(), *torch.autograd.grad(out, leaves, given[3])]
        assert {each.dtype for each in found} == {kind}
        for sample, head in np.ndindex(2, 2):
            expected = formula(*(side[sample, head].detach().double().numpy() for side in given))
            for each, right in zip(found, expected, strict=True):
                difference = np.abs(each[sample, head].double().numpy() - right).max()
                assert difference <= tolerance * (np.abs(right).max() or 1)


def test_gradients_are_those_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", 3)
    leaves = [side.requires_grad_() for side in sides(2, 2, 7, 4, torch.float64)[:3]]
    assert torch.autograd.gradcheck(RowAttention.apply, leaves)


def test_large_scores_stay_finite() -> None:
    """The nearest key takes all, where exp() of a score would be infinite."""
    queries = torch.eye(4, dtype=torch.bfloat16)[None, None] * 1000
    values = torch.arange(16, dtype=torch.bfloat16).view(1, 1, 4, 4)
    assert torch.equal(attend(queries, queries, values), values)


@pytest.mark.parametrize(
    ("kind", "expected"), [(torch.bfloat16, [(2, 5), (2, 5), (1, 5)]), (torch.float32, []), (torch.float64, [])]
)
def test_bfloat16_alone_goes_by_rows(
    kind: torch.dtype, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are held, forward and once more backward: never all 25."""
    monkeypatch.setattr(attention, "ROWS", 2)
    held, weigh = [], attention._weights
    monkeypatch.setattr(attention, "_weights", lambda *given: held.append(tuple(weigh(*given).shape)) or weigh(*given))
    leaves = [side.requires_grad_() for side in sides(1, 1, 5, 4, kind)[:3]]
    out = attend(*leaves)
    assert held == expected
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert held == 2 * expected
