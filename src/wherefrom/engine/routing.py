"""Which of a batch's vectors each expert of a mixture gets, and how an expert's are laid out by example.

This module knows indices; it does not know what chooses experts, or what is made of their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where an expert's vectors go in [examples, width, ...], an example's one after the other, then zeros.

    Attributes:
        indices: int64 [vectors]: in [examples * width], and past the end for vectors of padding.
        width: the most vectors of any example, without those of padding; 0 if all are.
        real: how many vectors are not of padding.
        positions: int64 [vectors]: which token of its example each vector is.
        length: how many tokens an example has, with padding.
    """

    indices: Tensor
    examples: int
    width: int
    real: int
    positions: Tensor
    length: int

    def pack(self, vectors: Tensor) -> Tensor:
        """[vectors, ...] to [examples, width, ...]."""
        packed = vectors.new_zeros(self.examples * self.width + 1, *vectors.shape[1:])
        packed.index_copy_(0, self.indices, vectors)
        return packed[:-1].view(self.examples, self.width, *vectors.shape[1:])


class Routing:
    """Which vectors each expert gets in one call.

    Args:
        tokens: int64 [vectors]: which of the batch's tokens [examples * length] they are: one expert's in ascending
            order, then the next one's.
        sizes: how many each expert gets.
        total: how many tokens the batch has, with padding.
    """

    def __init__(self, tokens: Tensor, sizes: Sequence[int], total: int) -> None:
        self.tokens, self.sizes, self.total = tokens, list(sizes), total
        self._packings: list[Packing] = []

    def packing(self, expert: int, examples: int, mask: Tensor | None) -> Packing:
        """How the vectors of one expert are laid out.

        Args:
            examples: of the batch; their tokens stand one after the other.
            mask: which tokens are real, boolean [examples, length, 1]; None when all are. The same in every call.
        """
        self._packings = self._packings or self._packed(examples, mask)
        return self._packings[expert]

    def _packed(self, examples: int, mask: Tensor | None) -> list[Packing]:
        """Those of all experts together, for which the host waits once."""
        length, device = self.total // examples, self.tokens.device
        sizes = torch.tensor(self.sizes, device=device)
        experts = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=len(self.tokens))
        example, positions = self.tokens // length, self.tokens % length
        real = torch.ones_like(example, dtype=torch.bool) if mask is None else mask.flatten()[self.tokens]
        pairs, ones = experts * examples + example, real.long()
        counts = ones.new_zeros(len(sizes) * examples).index_add_(0, pairs, ones)
        ranks = ones.cumsum(0) - ones - (counts.cumsum(0) - counts)[pairs]  # among an example's vectors of an expert
        table = counts.unflatten(0, (-1, examples))
        widths = table.amax(1)
        if self.tokens.is_meta:  # nobody knows; as many of each example
            found = [[-(-size // examples) for size in self.sizes], self.sizes]
        else:
            found = torch.stack([widths, table.sum(1)]).tolist()
        ends = widths[experts]
        indices = torch.where(real, example * ends + ranks, examples * ends)
        parts = (each.split(self.sizes) for each in (indices, positions))
        return [
            Packing(indices, examples, width, count, positions, length)
            for indices, positions, width, count in zip(*parts, *found, strict=True)
        ]
