"""Eigenvectors of many covariances at once: those of one size in batches, and equal matrices once.

This module knows matrices and their names, nothing of layers, sweeps or what a basis is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wherefrom.errors import LossError
from wherefrom.memory import out_of_memory

# Matrices of one size that are decomposed together, in float64.
_EIGH_BYTES = 2**28


def eigenvectors(covariances: Mapping[str, Tensor], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors by name: those of one size in batches, and equal matrices once.

    Args:
        device: where they are found; they are kept where the covariances are.

    Raises:
        LossError: a covariance is not finite, or its eigenvectors are not found.
    """
    first: dict[tuple[int, float], str] = {}  # equal matrices have equal sums, and rarely do others
    same: dict[str, str] = {}
    sizes: dict[int, list[str]] = {}
    for name, matrix in covariances.items():
        total = finite_sum(matrix, name)
        other = first.setdefault((len(matrix), total), name)
        same[name] = other if torch.equal(covariances[other], matrix) else name
        if same[name] == name:
            sizes.setdefault(len(matrix), []).append(name)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for size, names in sizes.items():
        count = max(1, _EIGH_BYTES // (8 * size**2))
        for start in range(0, len(names), count):
            batch = names[start : start + count]
            found.update(_decomposed({name: covariances[name] for name in batch}, device))
    # Copies: tensors that share memory cannot be stored side by side.
    for name, other in same.items():
        if name != other:
            eigenvalues, vectors = found[other]
            found[name] = eigenvalues.clone(), vectors.clone()
    return found


def finite_sum(matrix: Tensor, name: str) -> float:
    """The sum of a covariance `LAYER.SIDE`.

    Raises:
        LossError: it is not finite.
    """
    total = float(matrix.sum(dtype=_eigh_dtype(matrix.device)))
    if not math.isfinite(total):
        raise LossError(
            f"Layer {name.rpartition('.')[0]!r}: its covariance is not finite. Some activation or gradient overflowed; "
            "load the model in float32 or bfloat16 rather than float16."
        )
    return total


def _eigh_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _decomposed(matrices: Mapping[str, Tensor], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of matrices of one size; one by one where together they are not found."""
    try:
        return dict(zip(matrices, zip(*_eigh(list(matrices.values()), device), strict=True), strict=True))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        if len(matrices) == 1:
            name, matrix = next(iter(matrices.items()))
            layer, _, side = name.rpartition(".")
            raise LossError(
                f"Layer {layer!r}: the eigenvectors of its covariance of {side} {list(matrix.shape)} were not found, "
                f"though it is finite (its numbers reach {float(matrix.abs().max()):.3g}). Load the model in float64, "
                "leave the layer out with `layers=[...]`, or use the strategy 'diagonal'."
            ) from error
    return {
        name: pair for name, matrix in matrices.items() for name, pair in _decomposed({name: matrix}, device).items()
    }


def _eigh(matrices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenvalues [count, n] and eigenvectors [count, n, n] of symmetric matrices of one size."""
    place, dtype = matrices[0].device, matrices[0].dtype
    stacked = torch.stack([each.to(device, _eigh_dtype(device)) for each in matrices])
    eigenvalues, vectors = torch.linalg.eigh(stacked)
    # A covariance has no negative eigenvalue; what is below zero is rounding.
    return eigenvalues.clamp_min(0).to(place, dtype), vectors.to(place, dtype)
