"""Whether the top training examples of a query share its label: a plausibility check, not a proof of influence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores


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
    """Compare the labels of each query and of its k top hits.

    Args:
        query_labels: one label for each row of the scores.
        train_labels: one label for each column.

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
    same = (query[:, None] == train[None, :]).double()  # [query, train]
    top = scores.values.topk(min(k, expected[1]), dim=1).indices
    shares = same.gather(1, top).mean(1)  # [query]
    error = float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else float("nan")
    return LabelAgreement(float(shares.mean()), error, float(same.mean()), top.shape[1])
