"""Matrices as products of two thin ones: how they are found, and what products with them cost.

This module is tensor algebra; it does not know what the matrices are.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Directions beyond the rank in a randomised decomposition, and its power iterations (Halko et al. 2011, section 4.5).
_OVERSAMPLING, _ITERATIONS = 8, 2


def thin_product_flop(shape: tuple[int, int], rank: int, tokens: int, batch: int) -> tuple[float, float]:
    """Operations for a product of thin matrices with one training gradient: by tokens, and rebuilt once a batch."""
    outputs, width = shape
    return 2.0 * tokens * (outputs + width) * rank, 2.0 * outputs * width * (1 + rank / batch)


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Thin factors of [batch, n, m]: left [batch, n, rank], orthonormal, and right [batch, rank, m].

    A randomised singular value decomposition (Halko, Martinsson & Tropp 2011), from the same random directions for
    every matrix, so that the result does not depend on the batch.
    """
    directions = min(rank + _OVERSAMPLING, *matrices.shape[1:])
    devices = [matrices.device] if matrices.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrices, directions, _ITERATIONS)
    return left[..., :rank], (right * values.unsqueeze(1))[..., :rank].transpose(1, 2)
