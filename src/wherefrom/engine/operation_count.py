"""Floating-point operations of a pass: PyTorch's own counter, with fused attention of grouped heads as well.

Up to version 2.11, PyTorch's formulas for fused attention refuse keys and values with fewer heads than queries, which
most language models of today have. This module knows PyTorch's kernels, nothing of models or sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def operation_counter() -> FlopCounterMode:
    """A context that counts what runs in it; `get_total_flops()` says how much that was.

    A multiplication and an addition are two operations, and only products of matrices, convolutions and fused attention
    count.
    """
    return FlopCounterMode(display=False, custom_mapping=_FUSED_ATTENTION)


def _forward(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    """Scores of every query for every key, and sums of values; a causal mask saves nothing here."""
    return _products(query, key) * (query[-1] + value[-1])


def _backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    """The scores again, and the gradients of scores, values, queries and keys."""
    return _products(query, key) * (3 * query[-1] + 2 * value[-1])


def _products(query: Shape, key: Shape) -> int:
    """Operations for each feature: [batch, heads, tokens, features]; each head of the keys serves several queries'."""
    batch, heads, queries, _ = query
    return 2 * batch * heads * queries * key[-2]


_aten = torch.ops.aten
_FUSED_ATTENTION: dict[object, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention: _forward,
    _aten._scaled_dot_product_efficient_attention: _forward,
    _aten._scaled_dot_product_cudnn_attention: _forward,
    _aten._scaled_dot_product_flash_attention_backward: _backward,
    _aten._scaled_dot_product_efficient_attention_backward: _backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _backward,
}
