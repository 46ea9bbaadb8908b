"""Scores of (query, training example) pairs, and the collectors that add them up in one training sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.bank import GradientBank
from wherefrom.store.artifacts import Artifact, Layout, check_layout, read_manifest
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.store.names import finished, found_result

Normalization = Literal["cosine", "relatif", "theta-relatif"]

# Before the name of a layer or group, in what is stored; its number follows, since safetensors sorts by name.
_LAYER = "layer:"

_SCORES: Layout = {"values": (None, ("query", "train"))}
_BESIDE_SCORES: Layout = {
    "query_errors": (None, ("query",)),
    "residuals": (None, ("query",)),
    "changes": (None, ("query", "rescored")),
    "self_influence": (None, ("train",)),
    "query_self_influence": (None, ("query",)),
    "preconditioned_norms": (None, ("train",)),
}
_EXTREMES: Layout = {
    "values": (None, ("query", "k")),
    "train": (torch.int64, ("query", "k")),
    "lowest_values": (None, ("query", "k")),
    "lowest_train": (torch.int64, ("query", "k")),
}


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
    `ekfac`, `shampoo`), removing example t of N raises the query's loss by about `values[q, t] / N`; `kfac` and
    `identity` have another scale, so compare scores of one strategy only.

    Attributes:
        values: [query, train] in dataset order; float32, or float64 for a float64 model. What was stored stays on
            disk, memory-mapped.
        fingerprint: what the scores were computed from.
        query_errors: with a `query_rank` or `query_bits`, what it has left out of each query's preconditioned gradient,
            as a part of its norm, [query]; otherwise None.
        layers: with `per_layer`, the part of each layer or group, by its name, as `values`, which is their sum.
        self_influence: with `self_influence=True`, g_t^T (H + damping)^-1 g_t of each training example, [train].
        query_self_influence: the same of each query, [query].
        preconditioned_norms: the norm of (H + damping)^-1 g_t of each training example, [train].
        changes: by how much re-scoring at full rank has changed each query's highest scores, [query, rescored], in
            the order that they had; None without it.
        residuals: with a `solver`, |g - (H + D) x| / |g| of each query's solve, [query]: 0 for a solution, 1 for no
            answer at all; above 0.1 it is said not to have converged. Of aggregated queries, the largest.
        name: what they are called in their run directory; empty for scores that are not stored.
    """

    values: Tensor
    fingerprint: Fingerprint
    query_errors: Tensor | None = None
    changes: Tensor | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    self_influence: Tensor | None = None
    query_self_influence: Tensor | None = None
    preconditioned_norms: Tensor | None = None
    residuals: Tensor | None = None
    name: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Read finished scores, without the model or the data.

        Args:
            folder: `RUN/scores/NAME`, or `RUN/scores/LABEL` where only one result has that label.

        Raises:
            InputError: there are no scores, or several of this label.
            DamagedError: the files are not what was written.
        """
        folder, tensors, fingerprint = _stored(Path(folder))
        if "lowest_train" in tensors:
            raise InputError(f"{folder} holds only the highest and lowest scores: read them with TopScores.load.")
        stored = sorted(name for name in tensors if name.startswith(_LAYER))
        parts: Layout = dict.fromkeys(stored, _SCORES["values"])
        check_layout(folder, tensors, _SCORES, {**_BESIDE_SCORES, **parts})
        layers = {name.split(":", 2)[2]: tensors.pop(name) for name in stored}
        return cls(fingerprint=fingerprint, layers=layers, name=folder.name, **tensors)

    @property
    def strategy(self) -> str:
        """The strategy of the factors behind the scores."""
        return self.fingerprint["strategy"]

    def top(self, k: int = 10) -> list[Hit]:
        """The k most influential training examples of each query, best first, query by query.

        Raises:
            InputError: k is less than 1, or training examples were added up.
        """
        if "aggregated training examples" in self.fingerprint:
            raise InputError(
                "These scores add up all training examples, so none is the top: leave aggregate_train out."
            )
        if k < 1:
            raise InputError(f"k={k}: expected at least 1.")
        best = self.values.topk(min(k, self.values.shape[1]), dim=1)
        return _hits(best.indices, best.values)

    def of_layers(self, name: str) -> Scores:
        """The part that one layer or group adds to every score; its norms are not known.

        Raises:
            InputError: there is no such part.
        """
        if name not in self.layers:
            known = ", ".join(self.layers) or "none; score with per_layer=True, or with groups of layers"
            raise InputError(f"name={name!r}: expected a layer or group whose part was kept: {known}.")
        return Scores(self.layers[name], {**self.fingerprint, "part": name})

    def normalized(self, kind: Normalization) -> Scores:
        """Scores divided by norms of gradients, in memory: they favour examples less whose gradient is large anyway.

        Args:
            kind: "cosine" divides g_q^T P g_t by sqrt(g_q^T P g_q) sqrt(g_t^T P g_t), with P the damped inverse
                curvature: between -1 and 1. "relatif" divides by sqrt(g_t^T P g_t) alone (l-RelatIF of Barshan et
                al. 2020), and "theta-relatif" by |P g_t| (their theta-RelatIF). A gradient of zero has a score of zero.

        Raises:
            InputError: the norms were not computed.
        """
        if self.self_influence is None or self.query_self_influence is None or self.preconditioned_norms is None:
            raise InputError(
                f"normalized({kind!r}) needs norms that these scores do not have: score with self_influence=True."
            )
        divisors = {
            "cosine": self.query_self_influence.sqrt().unsqueeze(1) * self.self_influence.sqrt(),
            "relatif": self.self_influence.sqrt(),
            "theta-relatif": self.preconditioned_norms,
        }
        if kind not in divisors:
            raise InputError(f"kind={kind!r}: expected one of {', '.join(divisors)}.")
        values = torch.where(divisors[kind] > 0, self.values / divisors[kind], 0.0)
        return replace(self, values=values, layers={}, fingerprint={**self.fingerprint, "normalized": kind}, name="")


def load_scores(folder: str | Path) -> Scores | TopScores:
    """Read finished scores of either kind, as `Scores.load` finds them."""
    kind = TopScores if "kept" in _stored(Path(folder))[2] else Scores
    return kind.load(folder)


def _stored(folder: Path) -> tuple[Path, dict[str, Tensor], Fingerprint]:
    """Where a finished result is, its memory-mapped tensors, and what it was computed from."""
    folder = found_result(folder)
    if not folder.exists():
        found = ", ".join(each.name for each in finished(folder.parent))
        raise InputError(f"{folder}: no scores there; found {found or 'none'}. Compute them first.")
    fingerprint = read_manifest(folder)["fingerprint"]
    return folder, Artifact(folder, fingerprint).mapped(), fingerprint


@dataclass(frozen=True)
class TopScores:
    """Each query's highest and lowest scores, where the whole matrix was never kept.

    Of equal scores, the one of the earlier training example comes first.

    Attributes:
        values, train: the highest scores, best first, and their training positions, [query, k].
        lowest_values, lowest_train: the lowest, lowest first.
        fingerprint: what they were computed from.
        query_errors, residuals, name: as in `Scores`.
    """

    values: Tensor
    train: Tensor
    lowest_values: Tensor
    lowest_train: Tensor
    fingerprint: Fingerprint
    query_errors: Tensor | None = None
    residuals: Tensor | None = None
    name: str = ""

    @classmethod
    def load(cls, folder: str | Path) -> TopScores:
        """Read finished top scores, as `Scores.load` does.

        Raises:
            InputError: there are none, several of this label, or they are of another kind.
            DamagedError: the files are not what was written.
        """
        folder, tensors, fingerprint = _stored(Path(folder))
        if "lowest_train" not in tensors:
            raise InputError(f"{folder} holds the scores of all pairs: read them with Scores.load.")
        beside = {name: _BESIDE_SCORES[name] for name in ("query_errors", "residuals")}
        check_layout(folder, tensors, _EXTREMES, beside)
        return cls(fingerprint=fingerprint, name=folder.name, **tensors)

    @property
    def strategy(self) -> str:
        """The strategy of the factors behind the scores."""
        return self.fingerprint["strategy"]

    def top(self, k: int = 10) -> list[Hit]:
        """The k most influential training examples of each query, best first, query by query.

        Raises:
            InputError: k is less than 1, or more than was kept.
        """
        if not 1 <= k <= self.values.shape[1]:
            raise InputError(f"k={k}: expected 1 to {self.values.shape[1]}, which were kept; score_top keeps more.")
        return _hits(self.train[:, :k], self.values[:, :k])


def _hits(train: Tensor, values: Tensor) -> list[Hit]:
    return [
        Hit(query, rank, position, score)
        for query, (row, scores) in enumerate(zip(train.tolist(), values.tolist(), strict=True))
        for rank, (position, score) in enumerate(zip(row, scores, strict=True), start=1)
    ]


def extremes(values: Tensor, train: Tensor, k: int) -> dict[str, Tensor]:
    """The fields of `TopScores`, of scores in any order.

    Args:
        values: [query, n].
        train: their training positions, int64 [query, n] or [n], ascending where scores are equal.
    """
    train = train.expand_as(values)
    found = {}
    for prefix, descending in (("", True), ("lowest_", False)):
        order = values.sort(dim=1, descending=descending, stable=True).indices[:, :k]
        found[f"{prefix}values"], found[f"{prefix}train"] = values.gather(1, order), train.gather(1, order)
    return found


def merged_extremes(parts: list[dict[str, Tensor]], k: int) -> dict[str, Tensor]:
    """Those of several runs of training examples, in ascending order, that make the whole."""
    names = ("values", "train", "lowest_values", "lowest_train")
    values, train, lowest_values, lowest_train = (torch.cat([part[name] for part in parts], 1) for name in names)
    highest, lowest = extremes(values, train, k), extremes(lowest_values, lowest_train, k)
    return {name: (lowest if name.startswith("lowest_") else highest)[name] for name in names}


class PairwiseCollector(Collector):
    """Adds up, layer by layer, the products of resident query gradients with each training gradient.

    Args:
        groups: of layers whose part is kept, by layer; empty keeps none.
        summed: add up over training examples too.

    Attributes:
        sums: `values` [queries, examples], or [queries, 1] when summed, and the like for each group.
    """

    def __init__(
        self,
        bank: GradientBank,
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Mapping[str, str] | None = None,
        summed: bool = False,
    ) -> None:
        self._bank, self._groups, self._summed = bank, groups or {}, summed
        kept = list(dict.fromkeys(self._groups.values()))
        self._parts = {group: f"{_LAYER}{number:06}:{group}" for number, group in enumerate(kept)}
        names = ["values", *self._parts.values()]
        shape = (len(bank), 1 if summed else examples)
        self.sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}

    def release(self) -> None:
        self._bank.release()

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        if self._summed:
            rows = slice(0, 1)
            # Gradients that hold different columns cannot be added up before the product.
            captured = captured.as_one_example() if captured.columns is None else captured
        products = self._bank.product(layer, captured)
        if self._summed:
            products = products.sum(1, keepdim=True)
        self._add("values", products, rows)
        if layer in self._groups:
            self._add(self._parts[self._groups[layer]], products, rows)

    def _add(self, name: str, products: Tensor, rows: slice) -> None:
        self.sums[name][:, rows] += products.to(self.sums[name].device)
