"""Scores of a segment of training: query gradients at its end, carried back through what comes after it.

This module brings banks, preconditioners and checkpoints together; it does not know where curvature comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wherefrom.curvature.operators import Preconditioner, aligned
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.scoring import Scoring
from wherefrom.store.weights import load_weights
from wherefrom.tasks.task import Batch

# Query gradients that are filtered at a time.
_QUERIES = 16


@dataclass(frozen=True, kw_only=True)
class SegmentScoring(Scoring[Batch]):
    """Scores of query gradients at one checkpoint with training gradients at another.

    Attributes:
        later: S of later segments, which query gradients are multiplied with from the left, the last one first.
        response: what they are multiplied with then.
        last: the checkpoint of which query gradients are.
        here: that of training gradients, whose weights the model has but for those.
    """

    later: Sequence[Preconditioner]
    response: Preconditioner
    last: Path
    here: Path

    def bank(self, rows: range) -> GradientBank:
        load_weights(self.sweep.model, self.last)
        bank = super().bank(rows)
        for each in self.later:
            # From the left, S is its transpose: P^(-1/2) exp(-eta K H') P^(1/2).
            self._multiply(bank, each, {name: roots.reciprocal() for name, roots in each.roots.items()})
        self._multiply(bank, self.response, self.response.roots)
        load_weights(self.sweep.model, self.here)
        return bank

    def _multiply(self, bank: GradientBank, preconditioner: Preconditioner, outside: Mapping[str, Tensor]) -> None:
        """Multiply gradients [queries, out, width] with a filter between P^(1/2) and what is outside, where they lie.

        Args:
            outside: [out, in] of conditioned layers.
        """
        layers, device = self.sweep.layers, self.sweep.device
        sides, filters = preconditioner.sides(layers), preconditioner.aligned_filters(layers)
        for name, layer in layers.items():
            kept, columns = bank.sums[name], bank.sums.get(f"{name}.columns")
            left, right, roots = sides[name].on(device)
            scale = aligned(layer, outside[name]).to(device) if name in outside else None
            chosen = filters[name].to(device)  # [out, width]
            for start in range(0, len(kept), _QUERIES):
                rows = slice(start, start + _QUERIES)
                places = None if columns is None else columns[rows].to(device)
                gradients = kept[rows].to(device)
                gradients = gradients if roots is None else gradients * _held(roots, places)
                gradients = gradients if left is None else left.T @ gradients
                gradients = gradients if right is None else gradients @ right
                gradients = gradients * _held(chosen, places)
                gradients = gradients if left is None else left @ gradients
                gradients = gradients if right is None else gradients @ right.T
                gradients = gradients if scale is None else gradients * _held(scale, places)
                kept[rows] = gradients.to(kept.device)


def _held(matrix: Tensor, columns: Tensor | None) -> Tensor:
    """A matrix [out, width], or its columns [queries, columns] for each query: [queries, out, columns]."""
    return matrix if columns is None else matrix[:, columns].transpose(0, 1)
