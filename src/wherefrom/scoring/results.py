"""Results: scores of all pairs or the highest alone, what they are about, and how they leave as files and tables.

This module knows what a stored result holds; it does not know how it is computed or shown.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from wherefrom.runtime.errors import DamagedError, InputError, check_argument, require
from wherefrom.store.artifacts import Artifact, Layout, check_layout, read_manifest
from wherefrom.store.files import write_bytes, write_tensors
from wherefrom.store.fingerprint import UNIT, Dataset, Fingerprint
from wherefrom.store.names import finished, found_result

if TYPE_CHECKING:
    import pandas

Normalization = Literal["cosine", "relatif", "theta-relatif"]

# Entries of a fingerprint that say what of the scores is stored, and what beside them; their values depend on none.
LAYER_PARTS, WITH_SELF_INFLUENCE, ONLY_EXTREMES, OF_TOKENS = "layers' parts", "self-influence", "extremes", "tokens"

RISE = "rise_per_score"  # a tensor that is stored beside scores

SCORES: Layout = {"values": (None, ("query", "train"))}
# What may stand beside them. The first axis of a vector says what each of its numbers belongs to.
BESIDE_SCORES: Layout = {
    "query_errors": (None, ("query",)),
    "residuals": (None, ("query",)),
    "last_changes": (None, ("query",)),
    "changes": (None, ("query", "rescored")),
    "self_influence": (None, ("train",)),
    "query_self_influence": (None, ("query",)),
    "preconditioned_norms": (None, ("train",)),
    RISE: (torch.float64, ("query",)),
}
_LAYERS: Layout = {"layers": (None, ("group", "query", "train"))}
_EXTREMES: Layout = {
    "values": (None, ("query", "k")),
    "train": (torch.int64, ("query", "k")),
    "lowest_values": (None, ("query", "k")),
    "lowest_train": (torch.int64, ("query", "k")),
}


_BESIDE_EXTREMES = ("query_errors", "residuals", "last_changes", RISE)


class Hit(NamedTuple):
    """One training example behind a query; rank 1 is the most influential."""

    query: int
    rank: int
    train: int
    score: float


class GroupScore(NamedTuple):
    """What a query's scores of some training examples add up to, and their mean."""

    query: int
    group: str
    train: int
    sum: float
    mean: float


@singledispatch
def in_notebooks(result: object) -> str | None:
    """HTML of a result, as `wherefrom.report.notebook` says it; None, for which a notebook shows its repr, without."""
    return None


class Scaled:
    """What scores are worth to a person."""

    values: Tensor
    fingerprint: Fingerprint
    rise_per_score: Tensor | None
    residuals: Tensor | None
    last_changes: Tensor | None

    @property
    def method(self) -> str:
        """The name of the method that made them."""
        return self.fingerprint["method"]

    @property
    def accuracy(self) -> dict[str, Tensor]:
        """How far a solver's solutions are from what they are meant to be, by attribute; empty without one."""
        found = {"residuals": self.residuals, "last_changes": self.last_changes}
        return {name: each for name, each in found.items() if each is not None}

    def _repr_html_(self) -> str | None:
        return in_notebooks(self)

    @property
    def unit(self) -> str:
        """What `predicted_rise` is in, such as "nats a token"."""
        return self.fingerprint.get(UNIT, "units of the loss")

    @property
    def predicted_rise(self) -> Tensor:
        """By how much each query's loss would rise if an example had been left out of training, float64.

        In `unit`, of values of the same shape: to first order, and for one example at a time. Values over N, and over
        the query's counted tokens.

        Raises:
            InputError: the method's scores have no such scale, or they were normalised.
        """
        if self.rise_per_score is None:
            raise InputError(
                f"predicted_rise of {self.fingerprint.get('method', 'these scores')}: these scores have no such scale. "
                "Read their ranks, or score with a method whose curvature is a mean over examples, such as EKFAC(); of "
                "an index, give query its rerank."
            )
        return self.values.to("cpu", torch.float64) * self.rise_per_score.unsqueeze(1)


