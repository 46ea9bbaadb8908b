"""How well two score matrices of the same pairs agree, query by query: full against half precision, or two methods.

This module knows two matrices; it must not know how either was computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from wherefrom.evaluate.lds import Estimate, matrices
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
    mean: Estimate

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
    queries happened to be asked, and nothing else.

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
    left, right = _checked("reference", reference), _checked("other", other)
    ranks = (stats.rankdata(side, axis=1) for side in (left, right))
    return Agreement(_summary(_row_correlations(*ranks)), _summary(_row_correlations(left, right)), left.shape[1])


def _checked(name: str, values: Tensor) -> NDArray[np.float64]:
    if not values.isfinite().all():
        query, example = (~values.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"{name}[{query}, {example}] is {values[query, example].item()}; expected finite scores. Half precision "
            "overflows in float16: use bfloat16."
        )
    return values.detach().to("cpu", torch.float64).numpy()


def _row_correlations(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's correlation of each row, [queries, train] twice -> [queries]; 0 where a row is constant."""
    varies = (np.ptp(left, axis=1) > 0) & (np.ptp(right, axis=1) > 0)
    found = np.zeros(len(left))
    left, right = (side[varies] - side[varies].mean(1, keepdims=True) for side in (left, right))
    left, right = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right))
    found[varies] = (left * right).sum(1).clip(-1, 1)
    return found


def _summary(values: NDArray[np.float64]) -> Correlations:
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    return Correlations(torch.from_numpy(values), Estimate.of_resamples(float(values.mean()), drawn.mean(1)))
