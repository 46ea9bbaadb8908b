"""What may be asked of scores: the keyword arguments of `Study.score` and its relatives, once, with their checks.

From them follow the name that results are kept under and what a fingerprint says. This module knows no model and no
data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

from typing_extensions import Unpack

from wherefrom.curvature.factors import Factors
from wherefrom.curvature.solvers import Solver
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.memory import checked_batch_size
from wherefrom.store.files import checked_name
from wherefrom.store.fingerprint import Fingerprint

Aggregation = Literal["sum", "mean"]
LayerGroups = Mapping[str, Sequence[str]]
"""Names for groups of layers, each with the names or glob patterns of its layers."""

# Entries of fingerprints for what is kept beside the values.
_PARTS, _SELF_INFLUENCE = "parts by layer", "self-influence"
# What ends the names of parts of a result and of files that are being written.
_BESIDE = re.compile(r"\.(tokens|blocks|part|partial.*)$")


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of `Study.score`, `score_top`, `score_tokens` and `plan`.

    Attributes:
        damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer.
        half_precision: bfloat16 products in the model's passes, resident query gradients in bfloat16; what is added up
            stays float32.
        query_rank: keep each layer's preconditioned query gradient as two matrices of this rank, so that more queries
            fit into memory; `Scores.query_errors` says what that leaves out. None keeps them whole.
        query_bits: 8 keeps whole query gradients as integers of that size, with a scale for each output of each layer
            and query: half of bfloat16's memory. `Scores.query_errors` says what the rounding leaves out. None keeps
            numbers of the products' type.
        solver: `ConjugateGradients` or `Astra`, to go on from what the factors give to the inverse of the damped
            Gauss-Newton matrix itself. None takes what the factors give.
        query_batch_size, train_batch_size: None finds them; results depend on them only by rounding.
        name: of the result in the run directory; by default the strategy, what else was asked for, and a digest of all
            that the result depends on, so that another damping or other queries lie side by side.
        overwrite: compute it again and replace it, also where it has this name and was made from something else, which
            is refused otherwise. It replaces this result alone: no factors, and no other scores. Where it is
            interrupted, the call without it goes on.
    """

    damping: float | None
    half_precision: bool
    query_rank: int | None
    query_bits: int | None
    solver: Solver | None
    query_batch_size: int | None
    train_batch_size: int | None
    name: str | None
    overwrite: bool


class RescoredOptions(ScoreOptions, total=False):
    """Keyword arguments of `Study.score` and `score_tokens`, besides those of `ScoreOptions`.

    Attributes:
        rescore: with a `query_rank` or `query_bits`, how many of each query's highest scores are computed again with
            whole gradients of the products' type.
    """

    rescore: int


class PairwiseOptions(RescoredOptions, total=False):
    """Keyword arguments of `Study.score`, besides those of `RescoredOptions`.

    Attributes:
        per_layer: also keep each layer's part of every score; or a mapping of names to layer patterns, such as
            `{"attention": ["*.attn.*"], "mlp": ["*.mlp.*"]}`, to keep the parts of groups ("other" is the rest).
        self_influence: also compute each example's score with itself, in the same sweep, for `Scores.normalized`.
        aggregate_queries: score the "sum" or "mean" of all queries' measurements; `values` is then [1, train].
        aggregate_train: score against the "sum" or "mean" of all training gradients; `values` is then [query, 1].
    """

    per_layer: bool | LayerGroups
    self_influence: bool
    aggregate_queries: Aggregation | None
    aggregate_train: Aggregation | None


def check_names(options: Mapping[str, object], known: frozenset[str]) -> None:
    """Refuse keyword arguments that a call does not have, which would be passed over."""
    for name, value in options.items():
        if name not in known:
            raise InputError(f"{name}={value!r}: expected one of {', '.join(sorted(known))}.")


