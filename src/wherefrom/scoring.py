"""Which sweeps a score takes: one over resident queries for their gradients, one over the training set against those.

This module brings collectors and sweeps together; it does not know where results are kept or what they are reused for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Generic, Protocol

import torch
from torch import Tensor, nn

from wherefrom.capture import Captured
from wherefrom.curvature import Preconditioner
from wherefrom.fingerprint import Dataset
from wherefrom.gradients import BankForm, GradientBank
from wherefrom.memory import total_memory
from wherefrom.scores import PairwiseCollector
from wherefrom.store import Partial
from wherefrom.sweep import Sweep
from wherefrom.task import Batch, Task
from wherefrom.tokens import TokenCollector, token_parts

# The part of the memory that resident query gradients may take.
_BANK_SHARE = 0.4


Compute = Callable[[Partial], dict[str, Tensor]]
"""Computes what is kept; the argument may hold sums of an interrupted sweep."""


class TokenStage(Protocol):
    """Computes and keeps part `number` of token scores, those of `pairs`, unless it is there."""

    def __call__(self, number: int, pairs: Tensor, compute: Compute) -> None: ...


@dataclass(frozen=True)
class Scoring(Generic[Batch]):
    """Queries to score against a training set.

    Attributes:
        dtype: of the resident query gradients.
        query_batch_size, train_batch_size: None finds them.
    """

    sweep: Sweep[Batch]
    preconditioner: Preconditioner
    queries: Dataset[object]
    train: Dataset[object]
    dtype: torch.dtype
    query_batch_size: int | None
    train_batch_size: int | None

    def blocks(self) -> list[range]:
        """Runs of queries whose gradients fit into memory together.

        The total memory decides, not what is free, so that a resumed run cuts the same blocks.
        """
        each = self._form().bytes_per_query(self.sweep.layers)
        block = max(1, int(_BANK_SHARE * total_memory(self.sweep.device) / each))
        return [range(start, min(start + block, len(self.queries))) for start in range(0, len(self.queries), block)]

    def _form(self) -> BankForm:
        return BankForm(self.dtype, self.sweep.device, rotated_back={n: (False, False) for n in self.sweep.layers})

    def bank(self, block: range) -> GradientBank:
        """The preconditioned gradients of a block of queries: a sweep over them."""
        sweep = self.sweep
        bank = GradientBank(sweep.layers, self.preconditioner, len(block), self._form())
        rows = _Rows(self.queries, block)
        sweep.run("query gradients", rows, bank, self._measurement, batch_size=self.query_batch_size)
        return bank

    def pairwise(self, block: range, sums: Partial) -> dict[str, Tensor]:
        """`values` [block, train]: a sweep over the training set."""
        sweep, bank = self.sweep, self.bank(block)
        collector = PairwiseCollector(bank, len(block), len(self.train), sweep.dtype, sweep.device)
        self._sweep_train("pairwise scores", self.train, collector, sums)
        return collector.sums

    def all_per_token(self, chosen: Tensor | None, stage: TokenStage) -> dict[str, Tensor]:
        """Token scores in parts of bounded size; what is returned tells where in them a pair is.

        Args:
            chosen: int64 [pairs, 2], (query, training position); None is every pair.
            stage: computes and keeps a part, unless it is there.

        Returns:
            `pairs` [pairs, 2] in the order of the parts, `shards` (how many pairs each part has), `lengths` (tokens of
            each training example).
        """
        lengths = torch.tensor(self._train_lengths())
        longest = int(lengths.max())
        parts: list[Tensor] = []
        for block in self.blocks():
            bank = cache(partial(self.bank, block))  # not made when all of its parts are there
            for pairs in token_parts(block, len(self.train), chosen, longest * self.sweep.dtype.itemsize):
                stage(len(parts), pairs, partial(self._per_token, bank, block.start, pairs, lengths))
                parts.append(pairs)
        sizes = torch.tensor([len(pairs) for pairs in parts])
        return {"pairs": torch.cat(parts), "shards": sizes, "lengths": lengths}

    def _per_token(
        self, bank: Callable[[], GradientBank], first: int, pairs: Tensor, lengths: Tensor, sums: Partial
    ) -> dict[str, Tensor]:
        """`values` [pairs, tokens of the longest example]: a sweep over the training examples among the pairs.

        Args:
            first: the query in the bank's first row.
        """
        examples, places = pairs[:, 1].unique(return_inverse=True)
        local = torch.stack([pairs[:, 0] - first, places], 1)
        place = (self.sweep.dtype, self.sweep.device)
        collector = TokenCollector(bank(), local, lengths[examples], int(lengths.max()), *place)
        self._sweep_train("token scores", _Rows(self.train, examples.tolist()), collector, sums)
        return collector.sums

    def _train_lengths(self) -> list[int]:
        """How many tokens each training example has: as long as its mask or, without one, as many as layers see."""
        task, examples = self.sweep.task, len(self.train)
        if type(task).mask is Task.mask:  # never pads: all examples are alike
            return [self._seen_tokens(0)] * examples
        masks = (task.mask(task.collate([self.train[row]])) for row in range(examples))
        return [self._seen_tokens(row) if mask is None else mask.shape[1] for row, mask in enumerate(masks)]

    def _seen_tokens(self, row: int) -> int:
        """How many vectors of one example the layers see in a call; the most of any layer."""
        seen: list[int] = []

        def receive(layer: str, captured: Captured) -> None:
            seen.append(captured.activations.shape[1] // max(captured.calls, 1))

        self.sweep.probe(self.train, row, self._loss, receive)
        return max(seen)

    def _sweep_train(
        self, name: str, dataset: Dataset[object], collector: PairwiseCollector | TokenCollector, sums: Partial
    ) -> None:
        self.sweep.run(name, dataset, collector, self._loss, batch_size=self.train_batch_size, partial=sums)

    def _loss(self, model: nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
        return self.sweep.task.train_loss(model, batch)

    def _measurement(self, model: nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
        return self.sweep.task.measurement(model, batch)


@dataclass(frozen=True)
class _Rows:
    """Some examples of a dataset, in a given order."""

    dataset: Dataset[object]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, row: int, /) -> object:
        return self.dataset[self.positions[row]]
