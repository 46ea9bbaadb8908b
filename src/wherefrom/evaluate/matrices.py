"""Scores by method as matrices that may be held side by side: from a study, of the same pairs, and finite.

This module must not know what the matrices are compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores
from wherefrom.store.fingerprint import QUERIES, TRAIN, Dataset, check_about, subjects

AnyMethod = TypeVar("AnyMethod")
AnyMethod_contra = TypeVar("AnyMethod_contra", contravariant=True)


class Scorer(Protocol[AnyMethod_contra]):
    """What is needed of a `Study`."""

    def score(self, queries: Dataset[object], method: AnyMethod_contra, /) -> Scores:
        """The scores of all pairs of a query and a training example."""


def score_all(study: Scorer[AnyMethod], queries: Dataset[object], methods: Sequence[AnyMethod]) -> dict[str, Scores]:
    """Each method's scores, by what the method is called; of methods of one name the later ones are numbered."""
    found: dict[str, Scores] = {}
    names: Counter[str] = Counter()
    for method in methods:
        names[str(method)] += 1
        count = names[str(method)]
        found[f"{method} ({count})" if count > 1 else str(method)] = study.score(queries, method)
    return found


def matrices(scores: Mapping[str, Tensor | Scores]) -> dict[str, Tensor]:
    """The values of scores by method; what is given as a bare matrix cannot be checked.

    Raises:
        MismatchError: some are about other queries or training examples than others.
    """
    about: dict[str, str] = {}
    for name, each in scores.items():
        if isinstance(each, Scores):
            found = {kind: digest for kind, digest in subjects(each.fingerprint).items() if kind in (QUERIES, TRAIN)}
            check_about(each.fingerprint, about, f"Give scores of the same to hold them side by side with {name!r}.")
            about |= found
    return {name: each.values if isinstance(each, Scores) else each for name, each in scores.items()}


def finite(name: str, values: Tensor) -> Tensor:
    """Scores [queries, train] in float64 on the CPU.

    Raises:
        InputError: one is not finite; it is named.
    """
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        query, example = (~values.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"{name}[{query}, {example}] is {values[query, example].item()}; expected finite scores. Half precision "
            "overflows in float16: use bfloat16."
        )
    return values
