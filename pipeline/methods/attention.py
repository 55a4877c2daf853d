"""Softmax attention that never stores the T x T weights."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 512  # queries per block; their bf16 weights take 4 MB at T = 4,232


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V; inputs and output are N x heads x T x d.

    Uses torch's fused kernel except for bfloat16 on a CPU. There the kernel multiplies at float32 speed, a quarter of
    oneDNN's bfloat16 speed, and processing blocks of queries halves the time.
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return cast(Tensor, RowAttention.apply(queries, keys, values))  # type: ignore[no-untyped-call]
    return functional.scaled_dot_product_attention(queries, keys, values)


class RowAttention(torch.autograd.Function):
    """Attention for ``ROWS`` queries of one head at a time; backward recomputes the weights."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        queries, out = _scaled(queries), torch.empty_like(queries)
        for head in _heads(queries):
            for query, result in _rows(head, queries, out):
                torch.mm(_weights(query, keys[head]), values[head], out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = ctx.saved_tensors
        queries = _scaled(queries)
        to_queries, to_keys, to_values = (torch.empty_like(side) for side in ctx.saved_tensors)
        wide = torch.promote_types(queries.dtype, torch.float32)  # dtype of sums over blocks
        for head in _heads(queries):
            key, value = keys[head], values[head]
            key_sum, value_sum = (torch.zeros_like(side, dtype=wide) for side in (key, value))
            for query, to_output, to_query in _rows(head, queries, grad, to_queries):
                weights = _weights(query, key)
                scores = torch._softmax_backward_data(to_output @ value.t(), weights, 1, weights.dtype)
                torch.mm(scores, key, out=to_query)
                key_sum += scores.t() @ query
                value_sum += weights.t() @ to_output
            to_keys[head], to_values[head] = key_sum, value_sum
        return _scaled(to_queries), to_keys, to_values


def _heads(side: Tensor) -> list[tuple[int, int]]:
    return [(sample, head) for sample in range(side.shape[0]) for head in range(side.shape[1])]


def _rows(head: tuple[int, int], *sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of ``ROWS`` rows of one head, of all ``sides`` together."""
    return zip(*(torch.split(side[head], ROWS) for side in sides), strict=True)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention weights, rows x T, of scaled queries (rows x d) and keys (T x d); each row sums to 1."""
    return (query @ key.t()).softmax(1)


def _scaled(side: Tensor) -> Tensor:
    return side * side.shape[3] ** -0.5