@dataclass(frozen=True)
class Scores(Scaled):
    """How much training on each example lowers each query's measured loss.

    `values[q, t]` is the query's gradient, times the damped inverse curvature, times the training example's gradient:
    `g_q^T (H + damping)^-1 g_t` (Koh & Liang 2017, equation 2, with the sign turned). Positive: training on the example
    lowers the query's loss. Both losses are sums over tokens. Where the curvature is a mean over examples (`Diagonal`,
    `EKFAC`, `Shampoo`), removing example t of N raises the query's loss by about `values[q, t] / N`: see
    `predicted_rise`. `KFAC`, `Dot` and others have another scale, so compare scores of one method only.

    Attributes:
        values: [query, train] in dataset order; float32, or float64 for a float64 model. What was stored stays on
            disk, memory-mapped.
        fingerprint: what the scores were computed from.
        query_errors: with a `query_rank` or `query_bits`, what it has left out of each query's preconditioned gradient,
            as a part of its norm, [query]; otherwise None.
        layers: with `Pairs(layers=...)`, the part of each layer or group by its name, as `values`, which is their sum.
        self_influence: with `Pairs(self_influence=True)`, g_t^T (H + damping)^-1 g_t of each training example, [train].
        query_self_influence: the same of each query, [query].
        preconditioned_norms: the norm of (H + damping)^-1 g_t of each training example, [train].
        changes: by how much re-scoring at full rank has changed each query's highest scores, [query, rescored], in
            the order that they had; None without it.
        residuals: with a `solver`, |g - (H + D) x| / |g| of each query's solve, [query]: 0 for a solution, 1 for no
            answer at all. Scores come out well before it is small. Of aggregated queries, the largest; None where
            nothing is solved.
        last_changes: with a `solver` that can tell, by how much its last iteration has changed each query's scores, as
            a part of them, estimated, [query]; above 0.2 it is said not to have converged. Of aggregated queries, the
            largest.
        rise_per_score: what a score is multiplied with to be the predicted rise in `unit`, float64 [query]; None where
            the method has no such scale.
        name: what they are called in their run directory; empty for scores that are not stored.
        queries: the examples that were scored, where they are at hand.
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
    last_changes: Tensor | None = None
    rise_per_score: Tensor | None = None
    name: str = ""
    queries: Dataset[object] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Read finished scores, without the model or the data.

        Args:
            folder: `RUN/scores/NAME`, or `RUN/scores/LABEL` where only one result has that label.

        Raises:
            InputError: there are no scores, or several of this label.
            DamagedError: the files are not what was written.
        """
        return cls.opened(*_stored(Path(folder)))

    @classmethod
    def opened(cls, folder: Path, tensors: dict[str, Tensor]) -> Scores:
        """The result of a folder, of the tensors that are stored there."""
        if "lowest_train" in tensors:
            raise InputError(f"{folder} holds only the highest and lowest scores: read them with TopScores.load.")
        manifest = read_manifest(folder)
        groups = manifest["details"].get("layers", [])
        check_layout(folder, tensors, {**SCORES, **(_LAYERS if groups else {})}, BESIDE_SCORES)
        parts = tensors.pop("layers", torch.empty(0))
        if len(parts) != len(groups):
            raise DamagedError(f"{folder} cannot be used: it has {len(parts)} parts and {len(groups)} names for them.")
        layers = dict(zip(groups, parts, strict=True))
        return cls(fingerprint=manifest["fingerprint"], layers=layers, name=folder.name, **tensors)

    def top(self, k: int = 10) -> list[Hit]:
        """The k most influential training examples of each query, best first, query by query.

        Raises:
            InputError: k is less than 1, or training examples were added up.
        """
        if "aggregated training examples" in self.fingerprint:
            raise InputError("These scores add up all training examples, so none is the top: keep all pairs instead.")
        check_argument(k >= 1, "k", k, "at least 1")
        best = self.values.topk(min(k, self.values.shape[1]), dim=1)
        return list(_hits(best.indices, best.values))

    def by(self, groups: Iterable[object]) -> list[GroupScore]:
        """Sums and means over groups of training examples, such as those of a source or a topic.

        Args:
            groups: what each training example belongs to, in dataset order: a column of the training set.

        Returns:
            For each query, its groups with the number of their training examples, the highest sum first, in float64;
            `pandas.DataFrame(scores.by(groups))` is a table.

        Raises:
            InputError: there are more or fewer than training examples.
        """
        names = list(map(str, groups))
        known = {name: number for number, name in enumerate(dict.fromkeys(names))}
        if len(names) != self.values.shape[1]:
            raise InputError(f"groups: {len(names)} for scores of {self.values.shape[1]}: expected one of each.")
        found_names, members = list(known), torch.tensor([known[name] for name in names])  # members: [train]
        counts = members.bincount()  # [groups]
        found = []
        for query, values in enumerate(self.values):  # one at a time: they may lie on disk
            sums = torch.zeros(len(known), dtype=torch.float64).index_add_(0, members, values.to("cpu", torch.float64))
            order = sums.argsort(descending=True, stable=True).tolist()
            parts = [(found_names[each], int(counts[each]), float(sums[each])) for each in order]
            found += [GroupScore(query, name, count, total, total / count) for name, count, total in parts]
        return found

    def of_layers(self, name: str) -> Scores:
        """The part that one layer or group adds to every score; its norms are not known.

        Raises:
            InputError: there is no such part.
        """
        if name not in self.layers:
            known = ", ".join(self.layers) or "none; score with keep=Pairs(layers=True), or with groups of layers"
            raise InputError(f"name={name!r}: expected a layer or group whose part was stored: {known}.")
        return Scores(self.layers[name], {**self.fingerprint, "part": name}, rise_per_score=self.rise_per_score)

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
                f"normalized({kind!r}) needs norms that these scores do not have: score with "
                "keep=Pairs(self_influence=True)."
            )
        divisors = {
            "cosine": self.query_self_influence.sqrt().unsqueeze(1) * self.self_influence.sqrt(),
            "relatif": self.self_influence.sqrt(),
            "theta-relatif": self.preconditioned_norms,
        }
        check_argument(kind in divisors, "kind", kind, f"one of {', '.join(divisors)}")
        values = torch.where(divisors[kind] > 0, self.values / divisors[kind], 0.0)
        fingerprint = {**self.fingerprint, "normalized": kind}
        return replace(self, values=values, layers={}, fingerprint=fingerprint, rise_per_score=None, name="")

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """A table with a line for each pair, query by query, best first: query, rank, train and score.

        Args:
            k: only the highest of each query; None is every pair.

        Raises:
            InputError: pandas is not installed, or training examples were added up.
        """
        return _frame(self.top(self.values.shape[1] if k is None else k))

    def save(self, path: str | Path, k: int | None = None) -> None:
        """Write them for other programs: as a table (.csv, .parquet, as `to_pandas`), or all tensors (.safetensors).

        Args:
            k: of a table, as in `to_pandas`.

        Raises:
            InputError: the name ends otherwise, a library is not installed, or training examples were added up.
            StorageError: the file cannot be written; nothing is left behind.
        """
        beside = {name: getattr(self, name) for name in BESIDE_SCORES}
        layers = {f"layers/{name}": each for name, each in self.layers.items()}
        _save(self, {"values": self.values, **beside, **layers}, Path(path), k)


