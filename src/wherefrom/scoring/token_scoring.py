"""Which sweeps token scores take: as scores of whole examples do, with parts of bounded size.

This module knows how scores are computed and what token scores are; it does not know where they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.engine.loading import Rows, collated
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.scoring import Scoring, training_loss
from wherefrom.scoring.tokens import PART_BYTES, TokenCollector, TokenParts, token_parts
from wherefrom.store.artifacts import Partial
from wherefrom.store.space import token_step
from wherefrom.tasks.task import Batch, Task


@dataclass(frozen=True)
class TokenScoring(Generic[Batch]):
    """Pairs of queries and training examples whose tokens are to be scored."""

    scoring: Scoring[Batch]

    def all_pairs(self, chosen: Tensor | None, parts: TokenParts) -> dict[str, Tensor]:
        """Token scores in parts of bounded size; what is returned tells where in them a pair is.

        Args:
            chosen: int64 [pairs, 2], (query, training position); None is every pair.
            parts: keeps the parts.

        Returns:
            `pairs` [pairs, 2] in the order of the parts, `shards` (how many pairs each part has), `lengths` (tokens of
            each training example).
        """
        lengths, longest = self.lengths, int(self.lengths.max())
        kept: list[Tensor] = []

        def work(rows: range) -> None:
            bank = cache(partial(self.scoring.bank, rows))  # not made when all of its parts are there
            mine: list[Tensor] = []
            for pairs in token_parts(
                rows, len(self.scoring.train), chosen, longest * self.scoring.sweep.dtype.itemsize
            ):
                parts.keep(pairs, partial(self._per_token, bank, rows.start, pairs, lengths))
                mine.append(pairs)
            kept.extend(mine)

        self.scoring.each_block(work)
        self.scoring.ranks.first(lambda: parts.remove_others(kept))
        sizes = torch.tensor([len(pairs) for pairs in kept])
        return {"pairs": torch.cat(kept), "shards": sizes, "lengths": lengths}

    def check_disk(self, folder: Path, top: int | None) -> None:
        """Refuse to begin what there is too little room for.

        Args:
            folder: holds nothing but what is begun of these token scores.
            top: how many of each query's highest and lowest scores are wanted; None is all.
        """
        scoring, train, longest = self.scoring, len(self.scoring.train), int(self.lengths.max())
        each = train if top is None else min(2 * top, train)
        queries, block = len(scoring.queries), scoring.plan.block
        pairs = [each * min(block, queries - start) for start in range(0, queries, block)]
        itemsize, ranks = scoring.sweep.dtype.itemsize, scoring.ranks.count
        scoring.check_disk(folder, token_step(pairs, longest, itemsize, PART_BYTES, train, ranks))

    @cached_property
    def lengths(self) -> Tensor:
        """How many tokens each training example has, int64 [train]."""
        return torch.tensor(self._train_lengths())

    def _per_token(
        self, bank: Callable[[], GradientBank], first: int, pairs: Tensor, lengths: Tensor, sums: Partial
    ) -> dict[str, Tensor]:
        """`values` [pairs, tokens of the longest example]: a sweep over the training examples among the pairs.

        Args:
            first: the query in the bank's first row.
        """
        examples, places = pairs[:, 1].unique(return_inverse=True)
        local, resident = torch.stack([pairs[:, 0] - first, places], 1), bank()
        place = (self.scoring.sweep.dtype, self.scoring.sweep.device)
        collector = TokenCollector(resident, local, lengths[examples], int(lengths.max()), *place)
        self.scoring.sweep_train(
            "token scores", Rows(self.scoring.train, examples.tolist()), collector, len(resident), sums
        )
        return collector.sums

    def _train_lengths(self) -> list[int]:
        """How many tokens each training example has: as long as its mask or, without one, as many as layers see."""
        task, examples = self.scoring.sweep.task, len(self.scoring.train)
        if type(task).mask is Task.mask:  # never pads: all examples are alike
            return [self._seen_tokens(0)] * examples
        masks = (
            task.mask(collated(task, self.scoring.train, [row], self.scoring.sweep.model)[0]) for row in range(examples)
        )
        return [self._seen_tokens(row) if mask is None else mask.shape[1] for row, mask in enumerate(masks)]

    def _seen_tokens(self, row: int) -> int:
        """How many vectors of one example the layers see in a call; the most of any layer."""
        seen: list[int] = []

        def receive(layer: str, captured: Captured) -> None:
            seen.append(captured.activations.shape[1] // max(captured.calls, 1))

        self.scoring.sweep.probe(self.scoring.train, row, training_loss(self.scoring.sweep.task), receive)
        return max(seen)
