"""The linear datamodeling score: do scores predict what retraining on random subsets does to each query's loss?

Each method's scores are held against the same retrainings, with intervals, paired differences, and the ceiling that
the noise of retraining sets. This module knows scores and measured losses; it must not know models, data or how the
retrainings were made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.evaluate.matrices import AnyMethod, Scorer, finite, matrices, score_all
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.report.notebook import Table, View
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.results import Scores
from wherefrom.store.fingerprint import Dataset

Array: TypeAlias = NDArray[np.float64]

SPLITS = 10  # random splits of the seeds behind the ceiling; they share their losses, so more add little
TAIL = 2.5  # percent of the resamples left out below and above a 95% interval


@dataclass(frozen=True)
class IntervalEstimate:
    """A number and its 95% interval, in the number's own unit."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of_resamples(cls, value: float, resamples: Array) -> IntervalEstimate:
        """A value with the middle 95% of its bootstrap resamples [resamples], moved so that their mean is the value."""
        low, high = np.percentile(resamples, [TAIL, 100 - TAIL]) + value - float(resamples.mean())
        return cls(value, float(low), float(high))

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class LdsReport:
    """The linear datamodeling scores of several methods on the same retrainings.

    Attributes:
        queries: by method, [queries]: each query's score.
        means: by method: the mean over queries.
        differences: by (first, second) method, each pair once: the mean of the first less that of the second.
        ceiling: about what a perfect predictor of the expected loss would reach; None where seeds were not repeated.
        subsets: retrainings behind each correlation.
        repeats: seeds of each retraining in the file; a file of means counts as one.
        train: training examples.
        resamples: bootstrap resamples behind each interval.
        names: by method, of stored scores: what they are called in their run directory.
    """

    queries: Mapping[str, Tensor]
    means: Mapping[str, IntervalEstimate]
    differences: Mapping[tuple[str, str], IntervalEstimate]
    ceiling: IntervalEstimate | None
    subsets: int
    repeats: int
    train: int
    resamples: int
    names: Mapping[str, str] = field(default_factory=dict)

    def difference(self, first: str, second: str) -> IntervalEstimate:
        """The mean of the first less that of the second; `differences` has each pair in one order only."""
        if (first, second) in self.differences:
            return self.differences[first, second]
        other = self.differences[second, first]
        return IntervalEstimate(-other.value, -other.high, -other.low)

    def _repr_html_(self) -> str:
        """For a notebook, the methods, best first, against the best of them."""
        ordered = sorted(self.means, key=lambda name: -self.means[name].value)
        rows = [] if self.ceiling is None else [["ceiling from the noise of retraining", str(self.ceiling), ""]]
        rows += [[name, str(self.means[name]), ""] for name in ordered[:1]]
        rows += [[name, str(self.means[name]), f"{self.difference(name, ordered[0])}"] for name in ordered[1:]]
        queries, seeds = len(self.queries[ordered[0]]), f", {self.repeats} seeds each" if self.repeats > 1 else ""
        return View(
            "Linear datamodeling score",
            [f"{queries:,} queries, {self.subsets:,} retrainings on subsets of {self.train:,} examples{seeds}"],
            tables=[Table(["Method", "LDS [95% interval]", f"Difference from {ordered[0]}"], rows)],
            meaning="Rank correlation of summed scores with what retraining did to each query's loss: 1 predicts all.",
        )._repr_html_()

    def to_json(self) -> dict[str, Any]:
        """All numbers, as json writes them."""
        return {
            "methods": {
                name: {**mean.to_json(), "queries": self.queries[name].tolist(), "scores": self.names.get(name)}
                for name, mean in self.means.items()
            },
            "differences": [
                {"first": first, "second": second, **difference.to_json()}
                for (first, second), difference in self.differences.items()
            ],
            "ceiling": self.ceiling.to_json() if self.ceiling else None,
            "subsets": self.subsets,
            "repeats": self.repeats,
            "train": self.train,
            "resamples": self.resamples,
        }


def linear_datamodeling_scores(values: Tensor, truth: GroundTruth) -> Tensor:
    """How well scores predict, query by query, the order of the retrained losses (Park et al. 2023, section 2).

    For each query: Spearman's correlation, over subsets, of the summed scores of the subset's examples with minus the
    mean loss over repeats (protocol A: Bae et al. 2024). Ties get average ranks. A query whose sums or whose losses
    are all equal gets 0, not NaN: a score that does not vary predicts nothing, and a method must not gain from the
    queries on which it is silent.

    Args:
        values: [queries, train] scores; positive where training on the example lowers the query's loss.
        truth: the retrainings, with the same queries and training examples in the same order.

    Returns:
        [queries] float64, from -1 to 1.

    Raises:
        InputError: the scores do not fit the ground truth or are not finite.
    """
    predicted = _subset_sums("values", values, truth)
    return torch.from_numpy(_spearman(predicted[None], truth.outcomes.numpy()[None], _once(truth))[0, :, 0])


