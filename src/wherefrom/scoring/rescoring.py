"""Chosen scores, with whole query gradients: the highest of approximate ones once more, or those of given candidates.

This module knows how scores are computed; it does not know where they are kept.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from wherefrom.engine.loading import Rows
from wherefrom.runtime.errors import InputError, first_line
from wherefrom.runtime.precision import type_name
from wherefrom.scoring.scoring import Scoring
from wherefrom.store.cache import BlockStages
from wherefrom.store.fingerprint import tensors_digest
from wherefrom.tasks.task import Batch

logger = logging.getLogger("wherefrom")


def rescore(scoring: Scoring[Batch], values: Tensor | None, stages: BlockStages) -> Tensor:
    """Replace each query's highest scores by those of whole query gradients.

    Args:
        values: [queries, train], of low rank; changed. None in a process that does not write.
        stages: keeps blocks.

    Returns:
        By how much each has changed, [queries, rescored].
    """
    positions, before = scoring.ranks.first(lambda: _highest(values, scoring.options.rescore))
    # From low-rank scores that were found anew, others may be the highest: equal ones differ by rounding.
    folder = stages.stages.folder / tensors_digest({"positions": positions})[:16]
    again = replace(stages, stages=replace(stages.stages, folder=folder))
    better = exact_scores(scoring, positions, again)["values"]
    if values is not None:
        values.scatter_(1, positions, better)
    changes = better - before
    size = before.abs().mean()  # 0 where no query has a gradient
    moved = f"move by {changes.abs().mean() / size:.1%}" if size > 0 else "were all 0"
    logger.info(f"At full rank, the {changes.shape[1]} highest scores {moved}.")
    return changes


def exact_scores(scoring: Scoring[Batch], positions: Tensor, stages: BlockStages) -> dict[str, Tensor]:
    """The scores of some training examples of each query, with whole query gradients.

    Args:
        positions: which, int64 [queries, chosen].
        stages: keeps blocks.

    Returns:
        `values` [queries, chosen], and with a solver the `residuals` of its solves, [queries].
    """
    residuals: list[Tensor] = []
    scores = torch.zeros(positions.shape, dtype=scoring.sweep.dtype)
    exact = replace(scoring.options, query_rank=None, query_bits=None, rescore=0, self_influence=False)
    whole = replace(scoring, options=exact)

    def work(rows: range) -> None:
        wanted, places = positions[rows.start : rows.stop].unique(return_inverse=True)
        bank = cache(partial(whole.bank, rows))
        found = scores[rows.start : rows.stop]  # [rows, chosen]
        for columns in whole.shards(rows, len(wanted)):
            train = Rows(scoring.train, wanted[columns.start : columns.stop].tolist())
            tensors = stages.mapped(rows, columns, partial(whole.block, bank, rows, train))
            block = tensors["values"]
            inside = (places >= columns.start) & (places < columns.stop)
            found[inside] = block.gather(1, (places - columns.start).clamp(0, len(columns) - 1))[inside]
        if "residuals" in tensors:
            residuals.append(tensors["residuals"])

    whole.each_block(work, stages)
    return {"values": scores} | ({"residuals": torch.cat(residuals)} if residuals else {})


def checked_candidates(candidates: Tensor, queries: int, train: int) -> Tensor:
    """Training positions [queries, candidates] in ascending order.

    Raises:
        InputError: they are none, or of other queries.
    """
    expected = f"expected training positions, whole numbers [{queries}, candidates], such as scores.topk(100).indices."
    try:
        found = torch.as_tensor(candidates).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"candidates: no tensor ({first_line(error)}); {expected}") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.dim() != 2 or len(found) != queries or not found.shape[1]:
        raise InputError(f"candidates: {type_name(found.dtype)} {list(found.shape)}; {expected}")
    found = found.long().sort(1).values
    if int(found.min()) < 0 or int(found.max()) >= train:
        raise InputError(
            f"candidates: positions from {int(found.min())} to {int(found.max())}; expected 0 to {train - 1}, "
            "those of the training examples."
        )
    if bool((found[:, 1:] == found[:, :-1]).any()):
        raise InputError("candidates: a query has a training position twice; expected each once in a row.")
    return found


def _highest(values: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Positions and values of each query's highest scores, [queries, count]."""
    assert values is not None
    found = values.topk(min(count, values.shape[1]), dim=1)
    return found.indices, found.values
