"""Counterfactual removal: leave out the training examples that a method names, train again, and look at the queries.

A method is right about influence if its removals raise the queries' losses more than random ones do. This module
knows scores as matrices and losses as numbers; it must not know how either is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from wherefrom.evaluate.matrices import AnyMethod, Scorer, finite, matrices, score_all
from wherefrom.evaluate.retrain import RetrainOptions, TrainFunction, permutation, retrain_pairs
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores
from wherefrom.store.fingerprint import Dataset


@dataclass(frozen=True)
class Removal:
    """What removals did to the queries.

    Attributes:
        methods: their names.
        counts: how many training examples were left out.
        seeds: one for each repeat.
        queries: positions of the queries that were chosen.
        losses: float64 [methods, counts, repeats, chosen queries], in the unit of the training function. Removals that
            are the same share their retrainings, as those of a count of 0 always do.
    """

    methods: tuple[str, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    queries: tuple[int, ...]
    losses: Tensor

    def summary(self, measure: Callable[[Tensor], float]) -> dict[str, NDArray[np.float64]]:
        """One number for each retraining: [counts, repeats] for each method.

        Args:
            measure: makes a number of the losses float64 [chosen queries], such as `lambda losses: losses.mean()`, or
                the perplexity of all queries.
        """
        shape = (len(self.counts), len(self.seeds))
        return {
            method: np.array([float(measure(each)) for each in losses.flatten(0, 1)]).reshape(shape)
            for method, losses in zip(self.methods, self.losses, strict=True)
        }

    def to_json(self) -> dict[str, object]:
        """All numbers, as lists; `losses` holds [counts][repeats][queries] for each method."""
        return {
            "counts": list(self.counts),
            "seeds": list(self.seeds),
            "queries": list(self.queries),
            "losses": dict(zip(self.methods, self.losses.tolist(), strict=True)),
        }


def removal_masks(values: Tensor, counts: Sequence[int], queries: Sequence[int] | None = None) -> Tensor:
    """Subsets without the examples of the highest summed scores: bool [counts, train], false where one is left out.

    Args:
        values: scores [queries, train]; positive where training on the example lowers the query's loss.
        counts: how many examples to leave out; of equal sums, the first in the dataset.
        queries: positions of the queries to add up; None is all.

    Raises:
        InputError: a count or a query is out of range, or a score is not finite.
    """
    if values.ndim != 2 or values.numel() == 0:
        raise InputError(f"scores of shape {list(values.shape)}: expected finite numbers [queries, train].")
    chosen = _checked_queries(queries, len(values))
    _check_counts(counts, values.shape[1])
    sums = finite("scores", values)[list(chosen)].sum(0)
    return _without_first(sums.sort(descending=True, stable=True).indices, counts)


def counterfactual(
    study: Scorer[AnyMethod],
    queries: Dataset[object],
    methods: Sequence[AnyMethod | None],
    train: TrainFunction,
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    path: str | Path,
    chosen: Sequence[int] | None = None,
    **options: Unpack[RetrainOptions],
) -> Removal:
    """Score queries by each method, and retrain without its top examples, once with each seed.

    Args:
        queries: all those that `train` measures.
        methods: what `study.score` takes; None removes at random, as in `evaluate_removal`, and comes last.
        chosen: positions of the queries to add up and to look at; None is all.
        train, counts, seeds, path, options: as in `evaluate_removal`.

    Raises:
        WherefromError: what `study.score` and `evaluate_removal` raise.
    """
    scores = score_all(study, queries, [method for method in methods if method is not None])
    random = {"random": None} if None in methods else {}
    return evaluate_removal(path, train, {**scores, **random}, counts, seeds, queries=chosen, **options)


def evaluate_removal(
    path: str | Path,
    train: TrainFunction,
    scores: Mapping[str, Tensor | Scores | None],
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    queries: Sequence[int] | None = None,
    **options: Unpack[RetrainOptions],
) -> Removal:
    """`counterfactual` for scores that are there already.

    Args:
        path: the folder of the retrainings; those that `retrain` made there with this `train` are used.
        train: measures all queries, not only the chosen ones.
        scores: for each method its scores [queries, train], all about the same where they are `Scores`. None removes at
            random: a new choice for each seed, so that the spread over the seeds is also that of the choice; of one
            seed, larger removals contain smaller.
        counts: how many examples to leave out; 0 trains on all of them, once for each seed.
        seeds: one for each repeat, all different.
        queries: positions of the queries to add up and to look at; None is all.
        options: those of `RetrainOptions`. The fingerprint need not hold the scores.

    Raises:
        WherefromError: InputError where an argument does not fit, and what `retrain` raises.
    """
    given = matrices({name: each for name, each in scores.items() if each is not None})
    available, examples = _shared_shape(given)
    _check_counts(counts, examples)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)}: expected at least one seed, and none of them twice.")
    chosen = _checked_queries(queries, available)
    masks = torch.stack([_masks(given.get(name), counts, seeds, chosen, examples) for name in scores])
    pairs = list(enumerate(list(seeds) * (len(scores) * len(counts))))
    losses = retrain_pairs(path, train, masks.view(-1, examples), pairs, **options)
    if losses.shape[1] != available:
        raise InputError(
            f"train measures {losses.shape[1]} queries, but the scores have {available}: expected the same queries in "
            "the same order. Score the queries that it measures."
        )
    losses = losses.view(*masks.shape[:3], -1)[..., list(chosen)]
    return Removal(tuple(scores), tuple(counts), tuple(seeds), chosen, losses)


def _masks(
    values: Tensor | None, counts: Sequence[int], seeds: Sequence[int], queries: Sequence[int], examples: int
) -> Tensor:
    """One method's subsets: bool [counts, repeats, train]."""
    if values is not None:
        return removal_masks(values, counts, queries)[:, None].expand(-1, len(seeds), -1)
    orders = [permutation(examples, f"random removal/{seed}") for seed in seeds]
    return torch.stack([_without_first(order, counts) for order in orders], dim=1)


def _without_first(order: Tensor, counts: Sequence[int]) -> Tensor:
    """Subsets without the first examples of an order [train]: bool [counts, train]."""
    ranks = order.argsort()
    return torch.stack([ranks >= count for count in counts])


def _shared_shape(scores: Mapping[str, Tensor]) -> tuple[int, int]:
    shapes = {name: tuple(values.shape) for name, values in scores.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise InputError(
            f"scores of shapes {shapes or 'nothing'}: expected at least one method's scores [queries, train], and all "
            "of one shape. Score the same queries and training examples with every method."
        )
    queries, train = next(iter(shapes.values()))
    return queries, train


def _check_counts(counts: Sequence[int], train: int) -> None:
    if not counts or len(set(counts)) < len(counts) or not all(0 <= count < train for count in counts):
        raise InputError(
            f"counts={list(counts)}: expected different numbers from 0 to {train - 1}, one less than there are "
            "training examples."
        )


def _checked_queries(queries: Sequence[int] | None, available: int) -> tuple[int, ...]:
    chosen = tuple(range(available)) if queries is None else tuple(queries)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= query < available for query in chosen):
        raise InputError(f"queries={list(chosen)}: expected different positions from 0 to {available - 1}.")
    return chosen