def lds(
    study: Scorer[AnyMethod],
    queries: Dataset[object],
    methods: Sequence[AnyMethod],
    truth: GroundTruth,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> LdsReport:
    """Score queries by each method, and hold the scores against the same retrainings.

    Args:
        queries: those of the ground truth, in its order; so are the study's training examples.
        methods: what `study.score` takes; in the report they are called what `str` makes of them.
        truth, resamples, seed: as in `evaluate_lds`.

    Raises:
        WherefromError: what `study.score` and `evaluate_lds` raise.
    """
    return evaluate_lds(score_all(study, queries, methods), truth, resamples=resamples, seed=seed)


def evaluate_lds(
    scores: Mapping[str, Tensor | Scores], truth: GroundTruth, *, resamples: int = 1000, seed: int = 0
) -> LdsReport:
    """Each method's mean linear datamodeling score, their differences, and the ceiling, with 95% intervals.

    The intervals come from a two-way bootstrap: each resample draws subsets and queries with replacement, the same for
    every method, so that differences are paired. They cover which subsets and which queries happened to be drawn, and
    the noise of retraining as it shows among subsets. They do not cover another fine-tuned model, factors fitted anew,
    or queries of another kind. Where neither subsets nor queries have an effect of their own they are wider than need
    be, up to a factor of 1.7 (Owen 2007, "The pigeonhole bootstrap"). Subsets drawn twice tie in both rankings, which
    lowers Spearman's correlation in resamples (by 0.01 with 30 subsets, 0.004 with 100); so an interval is the middle
    95% of the resamples, moved by as much as their mean is off the value.

    The ceiling comes from how well the mean losses of two halves of the seeds agree: r, their Spearman correlation over
    subsets, as a mean over queries and random splits. Then `k r / (1 + (k - 1) r)`, with k = repeats / size of a half,
    is the reliability of the mean over all seeds (Spearman 1910, Brown 1910), and its root the correlation of that mean
    with the expected loss. Negative r counts as 0. r is averaged first because the root of one query's noisy r is far
    off; where queries differ in r this makes the ceiling a little too high, not too low.

    The time grows with methods x queries x resamples x subsets, and the ceiling takes as long as some 15 more methods.

    Args:
        scores: by method, [queries, train]; where they are given as `Scores`, all must be about the same.
        truth: the retrainings, with the same queries and training examples in the same order.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        InputError: there are no methods, scores do not fit the ground truth, or resamples is less than 2.
        MismatchError: some scores are about other queries or training examples than others.
    """
    if not scores:
        raise InputError("scores: no methods; give at least one name with its scores [queries, train].")
    check_argument(resamples >= 2, "resamples", resamples, "at least 2; 1000 give stable intervals")
    generator = np.random.default_rng(seed)
    subsets, repeats, queries = truth.losses.shape
    subset_counts = _draws(generator, subsets, resamples)  # [subsets, resamples]
    weights = _draws(generator, queries, resamples) / queries  # [queries, resamples]

    predicted = np.stack([_subset_sums(name, values, truth) for name, values in matrices(scores).items()])
    outcomes = truth.outcomes.numpy()[None]  # [1, queries, subsets]
    measured = _spearman(predicted, outcomes, _once(truth))[..., 0]  # [methods, queries]
    drawn = (_spearman(predicted, outcomes, subset_counts) * weights).sum(1)  # [methods, resamples]
    by_name = dict(zip(scores, zip(measured.mean(1).tolist(), drawn, strict=True), strict=True))
    return LdsReport(
        queries=dict(zip(scores, torch.from_numpy(measured), strict=True)),
        means={name: IntervalEstimate.of_resamples(*found) for name, found in by_name.items()},
        differences={
            (first, second): IntervalEstimate.of_resamples(
                by_name[first][0] - by_name[second][0], by_name[first][1] - by_name[second][1]
            )
            for first, second in itertools.combinations(scores, 2)
        },
        ceiling=_ceiling(truth, subset_counts, weights, generator) if repeats > 1 else None,
        subsets=subsets,
        repeats=repeats,
        train=truth.masks.shape[1],
        resamples=resamples,
        names={name: each.name for name, each in scores.items() if isinstance(each, Scores) and each.name},
    )


def _ceiling(
    truth: GroundTruth, subset_counts: Array, weights: Array, generator: np.random.Generator
) -> IntervalEstimate:
    """The score of a perfect predictor of the expected loss, on the resamples of the methods."""
    halves = _seed_halves(truth.losses.numpy(), generator)
    agreements = (_spearman(*halves, subset_counts).mean(0) * weights).sum(0)  # [resamples]
    agreement = IntervalEstimate.of_resamples(float(_spearman(*halves, _once(truth)).mean()), agreements)
    return IntervalEstimate(
        *(_reachable(r, truth.losses.shape[1]) for r in (agreement.value, agreement.low, agreement.high))
    )


def _seed_halves(losses: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Mean losses of two disjoint halves of the seeds, for several random splits: twice [splits, queries, subsets]."""
    repeats = losses.shape[1]
    half = repeats // 2
    # A set: few seeds have few splits, and each needs counting once.
    splits = {
        tuple(sorted((tuple(sorted(order[:half])), tuple(sorted(order[half : 2 * half])))))
        for order in (generator.permutation(repeats).tolist() for _ in range(SPLITS))
    }
    means = [np.stack([losses[:, half].mean(1).T for half in halves]) for halves in zip(*sorted(splits), strict=True)]
    return means[0], means[1]


def _reachable(agreement: float, repeats: int) -> float:
    """From the agreement r of halves of the seeds to the ceiling for the mean over all `repeats` of them."""
    longer = repeats / (repeats // 2)
    agreement = max(agreement, 0.0)
    return math.sqrt(longer * agreement / (1 + (longer - 1) * agreement))


def _spearman(first: Array, second: Array, counts: Array) -> Array:
    """Spearman's correlation over subsets that each count as often as a resample drew them; 0 if one is constant.

    Args:
        first: [splits, queries, subsets].
        second: [splits or 1, queries, subsets].
        counts: [subsets, resamples], each column with the sum `subsets`.

    Returns:
        [splits, queries, resamples].
    """
    found = np.zeros((*first.shape[:2], counts.shape[1]))
    for query in range(first.shape[1]):  # one at a time: what it needs stays in the processor's cache
        left, right = (_centred_ranks(each[:, query], counts) for each in (first, second))
        weighted = right * counts  # [splits, subsets, resamples]
        covariance = (left * weighted).sum(1)  # [splits, resamples]
        scale = np.sqrt((left * left * counts).sum(1) * (right * weighted).sum(1))
        # Ranks are exact, so constants have exactly no variance.
        np.divide(covariance, scale, out=found[:, query], where=scale > 0)
    return found


def _centred_ranks(values: Array, counts: Array) -> Array:
    """Average ranks within each resample, less their mean: [splits, subsets] -> [splits, subsets, resamples].

    A value's average rank is the mean of two numbers, of those below it and of those not above it, and a half. Both
    stand in the running sum of the counts in the order of the values, so no resample is sorted, and ties are right.
    """
    ranks = np.empty((len(values), *counts.shape))
    running = np.zeros((len(counts) + 1, counts.shape[1]))  # [subsets + 1, resamples]
    for split, ranked in enumerate(values):
        order = ranked.argsort()
        np.cumsum(counts[order], axis=0, out=running[1:])
        below, not_above = (np.searchsorted(ranked[order], ranked, end) for end in ("left", "right"))  # each [subsets]
        ranks[split] = (running[below] + running[not_above] - len(counts)) / 2
    return ranks


def _subset_sums(name: str, values: Tensor, truth: GroundTruth) -> Array:
    """The summed scores of each subset's examples, [queries, subsets]."""
    expected = (truth.losses.shape[2], truth.masks.shape[1])
    if tuple(values.shape) != expected:
        raise InputError(
            f"{name}: scores of shape {tuple(values.shape)}; the ground truth has {expected[0]} queries and "
            f"{expected[1]} training examples. Score the same ones in the same order."
        )
    if len(truth.masks) < 3:
        raise InputError(f"masks: {len(truth.masks)} subsets; a rank correlation needs at least 3. Retrain on more.")
    values = finite(name, values)
    # Scores that are mostly one number (a constant, or BM25's zeros) must tie where they should, but sums of many equal
    # numbers differ in their last bits. So that number, the median, is counted and not summed.
    common = values.median(1, keepdim=True).values  # [queries, 1]
    masks = truth.masks.double()
    sums: Array = ((values - common) @ masks.T + common * masks.sum(1)).numpy()  # [queries, subsets]
    return sums


def _draws(generator: np.random.Generator, size: int, resamples: int) -> Array:
    """How often each of `size` things is drawn in `size` draws with replacement, [size, resamples]."""
    return generator.multinomial(size, np.full(size, 1 / size), resamples).T.astype(np.float64, order="C")


def _once(truth: GroundTruth) -> Array:
    """Counts of the subsets as they are: one "resample" with each subset once, [subsets, 1]."""
    return np.ones((len(truth.masks), 1))