@dataclass(frozen=True)
class Options:
    """The same with their defaults, checked.

    Attributes:
        top: how many of each query's highest and lowest scores are kept; None keeps all of them.

    Raises:
        InputError: one of them is impossible, or two do not go together.
    """

    damping: float | None = None
    half_precision: bool = False
    query_rank: int | None = None
    query_bits: int | None = None
    solver: Solver | None = None
    rescore: int = 0
    query_batch_size: int | None = None
    train_batch_size: int | None = None
    name: str | None = None
    overwrite: bool = False
    per_layer: bool | LayerGroups = False
    self_influence: bool = False
    aggregate_queries: Aggregation | None = None
    aggregate_train: Aggregation | None = None
    top: int | None = None

    @classmethod
    def of(cls, known: frozenset[str], top: int | None, /, **options: Unpack[PairwiseOptions]) -> Options:
        """The options of a call; refuses those of another, which would be passed over.

        Args:
            known: the names of the call's options.
        """
        check_names(options, known)
        return cls(**options, top=top)

    def __post_init__(self) -> None:
        if self.name is not None:
            checked_result_name(self.name)
        checked_batch_size(self.query_batch_size)
        checked_batch_size(self.train_batch_size)
        if self.query_rank is not None and self.query_rank < 1:
            raise InputError(f"query_rank={self.query_rank}: expected at least 1, or None for whole gradients.")
        if self.query_bits not in (None, 8):
            raise InputError(f"query_bits={self.query_bits}: expected 8, or None for numbers of the products' type.")
        if self.rescore < 0 or (self.rescore and self.query_rank is None and self.query_bits is None):
            raise InputError(
                f"rescore={self.rescore}: expected at least 1 together with a query_rank or query_bits, or 0."
            )
        for argument in ("aggregate_queries", "aggregate_train"):
            value = getattr(self, argument)
            if value not in (None, "sum", "mean"):
                raise InputError(f"{argument}={value!r}: expected 'sum', 'mean' or None.")
        if self.top is not None and self.top < 1:
            raise InputError(f"k={self.top}: expected at least 1.")
        self._check_together()
        self._check_top()
        self._check_solver()

    def _check_together(self) -> None:
        aggregated = bool(self.aggregate_queries or self.aggregate_train)
        if self.query_bits is not None and self.query_rank is not None:
            raise InputError(
                f"query_bits={self.query_bits} with query_rank={self.query_rank}: matrices of low rank are not kept as "
                "integers. Leave one of them out."
            )
        for name in ("query_rank", "query_bits"):
            if self.aggregate_queries and getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)} with aggregate_queries={self.aggregate_queries!r}: the sum of all "
                    f"query gradients is one gradient, which fits whole. Leave {name} out."
                )
        if self.rescore and (aggregated or self.per_layer):
            raise InputError(
                f"rescore={self.rescore} replaces single scores, and aggregate_queries, aggregate_train and per_layer "
                "keep others beside them. Leave one of them out."
            )
        if self.self_influence and aggregated:
            raise InputError(
                "self_influence=True belongs to single examples, and aggregate_queries and aggregate_train sum over "
                "them. Leave one of them out, or use Study.self_influence."
            )

    def _check_top(self) -> None:
        others = ("rescore", "per_layer", "self_influence", "aggregate_queries", "aggregate_train")
        found = [name for name in others if getattr(self, name)]
        if self.top is not None and found:
            raise InputError(
                f"{found[0]}={getattr(self, found[0])!r} with only the {self.top} highest and lowest scores: these are "
                "kept alone. Leave one of them out."
            )

    def _check_solver(self) -> None:
        if self.solver is None:
            return
        if not isinstance(self.solver, Solver):
            raise InputError(f"solver={self.solver!r}: expected ConjugateGradients(...), Astra(...) or None.")
        for name in ("half_precision", "query_rank", "query_bits", "self_influence"):
            if getattr(self, name):
                raise InputError(
                    f"{name}={getattr(self, name)!r} with a solver, whose solutions are whole, in the model's type, "
                    "and of queries alone. Leave one of them out."
                )
        if self.damping == 0:
            raise InputError("damping=0 with a solver: curvature alone has no inverse. Give a number above 0, or None.")

    def label(self, factors: Factors) -> str:
        """What was asked for, in a word: what the names of results begin with."""
        return factors.strategy + "-conditioned" * bool(factors.roots) + self._suffix()

    def _suffix(self) -> str:
        parts = [
            self.solver.label if self.solver else "",
            "half" if self.half_precision else "",
            f"rank{self.query_rank}" if self.query_rank else "",
            f"{self.query_bits}bit" if self.query_bits else "",
            "layers" if self.per_layer is True else "groups" if self.per_layer else "",
            "self" if self.self_influence else "",
            f"query-{self.aggregate_queries}" if self.aggregate_queries else "",
            f"train-{self.aggregate_train}" if self.aggregate_train else "",
            f"top{self.top}" if self.top else "",
        ]
        return "".join(f"-{part}" for part in parts if part)

    def fingerprint(self, study: Fingerprint, factors: Factors, precision: str) -> dict[str, str]:
        """What a result depends on, beside its queries.

        Raises:
            MismatchError: the factors are of another model.
            InputError: a solver is asked for with conditioned factors.
        """
        factors.check_model(study)
        if self.solver is not None and factors.roots:
            raise InputError(
                f"solver={self.solver!r} with conditioned factors, whose damping is none of the Gauss-Newton matrix's. "
                "Leave the solver out, or fit factors without a conditioning."
            )
        conditioned = factors.fingerprint.get("conditioning")
        return {
            **study,
            "strategy": factors.strategy,
            "factors": factors.fingerprint["training data"],
            "targets": factors.fingerprint["targets"],
            "factors' task": factors.fingerprint["task"],
            "factors' precision": factors.fingerprint["precision"],
            **({} if conditioned is None else {"conditioning": conditioned}),
            "precision": precision,
            **self.settings(),
        }

    def settings(self) -> dict[str, str]:
        """What was asked for, beside queries and factors."""
        rank = "full" if self.query_rank is None else str(self.query_rank)
        again = f", the top {self.rescore} at full rank" if self.rescore and self.query_bits is None else ""
        found = {
            "damping": "0.1 x mean eigenvalue" if self.damping is None else repr(self.damping),
            "query rank": f"{rank}{again}",
        }
        if self.query_bits is not None:
            again = f", the top {self.rescore} without" if self.rescore else ""
            found["query bits"] = f"{self.query_bits}{again}"
        if self.solver is not None:
            found["solver"] = repr(self.solver)
        if self.per_layer:
            groups = "each" if self.per_layer is True else repr({k: list(v) for k, v in self.per_layer.items()})
            found[_PARTS] = groups
        if self.self_influence:
            found[_SELF_INFLUENCE] = "yes"
        for name, how in (("queries", self.aggregate_queries), ("training examples", self.aggregate_train)):
            if how:
                found[f"aggregated {name}"] = how
        if self.top is not None:
            found["kept"] = f"the {self.top} highest and lowest of each query"
        return found


