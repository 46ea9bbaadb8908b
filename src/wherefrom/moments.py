"""Sums of outer products and of squares, without their lower triangles and without columns that nobody touches.

This module knows tensors, nothing of layers.
"""

from __future__ import annotations

from torch import Tensor

from wherefrom.precision import product, widened_dtype


def add_columns(total: Tensor, numbers: Tensor, columns: Tensor) -> None:
    """Add numbers [batch, ..., columns] to the columns of `total` [..., width] that they are of.

    Args:
        columns: int64 [batch, columns].
    """
    added = numbers.movedim(0, -2).flatten(-2).to(total.device, total.dtype)  # [..., batch * columns]
    total.index_add_(-1, columns.flatten().to(total.device), added)


def second_moment(vectors: Tensor, diagonal: bool) -> Tensor:
    """The sum of v v^T over [batch, tokens, size], without its lower triangle; or its diagonal alone."""
    rows = vectors.flatten(0, 1)
    return rows.square().sum(0, dtype=widened_dtype(rows.dtype)) if diagonal else upper_product(rows)


# Narrower tiles waste fewer products below the diagonal, wider ones multiply faster.
_TILE = {"cpu": 256, "cuda": 1024}


def upper_product(rows: Tensor) -> Tensor:
    """rows^T rows of [n, size], with zeros below the tiles on the diagonal: little more than half of the products."""
    size, tile = rows.shape[1], _TILE.get(rows.device.type, 1024)
    result = rows.new_zeros(size, size, dtype=widened_dtype(rows.dtype))
    for start in range(0, size, tile):
        result[start : start + tile, start:] = product(rows[:, start : start + tile].T, rows[:, start:])
    return result
