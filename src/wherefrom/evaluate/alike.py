"""Scores side by side: as matrices, once it is clear that all are about the same queries and training examples."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wherefrom.store.artifacts.about import QUERIES, TRAIN, check_about, subjects
from wherefrom.scoring.scoring.results import Scores


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
