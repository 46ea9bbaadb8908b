"""Which sweeps token scores take: as scores of whole examples do, with parts of bounded size.

This module knows how scores are computed and what token scores are; it does not know what results are called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Generic

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.engine.loading import Examples, collated
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.keep import Tokens
from wherefrom.scoring.scoring import Resident, Scoring
from wherefrom.scoring.tokens import (
    PART_BYTES,
    TokenCollector,
    extreme_pairs,
    remove_other_parts,
    token_part,
    token_parts,
)
from wherefrom.store.cache import Unfinished
from wherefrom.store.space import token_step
from wherefrom.tasks.task import Batch, Task


@dataclass(frozen=True)
class TokenScoring(Generic[Batch]):
    """Pairs of queries and training examples whose tokens are to be scored.

    Attributes:
        keep: which pairs are wanted.
        sequence_scores: gives the scores [queries, train] that the highest and lowest are found by.
    """

    scoring: Scoring[Batch]
    keep: Tokens
    sequence_scores: Callable[[], Tensor]

    def all_pairs(self, result: Unfinished) -> dict[str, Tensor]:
        """Token scores in parts of bounded size; what is returned tells where in them a pair is.

        Returns:
            `pairs` [pairs, 2] in the order of the parts, `shards` (how many pairs each part has), `lengths` (tokens of
            each training example).
        """
        self._check_disk(result)
        scoring, lengths, longest = self.scoring, self.lengths, int(self.lengths.max())
        chosen = self._chosen() if self.keep.pairs or self.keep.top is not None else None
        parts: list[Tensor] = []
        resident = Resident(scoring)
        for queries in resident:
            with resident.attempt(queries):
                bank = cache(partial(scoring.bank, queries))  # not made when all of its parts are there
                mine: list[Tensor] = []
                each_takes = longest * scoring.sweep.dtype.itemsize
                for pairs in token_parts(queries, len(scoring.train), chosen, each_takes):
                    token_part(result.cache, pairs, partial(self._per_token, bank, queries.start, pairs, lengths))
                    mine.append(pairs)
                parts.extend(mine)
        scoring.ranks.first(lambda: remove_other_parts(result.cache.folder, parts))
        sizes = torch.tensor([len(pairs) for pairs in parts])
        return {"pairs": torch.cat(parts), "shards": sizes, "lengths": lengths}

    def _chosen(self) -> Tensor:
        """The pairs that are wanted, int64 [pairs, 2], where these are not all."""
        if not self.keep.pairs:
            assert self.keep.top is not None
            return extreme_pairs(self.sequence_scores(), self.keep.top)
        found, sizes = torch.tensor(self.keep.pairs), (len(self.scoring.queries), len(self.scoring.train))
        if bool((found < 0).any()) or bool((found >= torch.tensor(sizes)).any()):
            raise InputError(
                f"pairs={self.keep.pairs}: expected positions below {sizes[0]} queries and {sizes[1]} examples."
            )
        chosen: Tensor = found.unique(dim=0)
        return chosen

    def _check_disk(self, result: Unfinished) -> None:
        """Refuse to begin what there is too little disk space for."""
        scoring, train, longest = self.scoring, len(self.scoring.train), int(self.lengths.max())
        each = train if self.keep.top is None else min(2 * self.keep.top, train)
        each = len(self.keep.pairs) or each
        queries, block = len(scoring.queries), scoring.plan.block
        pairs = [each * min(block, queries - start) for start in range(0, queries, block)]
        itemsize, ranks = scoring.sweep.dtype.itemsize, scoring.ranks.count
        scoring.check_disk([result.cache.folder], token_step(pairs, longest, itemsize, PART_BYTES, train, ranks))

    @cached_property
    def lengths(self) -> Tensor:
        """How many tokens each training example has, int64 [train]."""
        return token_lengths(self.scoring.sweep, self.scoring.train, {example for _, example in self.keep.pairs})

    def _per_token(
        self, bank: Callable[[], GradientBank], first: int, pairs: Tensor, lengths: Tensor, part: Unfinished
    ) -> dict[str, Tensor]:
        """`values` [pairs, tokens of the longest example]: a sweep over the training examples among the pairs.

        Args:
            first: the first query of the bank.
        """
        scoring = self.scoring
        examples, indices = pairs[:, 1].unique(return_inverse=True)
        local, resident = torch.stack([pairs[:, 0] - first, indices], 1), bank()
        target = (scoring.sweep.dtype, scoring.sweep.device)
        collector = TokenCollector(resident, local, lengths[examples], int(lengths.max()), *target)
        batch, smallest = scoring.train_batch(len(resident))
        chosen = scoring.train.subset(examples.tolist())
        scoring.sweep.run(
            "token scores", chosen, collector, batch_size=batch, smallest_batch=smallest, partial=part.sums
        )
        return collector.sums


def token_lengths(sweep: Sweep[Batch], examples: Examples[Batch], chosen: Collection[int] = ()) -> Tensor:
    """How many tokens each example has, int64 [examples]: as its mask or, without one, as many as layers see.

    Args:
        chosen: positions of those that are wanted, where these are not all; others have 0.
    """
    if type(examples.task).mask is Task.mask:  # never pads: all examples are alike
        return torch.full((len(examples),), _seen_tokens(sweep, examples, 0))
    found = torch.zeros(len(examples), dtype=torch.int64)
    for index in chosen or range(len(examples)):
        mask = examples.task.mask(collated(examples, [index], sweep.model)[0])
        found[index] = _seen_tokens(sweep, examples, index) if mask is None else mask.shape[1]
    return found


def _seen_tokens(sweep: Sweep[Batch], examples: Examples[Batch], index: int) -> int:
    """How many vectors of one example the layers see in a call; the most of any layer."""
    seen: list[int] = []

    def receive(layer: str, captured: Captured) -> None:
        own = captured.activations.shape[1] // max(captured.calls, 1)
        seen.append(own if captured.positions is None else captured.positions.length)

    sweep.probe(examples.subset([index]), receive)
    return max(seen)