def checked_result_name(name: str) -> str:
    """A name for scores; endings of what is kept beside them for a while, and then deleted, are not for names."""
    if _BESIDE.search(checked_name(name)):
        raise InputError(f"name={name!r}: expected another ending, this one is for parts of scores.")
    return name


def of_values(fingerprint: Fingerprint) -> dict[str, str]:
    """What the values of scores depend on, without what is kept beside them."""
    return {name: value for name, value in fingerprint.items() if name not in (_PARTS, _SELF_INFLUENCE)}


def layer_groups(per_layer: bool | LayerGroups, layers: Sequence[str]) -> dict[str, str]:
    """The group of each layer whose part of a score is kept; empty when none is.

    Raises:
        InputError: a pattern matches no layer, or a layer is in two groups.
    """
    if not per_layer:
        return {}
    if per_layer is True:
        return {layer: layer for layer in layers}
    found: dict[str, str] = {}
    for group, patterns in per_layer.items():
        for pattern in patterns:
            matched = [layer for layer in layers if fnmatchcase(layer, pattern)]
            if not matched:
                raise InputError(
                    f"per_layer: {pattern!r} of group {group!r} matches no tracked layer; they are called "
                    f"{layers[0]!r} to {layers[-1]!r}."
                )
            for layer in matched:
                if found.setdefault(layer, group) != group:
                    raise InputError(f"per_layer: {layer!r} is in the groups {found[layer]!r} and {group!r}.")
    return {layer: found.get(layer, "other") for layer in layers}
