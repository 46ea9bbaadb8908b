"""How well scores agree: two matrices of the same pairs, query by query (full against half precision, or two methods),
and a query's top training examples with its label.

This module knows matrices and labels; it must not know how either came about.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from wherefrom.evaluate.datamodels import IntervalEstimate
from wherefrom.evaluate.matrices import finite, matrices
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores

RESAMPLES = 1000


@dataclass(frozen=True)
class Correlations:
    """One kind of correlation between two matrices, for each query.

    Attributes:
        values: [queries] float64, from -1 to 1.
        mean: over queries, with the interval of a bootstrap over queries; the interval is the value itself where there
            is one query.
    """

    values: Tensor
    mean: IntervalEstimate

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Correlations:
        """With the interval of the mean."""
        drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
        return cls(torch.from_numpy(values), IntervalEstimate.of_resamples(float(values.mean()), drawn))

    @property
    def median(self) -> float:
        """Over queries; the mean of the middle two of an even number."""
        return float(np.median(self.values.numpy()))

    @property
    def worst(self) -> int:
        """The query with the lowest correlation, the first of several."""
        return int(self.values.argmin())

    @property
    def minimum(self) -> float:
        """The lowest correlation of a query."""
        return float(self.values.min())

    def to_json(self) -> dict[str, Any]:
        """All numbers, as json writes them."""
        return {
            "mean": self.mean.to_json(),
            "median": self.median,
            "minimum": self.minimum,
            "worst_query": self.worst,
            "queries": self.values.tolist(),
        }


@dataclass(frozen=True)
class Agreement:
    """How well two score matrices agree.

    Attributes:
        spearman: the correlation of ranks: whether both put the training examples in the same order.
        pearson: the correlation of the scores themselves, which the few largest dominate.
        train: training examples behind each correlation.
    """

    spearman: Correlations
    pearson: Correlations
    train: int

    def to_json(self) -> dict[str, Any]:
        """All numbers, as json writes them."""
        return {"spearman": self.spearman.to_json(), "pearson": self.pearson.to_json(), "train": self.train}


def compare_scores(reference: Tensor | Scores, other: Tensor | Scores) -> Agreement:
    """Correlate two matrices of scores, query by query, over training examples.

    Ties get average ranks. Where a query's scores are all equal in either matrix its correlations are 0: such scores
    say nothing of the others. Intervals are the middle 95% of 1000 bootstrap means over queries, so they cover which
    queries happened to be chosen, and nothing else.

    Args:
        reference: [queries, train], of any float type.
        other: [queries, train], of the same pairs in the same order.

    Raises:
        InputError: the shapes differ, there is no query or fewer than 2 training examples, or a score is not finite.
        MismatchError: both are `Scores`, and of other queries or training examples.
    """
    reference, other = matrices({"reference": reference, "other": other}).values()
    if reference.ndim != 2 or reference.shape != other.shape:
        raise InputError(
            f"other: scores of shape {list(other.shape)} against {list(reference.shape)} of reference; expected "
            "[queries, train] twice. Compare scores of the same queries and training examples."
        )
    if len(reference) < 1 or reference.shape[1] < 2:
        raise InputError(
            f"reference: scores of shape {list(reference.shape)}; a correlation needs a query and 2 training examples."
        )
    left, right = finite("reference", reference).numpy(), finite("other", other).numpy()
    spearman = _pearson(stats.rankdata(left, axis=1), stats.rankdata(right, axis=1))
    return Agreement(Correlations.of(spearman), Correlations.of(_pearson(left, right)), left.shape[1])


def _pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each query's correlation, [queries, train] twice -> [queries]; 0 where its scores are constant."""
    varies = (np.ptp(left, axis=1) > 0) & (np.ptp(right, axis=1) > 0)
    found = np.zeros(len(left))
    left, right = (each[varies] - each[varies].mean(1, keepdims=True) for each in (left, right))
    left, right = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (left, right))
    found[varies] = (left * right).sum(1).clip(-1, 1)
    return found


@dataclass(frozen=True)
class LabelAgreement:
    """How often top hits share their query's label.

    Attributes:
        hits: the share of each query's k top hits with its label, a mean over queries.
        standard_error: of that mean, over queries.
        chance: the share of all (query, training example) pairs with one label: what random hits would reach.
        k: hits counted for each query.
    """

    hits: float
    standard_error: float
    chance: float
    k: int

    def __str__(self) -> str:
        return (
            f"{self.hits:.1%} (± {self.standard_error:.1%}) of the top {self.k} share the query's label; "
            f"{self.chance:.1%} of random pairs do"
        )


def label_agreement(
    scores: Scores, query_labels: Sequence[Hashable], train_labels: Sequence[Hashable], k: int = 10
) -> LabelAgreement:
    """Compare the labels of each query and of its k top hits: a plausibility check, not a proof of influence.

    Args:
        query_labels: one label for each query.
        train_labels: one label for each training example.

    Raises:
        InputError: the labels do not fit the scores.
    """
    expected, found = tuple(scores.values.shape), (len(query_labels), len(train_labels))
    if found != expected:
        raise InputError(
            f"labels: {found} query and training labels for scores of shape {expected}; give one for each."
        )
    numbers = {label: number for number, label in enumerate({*query_labels, *train_labels})}
    query, train = (torch.tensor([numbers[each] for each in labels]) for labels in (query_labels, train_labels))
    same = (query[:, None] == train).double()  # [query, train]
    top = scores.values.topk(min(k, expected[1]), dim=1).indices
    shares = same.gather(1, top).mean(1)  # [query]
    error = float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else float("nan")
    return LabelAgreement(float(shares.mean()), error, float(same.mean()), top.shape[1])
