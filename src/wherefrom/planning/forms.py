"""Forms of resident query gradients: whole, as pairs of matrices of low rank, or as 8-bit integers with scales.

This module is tensor algebra and arithmetic on sizes; it does not know what the matrices are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.runtime.precision import widened_dtype


@dataclass(frozen=True)
class BankForm:
    """How query gradients are resident.

    Attributes:
        dtype: of their numbers, or of products with those that are integers.
        device: that they lie on.
        offloaded: whether that is another than the model's, which they are moved to piece by piece for every batch.
        rank: of the two matrices of low rank; None leaves gradients whole, as do layers in which that takes less.
        tokens: how many vectors the longest query has in a one-hot layer, of which it touches as many columns at most;
            a bank grows when there are more.
        rotated_back: for each layer, whether the preconditioned gradient is brought back from the eigenbasis of
            its gradient and of its activation factor; otherwise each training gradient is brought there.
        bits: 8 makes whole gradients integers of that size, with a scale for each row of each query's, but for
            one-hot layers; None leaves numbers of `dtype`.
    """

    dtype: torch.dtype
    device: torch.device
    offloaded: bool = False
    rank: int | None = None
    tokens: int = 0
    rotated_back: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    bits: int | None = None

    @property
    def approximate(self) -> bool:
        """Whether something is left out of gradients besides the rounding of `dtype`."""
        return self.rank is not None or self.bits is not None

    def quantized(self, layer: TrackedLayer) -> bool:
        """Whether a layer's gradients are integers."""
        return self.bits is not None and not layer.one_hot and not self.low_rank(layer)

    def low_rank(self, layer: TrackedLayer) -> bool:
        """Whether a layer's gradients are two matrices of low rank."""
        outputs, width = layer.padded_shape
        return not layer.one_hot and self.rank is not None and self.rank * (outputs + width) < outputs * width

    def bytes_per_query(self, layers: Mapping[str, TrackedLayer]) -> int:
        """What one query takes."""
        return sum(self._layer_bytes(layer) for layer in layers.values())

    def _layer_bytes(self, layer: TrackedLayer) -> int:
        outputs, width = layer.padded_shape
        if self.rank is not None and self.low_rank(layer):
            return self.rank * (outputs + width) * self.dtype.itemsize
        if self.quantized(layer):
            return outputs * (width * torch.int8.itemsize + widened_dtype(self.dtype).itemsize)
        columns = layer.one_hot * self.tokens * torch.int64.itemsize
        return outputs * layer.columns(self.tokens) * self.dtype.itemsize + columns


# Directions beyond the rank in a randomised decomposition, and its power iterations (Halko et al. 2011, section 4.5).
_OVERSAMPLING, _ITERATIONS = 8, 2


def low_rank_product_flop(shape: tuple[int, int], rank: int, tokens: int, batch: int) -> tuple[float, float]:
    """Operations for a product of low-rank matrices with one training gradient: by tokens, and rebuilt once a batch."""
    outputs, width = shape
    return 2.0 * tokens * (outputs + width) * rank, 2.0 * outputs * width * (1 + rank / batch)


def truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Low-rank factors of [batch, n, m]: left [batch, n, rank], orthonormal, and right [batch, rank, m].

    A randomised singular value decomposition (Halko, Martinsson & Tropp 2011), from the same random directions for
    every matrix, so that the result does not depend on the batch.
    """
    directions = min(rank + _OVERSAMPLING, *matrices.shape[1:])
    devices = [matrices.device] if matrices.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrices, directions, _ITERATIONS)
    return left[..., :rank], (right * values.unsqueeze(1))[..., :rank].transpose(1, 2)


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


# What is moved to the device, widened or rebuilt from low-rank ones at a time.
PIECE_BYTES = 2**28
