"""Chosen scores, with whole query gradients: the highest of approximate ones once more, or those of given candidates.

This module knows how scores are computed; it does not know what results are called.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError, first_line
from wherefrom.runtime.precision import type_name
from wherefrom.scoring.scoring import Resident, Scoring
from wherefrom.store.artifacts import stored_matrices
from wherefrom.store.cache import Blocks, Cache, Unfinished
from wherefrom.tasks.task import Batch

logger = logging.getLogger("wherefrom")


def rescored(scoring: Scoring[Batch], result: Unfinished) -> dict[str, Tensor]:
    """The tensors of `Scores`, each query's highest with whole query gradients, and by how much these have changed."""
    beside = scoring.pairwise(result)
    before = result.parts.get_or_compute(
        "highest", lambda _: result.ranks.first(lambda: _highest(result, scoring.approximation.rescore))
    )
    # Read once: the matrix changes below, also when it was killed in the middle of that.
    positions, values = before["positions"].clone(), before["values"].clone()
    exact = exact_scores(scoring, positions, result.parts.parts("whole"))["values"]

    def better(queries: range, columns: range, there: Tensor) -> Tensor:
        chosen = positions[queries.start : queries.stop] - columns.start
        inside = (chosen >= 0) & (chosen < len(columns))
        changed = there.clone()
        query = torch.arange(len(queries)).unsqueeze(1).expand_as(chosen)
        changed[query[inside], chosen[inside]] = exact[queries.start : queries.stop][inside]
        return changed

    Blocks(result.parts, len(scoring.queries), len(scoring.train), result).rewrite(better)
    changes = exact - values
    size = values.abs().mean()  # 0 where no query has a gradient
    moved = f"move by {changes.abs().mean() / size:.1%}" if size > 0 else "were all 0"
    if result.ranks.is_main:
        logger.info(f"At full rank, the {changes.shape[1]} highest scores {moved}.")
    return beside | {"changes": changes}


def _highest(result: Unfinished, count: int) -> dict[str, Tensor]:
    """Positions and values of each query's highest scores, [queries, count]."""
    found = stored_matrices(result.part)["values"]
    best = found.topk(min(count, found.shape[1]), dim=1)
    return {"positions": best.indices, "values": best.values}


def exact_scores(scoring: Scoring[Batch], positions: Tensor, parts: Cache) -> dict[str, Tensor]:
    """The scores of some training examples of each query, with whole query gradients.

    Args:
        positions: which, int64 [queries, chosen].
        parts: where blocks are stored.

    Returns:
        `values` [queries, chosen], and with a solver the accuracy of its solves, [queries] each.
    """
    accuracy: dict[str, list[Tensor]] = {}
    scores = torch.zeros(positions.shape, dtype=scoring.sweep.dtype)
    whole = replace(scoring, approximation=scoring.approximation.whole(), self_influence=False, groups={})
    blocks = Blocks(parts, len(scoring.queries), len(scoring.train))
    resident = Resident(whole, blocks)
    for queries in resident:
        with resident.attempt(queries):
            wanted, indices = positions[queries.start : queries.stop].unique(return_inverse=True)
            bank = cache(partial(whole.bank, queries))
            found = scores[queries.start : queries.stop]  # [block, chosen]
            for columns in whole.shards(queries, len(wanted)):
                train = wanted[columns.start : columns.stop].tolist()
                tensors = blocks.get_or_compute(queries, columns, partial(whole.block, bank, queries, train))
                inside = (indices >= columns.start) & (indices < columns.stop)
                local = (indices - columns.start).clamp(0, len(columns) - 1)
                found[inside] = tensors["values"].gather(1, local)[inside]
            for name, each in tensors.items():
                if name != "values":
                    accuracy.setdefault(name, []).append(each)
    return {"values": scores} | {name: torch.cat(parts) for name, parts in accuracy.items()}


def checked_positions(given: Tensor, queries: int, train: int) -> Tensor:
    """Training positions [queries, candidates] in ascending order.

    Raises:
        InputError: they are none, or of other queries.
    """
    expected = (
        f"expected a method, or training positions, whole numbers [{queries}, candidates], such as "
        "scores.values.topk(100).indices."
    )
    try:
        found = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"first: no tensor ({first_line(error)}); {expected}") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.dim() != 2 or len(found) != queries or not found.shape[1]:
        raise InputError(f"first: {type_name(found.dtype)} {list(found.shape)}; {expected}")
    found = found.long().sort(1).values
    if int(found.min()) < 0 or int(found.max()) >= train:
        raise InputError(
            f"first: positions from {int(found.min())} to {int(found.max())}; expected 0 to {train - 1}, "
            "those of the training examples."
        )
    if bool((found[:, 1:] == found[:, :-1]).any()):
        raise InputError("first: a query has a training position twice; expected each once.")
    return found
