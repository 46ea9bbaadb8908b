"""Matrices as 8-bit integers, with a scale for each row: a quarter of float32's memory, or half of bfloat16's.

This module is tensor algebra; it does not know what the matrices are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wherefrom.runtime.precision import widened_dtype

_LARGEST = 127


def quantized(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to whole multiples of a 127th of its largest magnitude.

    Args:
        matrices: [..., rows, columns].

    Returns:
        int8 [..., rows, columns], and scales [..., rows] in float32 or wider. No product of the two differs by more
        than half a scale from what it stands for. Of a row that is not finite, neither is the scale.
    """
    scales = matrices.abs().amax(-1).to(widened_dtype(matrices.dtype)) / _LARGEST
    multiples = matrices / scales.where(scales > 0, 1).unsqueeze(-1)
    return multiples.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantized(values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """The matrices [..., rows, columns] that `quantized` was given, up to its rounding, in the type of `out`."""
    return torch.mul(values, scales.unsqueeze(-1), out=out)
