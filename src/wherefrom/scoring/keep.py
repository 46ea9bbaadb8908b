"""What is kept of scores: all pairs, the highest alone, sums over examples, or the parts of tokens.

Each is a value that `Study.score` takes, with its checks and what a result's name and fingerprint say of it. This
module knows no model and no data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.results import LAYER_PARTS, OF_TOKENS, ONLY_EXTREMES, WITH_SELF_INFLUENCE, Scores, TopScores
from wherefrom.scoring.tokens import INDEX, TokenScores
from wherefrom.store.artifacts import check_layout
from wherefrom.store.cache import Cache
from wherefrom.store.files import within
from wherefrom.store.fingerprint import tensors_digest

Aggregation = Literal["sum", "mean"]
LayerGroups = Mapping[str, Sequence[str]]
"""Names for groups of layers, each with the names or glob patterns of its layers."""

Scores_co = TypeVar("Scores_co", Scores, TopScores, TokenScores, covariant=True)


class Keep(ABC, Generic[Scores_co]):
    """What is kept of scores."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the name of a result says of it; empty for all pairs."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What a fingerprint says of it."""

    # Whether they are scores of whole training examples.
    of_sequences: ClassVar[bool] = True

    def of_queries(self, counts: Tensor) -> Tensor:
        """What the queries count, [query], as what is kept of them does."""
        return counts

    # Of the run directory, where results of this kind lie.
    folder: ClassVar[str] = "scores"

    def location(self, folder: Path, name: str) -> tuple[Path, str]:
        """Where the artifact of a result is: a folder, and its name there."""
        return folder, name

    def forget(self, cache: Cache, item: str) -> None:
        """Delete what there is of a result."""
        cache.forget(item)

    @abstractmethod
    def opened(self, path: Path, tensors: dict[str, Tensor], queries: int, train: int) -> Scores_co:
        """A finished result of this kind.

        Args:
            path: of its artifact, which has these tensors.
            queries, train: how many it has to be of.

        Raises:
            DamagedError: it is of others.
        """

    def __str__(self) -> str:
        return self.label or "all pairs"


def _parts(layers: bool | LayerGroups) -> dict[str, str]:
    if not layers:
        return {}
    return {LAYER_PARTS: "each" if layers is True else repr({name: list(each) for name, each in layers.items()})}


@dataclass(frozen=True)
class Pairs(Keep[Scores]):
    """The score of every query with every training example.

    Attributes:
        layers: also keep each layer's part of every score; or a mapping of names to layer patterns, such as
            `{"attention": ["*.attn.*"], "mlp": ["*.mlp.*"]}`, to keep the parts of groups ("other" is the rest).
        self_influence: also compute each example's score with itself, in the same sweep, for `Scores.normalized`.
    """

    layers: bool | LayerGroups = False
    self_influence: bool = False

    @property
    def label(self) -> str:
        layers = "layers" if self.layers is True else "groups" if self.layers else ""
        return "-".join(filter(None, (layers, "self" if self.self_influence else "")))

    def settings(self) -> dict[str, str]:
        return {**_parts(self.layers), **({WITH_SELF_INFLUENCE: "yes"} if self.self_influence else {})}

    def opened(self, path: Path, tensors: dict[str, Tensor], queries: int, train: int) -> Scores:
        return _checked(path, Scores.opened(path, tensors), (queries, train))


@dataclass(frozen=True)
class Top(Keep[TopScores]):
    """Each query's `k` highest and `k` lowest scores, without a matrix of all: for millions of training examples.

    Raises:
        InputError: k is less than 1.
    """

    k: int = 100

    def __post_init__(self) -> None:
        check_argument(self.k >= 1, "k", self.k, "at least 1")

    @property
    def label(self) -> str:
        return f"top{self.k}"

    def settings(self) -> dict[str, str]:
        return {ONLY_EXTREMES: f"the {self.k} highest and lowest of each query"}

    def opened(self, path: Path, tensors: dict[str, Tensor], queries: int, train: int) -> TopScores:
        return _checked(path, TopScores.opened(path, tensors), (queries, "k"))


@dataclass(frozen=True)
class Aggregated(Keep[Scores]):
    """Scores of sums over queries, training examples or both.

    Attributes:
        queries: score the "sum" or "mean" of all queries' measurements; `values` is then [1, train].
        train: score against the "sum" or "mean" of all training gradients; `values` is then [query, 1].
        layers: as in `Pairs`.

    Raises:
        InputError: neither is given, or something else than these.
    """

    queries: Aggregation | None = None
    train: Aggregation | None = None
    layers: bool | LayerGroups = False

    def __post_init__(self) -> None:
        for argument in ("queries", "train"):
            if getattr(self, argument) not in (None, "sum", "mean"):
                raise InputError(f"{argument}={getattr(self, argument)!r}: expected 'sum', 'mean' or None.")
        if self.queries is None and self.train is None:
            raise InputError("Aggregated() of neither queries nor train: give one of them 'sum' or 'mean'.")

    @property
    def label(self) -> str:
        parts = [f"query-{self.queries}" if self.queries else "", f"train-{self.train}" if self.train else ""]
        return "-".join(filter(None, ["layers" if self.layers is True else "groups" if self.layers else "", *parts]))

    def settings(self) -> dict[str, str]:
        found = {"queries": self.queries, "training examples": self.train}
        return _parts(self.layers) | {f"aggregated {name}": how for name, how in found.items() if how}

    def of_queries(self, counts: Tensor) -> Tensor:
        added = {"sum": counts.sum, "mean": counts.mean}
        return counts if self.queries is None else added[self.queries]().unsqueeze(0)

    def opened(self, path: Path, tensors: dict[str, Tensor], queries: int, train: int) -> Scores:
        return _checked(
            path, Scores.opened(path, tensors), (1 if self.queries else queries, 1 if self.train else train)
        )


@dataclass(frozen=True)
class Tokens(Keep[TokenScores]):
    """The score of every token of training examples.

    Attributes:
        top: only of the pairs of each query with its `top` most positive and `top` most negative training examples,
            which are found first, and cost little; None is every pair, written to disk in parts of bounded size, at
            (tokens of a training example) times the cost of all pairs.
        pairs: only of these, each a query and a training position.

    Raises:
        InputError: `top` is less than 1, or both are given.
    """

    top: int | None = None
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_argument(self.top is None or self.top >= 1, "top", self.top, "at least 1, or None for every pair")
        check_argument(self.top is None or not self.pairs, "top", self.top, "None with pairs, which are chosen already")

    @property
    def label(self) -> str:
        return "chosen-tokens" if self.pairs else "tokens" if self.top is None else f"top{self.top}-tokens"

    def settings(self) -> dict[str, str]:
        if self.pairs:
            chosen = tensors_digest({"pairs": torch.tensor(self.pairs)})[:24]
            return {OF_TOKENS: f"{len(self.pairs)} chosen pairs ({chosen})"}
        return {OF_TOKENS: "all pairs" if self.top is None else f"the {self.top} highest and lowest of each query"}

    folder: ClassVar[str] = "tokens"
    of_sequences: ClassVar[bool] = False

    def location(self, folder: Path, name: str) -> tuple[Path, str]:
        return within(folder, name), INDEX

    def forget(self, cache: Cache, item: str) -> None:
        cache.clear()

    def opened(self, path: Path, tensors: dict[str, Tensor], queries: int, train: int) -> TokenScores:
        return TokenScores.load(path.parent)


Opened = TypeVar("Opened", Scores, TopScores)


def _checked(path: Path, result: Opened, shape: tuple[int | str, ...]) -> Opened:
    """A result of as many queries and training examples as were given."""
    check_layout(path, {"values": result.values}, {"values": (None, shape)})
    return result


def layer_groups(layers: bool | LayerGroups, tracked: Sequence[str]) -> dict[str, str]:
    """The group of each layer whose part of a score is stored; empty when none is.

    Raises:
        InputError: a pattern matches no layer, or a layer is in two groups.
    """
    if not layers:
        return {}
    if layers is True:
        return {layer: layer for layer in tracked}
    found: dict[str, str] = {}
    for group, patterns in layers.items():
        for pattern in patterns:
            matched = [layer for layer in tracked if fnmatchcase(layer, pattern)]
            if not matched:
                raise InputError(
                    f"layers: {pattern!r} of group {group!r} matches no tracked layer; they are called "
                    f"{tracked[0]!r} to {tracked[-1]!r}."
                )
            for layer in matched:
                if found.setdefault(layer, group) != group:
                    raise InputError(f"layers: {layer!r} is in the groups {found[layer]!r} and {group!r}.")
    return {layer: found.get(layer, "other") for layer in tracked}