@dataclass(frozen=True)
class TopScores(Scaled):
    """Each query's highest and lowest scores, where the whole matrix was never stored.

    Of equal scores, the one of the earlier training example comes first.

    Attributes:
        values, train: the highest scores, best first, and their training positions, [query, k].
        lowest_values, lowest_train: the lowest, lowest first.
        fingerprint: what they were computed from.
        query_errors, residuals, last_changes, rise_per_score, name, queries: as in `Scores`.
    """

    values: Tensor
    train: Tensor
    lowest_values: Tensor
    lowest_train: Tensor
    fingerprint: Fingerprint
    query_errors: Tensor | None = None
    residuals: Tensor | None = None
    last_changes: Tensor | None = None
    rise_per_score: Tensor | None = None
    name: str = ""
    queries: Dataset[object] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> TopScores:
        """Read finished top scores, as `Scores.load` does.

        Raises:
            InputError: there are none, several of this label, or they are of another kind.
            DamagedError: the files are not what was written.
        """
        return cls.opened(*_stored(Path(folder)))

    @classmethod
    def opened(cls, folder: Path, tensors: dict[str, Tensor]) -> TopScores:
        """The result of a folder, of the tensors that are stored there."""
        if "lowest_train" not in tensors:
            raise InputError(f"{folder} holds the scores of all pairs: read them with Scores.load.")
        beside = {name: BESIDE_SCORES[name] for name in _BESIDE_EXTREMES}
        check_layout(folder, tensors, _EXTREMES, beside)
        return cls(fingerprint=read_manifest(folder)["fingerprint"], name=folder.name, **tensors)

    def top(self, k: int = 10) -> list[Hit]:
        """The k most influential training examples of each query, best first, query by query.

        Raises:
            InputError: k is less than 1, or more than were stored.
        """
        if not 1 <= k <= self.values.shape[1]:
            raise InputError(f"k={k}: expected 1 to {self.values.shape[1]}, which are stored; keep=Top(k) stores more.")
        return list(_hits(self.train[:, :k], self.values[:, :k]))

    def to_pandas(self, k: int | None = None) -> pandas.DataFrame:
        """The highest scores, as `Scores.to_pandas`."""
        return _frame(self.top(self.values.shape[1] if k is None else k))

    def save(self, path: str | Path, k: int | None = None) -> None:
        """Write them for other programs, as `Scores.save`; a table has the highest alone."""
        tensors = {name: getattr(self, name) for name in (*_EXTREMES, *_BESIDE_EXTREMES)}
        _save(self, tensors, Path(path), k)


