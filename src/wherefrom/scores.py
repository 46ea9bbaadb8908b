"""Scores of every (query, training example) pair, and the collector that adds them up in one training sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wherefrom.capture import Captured
from wherefrom.errors import InputError
from wherefrom.fingerprint import Fingerprint
from wherefrom.gradients import GradientBank
from wherefrom.store import Artifact, read_manifest
from wherefrom.sweep import Collector


class Hit(NamedTuple):
    """One training example behind a query; rank 1 is the most influential."""

    query: int
    rank: int
    train: int
    score: float


@dataclass(frozen=True)
class Scores:
    """How much training on each example lowers each query's measured loss.

    `values[q, t]` is the query's gradient, times the damped inverse curvature, times the training example's gradient:
    `g_q^T (H + damping)^-1 g_t` (Koh & Liang 2017, equation 2, with the sign turned). Positive: training on the example
    lowers the query's loss. Both losses are sums over tokens. Where the curvature is a mean over examples (`diagonal`,
    `ekfac`), removing example t of N raises the query's loss by about `values[q, t] / N`; `kfac` and `identity` have
    another scale, so compare scores of one strategy only.

    Attributes:
        values: [query, train] in dataset order; float32, or float64 for a float64 model. What was stored stays on
            disk, memory-mapped.
        fingerprint: what the scores were computed from.
        query_errors: with a `query_rank`, what it has left out of each query's preconditioned gradient, as a part of
            its norm, [query]; otherwise None.
        changes: by how much re-scoring at full rank has changed each query's highest scores, [query, rescored], in
            the order that they had; None without it.
    """

    values: Tensor
    fingerprint: Fingerprint
    query_errors: Tensor | None = None
    changes: Tensor | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Read finished scores, `RUN/scores/NAME`, without the model or the data.

        Raises:
            InputError: there are no scores.
            DamagedError: the files are not what was written.
        """
        folder = Path(folder)
        if not folder.exists():
            found = sorted(path.parent.name for path in folder.parent.glob("*/manifest.json"))
            raise InputError(f"{folder}: no scores there; found {', '.join(found) or 'none'}. Compute them first.")
        fingerprint = read_manifest(folder)["fingerprint"]
        tensors = Artifact(folder, fingerprint).mapped()
        return cls(tensors["values"], fingerprint, tensors.get("query_errors"), tensors.get("changes"))

    @property
    def strategy(self) -> str:
        """The strategy of the factors behind the scores."""
        return self.fingerprint["strategy"]

    def top(self, k: int = 10) -> list[Hit]:
        """The k most influential training examples of each query, best first, query by query.

        Raises:
            InputError: k is less than 1.
        """
        if k < 1:
            raise InputError(f"k={k}: expected at least 1.")
        best = self.values.topk(min(k, self.values.shape[1]), dim=1)
        return [
            Hit(query, rank, train, score)
            for query, (row, scores) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            for rank, (train, score) in enumerate(zip(row, scores, strict=True), start=1)
        ]


class PairwiseCollector(Collector):
    """Adds up, layer by layer, the products of resident query gradients with each training gradient."""

    def __init__(self, bank: GradientBank, examples: int, dtype: torch.dtype, device: torch.device) -> None:
        self._bank = bank
        self.sums = {"values": torch.zeros(len(bank), examples, dtype=dtype, device=device)}

    def release(self) -> None:
        self._bank.release()

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        self.sums["values"][:, rows] += self._bank.product(layer, captured)
