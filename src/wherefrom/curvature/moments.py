"""Sums of outer products and of squares, without their lower triangles and without columns that nobody touches.

This module knows tensors, nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wherefrom.runtime.precision import product, widened_dtype


def add_columns(total: Tensor, numbers: Tensor, columns: Tensor) -> None:
    """Add numbers [batch, ..., columns] to the columns of `total` [..., width] that they are of.

    Args:
        columns: int64 [batch, columns].
    """
    added = numbers.movedim(0, -2).flatten(-2).to(total.device, total.dtype)  # [..., batch * columns]
    total.index_add_(-1, columns.flatten().to(total.device), added)


# Where a norm reads numbers once; a CPU takes ten times as long for one as for squaring and adding up.
_NORM_DEVICES = frozenset({"cuda"})


def sum_of_squares(numbers: Tensor, dimension: int, *, overwrite: bool = False) -> Tensor:
    """The sum of squares along a dimension, in float32 or wider.

    A norm squared where that is quicker: no square is written to memory, and those of bfloat16 numbers are not rounded.

    Args:
        overwrite: whether the numbers may be replaced by their squares.
    """
    dtype = widened_dtype(numbers.dtype)
    if numbers.device.type in _NORM_DEVICES:
        norm: Tensor = torch.linalg.vector_norm(numbers, dim=dimension, dtype=dtype)
        return norm.square_()
    return (numbers.square_() if overwrite else numbers.square()).sum(dimension, dtype=dtype)


def second_moment(vectors: Tensor, diagonal: bool) -> Tensor:
    """The sum of v v^T over [batch, tokens, size], without its lower triangle; or its diagonal alone."""
    rows = vectors.flatten(0, 1)
    return sum_of_squares(rows, 0) if diagonal else upper_product(rows)


# Narrower tiles waste fewer products below the diagonal, wider ones multiply faster.
_TILE = {"cpu": 256, "cuda": 1024}


def upper_product(rows: Tensor) -> Tensor:
    """rows^T rows of [n, size], with zeros below the tiles on the diagonal: little more than half of the products."""
    size, tile = rows.shape[1], _TILE.get(rows.device.type, 1024)
    result = rows.new_zeros(size, size, dtype=widened_dtype(rows.dtype))
    for start in range(0, size, tile):
        result[start : start + tile, start:] = product(rows[:, start : start + tile].T, rows[:, start:])
    return result