Result = Scores | TopScores


def load_scores(folder: str | Path) -> Result:
    """Read finished scores of either kind, as `Scores.load` finds them."""
    folder, tensors = _stored(Path(folder))
    kind = TopScores if "lowest_train" in tensors else Scores
    return kind.opened(folder, tensors)


def _stored(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Where a finished result is, and its memory-mapped tensors."""
    folder = found_result(folder)
    if not folder.exists():
        found = ", ".join(each.name for each in finished(folder.parent))
        raise InputError(f"{folder}: no scores there; found {found or 'none'}. Compute them first.")
    return folder, Artifact(folder, read_manifest(folder)["fingerprint"]).mapped()


def _hits(train: Tensor, values: Tensor) -> Iterator[Hit]:
    for query, (positions, scores) in enumerate(zip(train.tolist(), values.tolist(), strict=True)):
        for rank, (position, score) in enumerate(zip(positions, scores, strict=True), start=1):
            yield Hit(query, rank, position, score)


def _frame(hits: list[Hit]) -> pandas.DataFrame:
    frame: pandas.DataFrame = require("pandas").DataFrame.from_records(hits, columns=list(Hit._fields))
    return frame


def _save(result: Result, tensors: Mapping[str, Tensor | None], path: Path, k: int | None) -> None:
    if path.suffix == ".safetensors":
        if k is not None:
            raise InputError(
                f"k={k} with {path.name}: a file of tensors has all scores. Leave k out, or write a table."
            )
        found = {name: each for name, each in tensors.items() if each is not None}
        write_tensors(path, found, result.fingerprint)
    elif path.suffix == ".csv":
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(Hit._fields)
        table.writerows(result.top(result.values.shape[1] if k is None else k))
        write_bytes(path, text.getvalue().encode())
    elif path.suffix == ".parquet":
        require("pyarrow")
        content = io.BytesIO()
        result.to_pandas(k).to_parquet(content, index=False)
        write_bytes(path, content.getvalue())
    else:
        raise InputError(f"path={str(path)!r}: expected a name that ends in .csv, .parquet or .safetensors.")


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
