"""Which sweeps a score takes: one over resident queries for their gradients, one over the training set against those.

This module brings collectors and sweeps together, as a plan says, and with fewer resident queries where that was too
optimistic; it does not know where results are kept or what they are reused for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from wherefrom.capture import Captured
from wherefrom.curvature import Preconditioner, Strategy
from wherefrom.errors import MemoryLimitError
from wherefrom.fingerprint import Dataset
from wherefrom.gradients import GradientBank
from wherefrom.memory import out_of_memory
from wherefrom.plan import Job, Plan, Wanted, factor_bytes, plan_scores
from wherefrom.ranks import Ranks
from wherefrom.scores import PairwiseCollector
from wherefrom.stages import BlockStages
from wherefrom.store import Partial, scratch_matrix
from wherefrom.sweep import Objective, Sweep
from wherefrom.task import Batch, Task
from wherefrom.tokens import TokenCollector, TokenParts, token_parts

logger = logging.getLogger("wherefrom")

# When memory runs out, batches shrink to this part of their planned size before fewer query gradients are resident.
_SMALLEST_BATCH = 0.25


def make_plan(
    sweep: Sweep[Batch],
    strategy: Strategy,
    queries: Dataset[object],
    train: Dataset[object],
    wanted: Wanted,
    loaded: bool = True,
) -> Plan:
    """The plan of a score, from what a query and a training example take.

    Args:
        loaded: whether the factors are in memory already; otherwise room is left for them.
    """
    usable = sweep.usable_memory()
    if not loaded and sweep.memory_budget is None:
        usable -= factor_bytes(sweep.layers, strategy, wanted.dtype)
    usable = sweep.ranks.least(usable)
    job = Job(
        layers=sweep.layers,
        strategy=strategy,
        queries=len(queries),
        train=len(train),
        query=sweep.footprint(queries, _measurement(sweep.task)),
        example=sweep.footprint(train, _loss(sweep.task)),
        wanted=wanted,
        usable=usable,
        device=sweep.device,
    )
    plan = plan_scores(job)
    # Measured speeds differ between processes, and what all of them do together must not.
    choices = sweep.ranks.first(lambda: (plan.query_batch, plan.train_batch, plan.block, plan.form))
    return Plan(job, *choices)


@dataclass(frozen=True)
class Scoring(Generic[Batch]):
    """Queries to score against a training set.

    Attributes:
        strategy: of the factors behind the preconditioner.
    """

    sweep: Sweep[Batch]
    strategy: Strategy
    preconditioner: Preconditioner
    queries: Dataset[object]
    train: Dataset[object]
    wanted: Wanted

    @cached_property
    def plan(self) -> Plan:
        """Sizes and forms; made, and said in the log, when there is something to compute."""
        plan = make_plan(self.sweep, self.strategy, self.queries, self.train, self.wanted)
        if self._ranks.writes:
            logger.info(str(plan))
        return plan

    def pairwise(self, stages: BlockStages, file: Path) -> dict[str, Tensor]:
        """`values` [queries, train] in a file, block by block; `query_errors` [queries] of a low rank.

        Args:
            stages: keeps blocks.
            file: where the values lie while they are put together.
        """
        values = torch.empty(0)
        if self._ranks.writes:
            values = scratch_matrix(file, len(self.queries), len(self.train), self.sweep.dtype)
        errors = torch.zeros(len(self.queries))

        def work(rows: range) -> None:
            bank = cache(partial(self._bank, rows))  # not made when all of its blocks are there
            for columns in self._shards(rows, len(self.train)):
                found = stages.mapped(rows, columns, partial(self._pairwise_block, bank, _Rows(self.train, columns)))
                if self._ranks.writes:
                    values[rows.start : rows.stop, columns.start : columns.stop] = found["values"]
                if self.wanted.rank is not None:
                    errors[rows.start : rows.stop] = found["query_errors"]

        self._each_block(work, stages)
        if self.wanted.rank is None:
            return {"values": values}
        logger.info(
            f"Rank {self.wanted.rank} leaves out {errors.mean():.1%} of a query gradient's norm on average, "
            f"{errors.max():.1%} at most."
        )
        return {"values": values, "query_errors": errors}

    @property
    def _ranks(self) -> Ranks:
        return self.sweep.ranks

    def _shards(self, rows: range, train: int) -> list[range]:
        """The planned parts of a training set; a batch for every process at least."""
        return self.plan.shards(len(rows), train, self._ranks.count * self.plan.train_batch)

    def _pairwise_block(self, bank: Callable[[], GradientBank], train: _Rows, sums: Partial) -> dict[str, Tensor]:
        """A sweep over some training examples."""
        sweep, resident = self.sweep, bank()
        collector = PairwiseCollector(resident, len(train), sweep.dtype, sweep.device)
        self._sweep_train("pairwise scores", train, collector, len(resident), sums)
        errors = resident.relative_errors()
        return collector.sums if errors is None else {**collector.sums, "query_errors": errors}

    def rescore(self, values: Tensor, top: int, stages: BlockStages) -> Tensor:
        """Replace each query's highest scores by those of whole query gradients.

        Args:
            values: [queries, train], of low rank; changed. Only the process that writes has them.
            top: how many of each query.

        Returns:
            By how much each has changed, [queries, top].
        """
        positions, before = self._ranks.first(lambda: _highest(values, top))
        changes = torch.zeros_like(before)
        whole = replace(self, wanted=replace(self.wanted, rank=None))

        def work(rows: range) -> None:
            wanted, places = positions[rows.start : rows.stop].unique(return_inverse=True)
            bank = cache(partial(whole._bank, rows))
            better = before[rows.start : rows.stop].clone()  # [rows, top]
            for columns in whole._shards(rows, len(wanted)):
                train = _Rows(self.train, wanted[columns.start : columns.stop].tolist())
                found = stages.mapped(rows, columns, partial(whole._pairwise_block, bank, train))["values"]
                inside = (places >= columns.start) & (places < columns.stop)
                better[inside] = found.gather(1, (places - columns.start).clamp(0, len(columns) - 1))[inside]
            changes[rows.start : rows.stop] = better - before[rows.start : rows.stop]
            if self._ranks.writes:
                values[rows.start : rows.stop].scatter_(1, positions[rows.start : rows.stop], better)

        whole._each_block(work, stages)
        share = changes.abs().mean() / before.abs().mean()
        logger.info(f"At full rank, the {changes.shape[1]} highest scores move by {share:.1%}.")
        return changes

    def all_per_token(self, chosen: Tensor | None, parts: TokenParts) -> dict[str, Tensor]:
        """Token scores in parts of bounded size; what is returned tells where in them a pair is.

        Args:
            chosen: int64 [pairs, 2], (query, training position); None is every pair.
            parts: keeps the parts.

        Returns:
            `pairs` [pairs, 2] in the order of the parts, `shards` (how many pairs each part has), `lengths` (tokens of
            each training example).
        """
        lengths = torch.tensor(self._train_lengths())
        longest = int(lengths.max())
        kept: list[Tensor] = []

        def work(rows: range) -> None:
            bank = cache(partial(self._bank, rows))  # not made when all of its parts are there
            mine: list[Tensor] = []
            for pairs in token_parts(rows, len(self.train), chosen, longest * self.sweep.dtype.itemsize):
                parts.keep(pairs, partial(self._per_token, bank, rows.start, pairs, lengths))
                mine.append(pairs)
            kept.extend(mine)

        self._each_block(work)
        self._ranks.first(lambda: parts.remove_others(kept))
        sizes = torch.tensor([len(pairs) for pairs in kept])
        return {"pairs": torch.cat(kept), "shards": sizes, "lengths": lengths}

    def _per_token(
        self, bank: Callable[[], GradientBank], first: int, pairs: Tensor, lengths: Tensor, sums: Partial
    ) -> dict[str, Tensor]:
        """`values` [pairs, tokens of the longest example]: a sweep over the training examples among the pairs.

        Args:
            first: the query in the bank's first row.
        """
        examples, places = pairs[:, 1].unique(return_inverse=True)
        local, resident = torch.stack([pairs[:, 0] - first, places], 1), bank()
        place = (self.sweep.dtype, self.sweep.device)
        collector = TokenCollector(resident, local, lengths[examples], int(lengths.max()), *place)
        self._sweep_train("token scores", _Rows(self.train, examples.tolist()), collector, len(resident), sums)
        return collector.sums

    def _each_block(self, work: Callable[[range], None], stages: BlockStages | None = None) -> None:
        """Work on runs of queries whose gradients are resident together: as planned, and fewer when memory runs out."""
        start, size = 0, self.plan.block
        while start < len(self.queries):
            rows = range(start, min(start + size, len(self.queries)))
            if stages:
                rows = stages.begun(rows)
            if self._fits(work, rows):
                start = rows.stop
                continue
            size = len(rows) // 2
            if stages:
                stages.discard(rows)

    def _fits(self, work: Callable[[range], None], rows: range) -> bool:
        """Work on some queries; False when their gradients leave too little memory for the rest."""
        try:
            work(rows)
        except MemoryLimitError as error:
            if len(rows) == 1:
                raise
            logger.warning(f"{error} Going on with {len(rows) // 2} resident query gradients instead of {len(rows)}.")
            return False
        return True

    def _bank(self, rows: range) -> GradientBank:
        """The preconditioned gradients of some queries: a sweep over them."""
        with self._ranks.agreeing():
            try:
                bank = GradientBank(self.sweep.layers, self.preconditioner, len(rows), self.plan.form)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise MemoryLimitError(
                    f"Gradients of {len(rows)} queries do not fit into memory. Give a query_rank, or fewer layers."
                ) from error
        batch, smallest = self._batch(self.plan.query_batch, len(rows))
        queries = _Rows(self.queries, rows)
        self.sweep.run(
            "query gradients", queries, bank, _measurement(self.sweep.task), batch_size=batch, smallest_batch=smallest
        )
        return bank

    def _sweep_train(
        self,
        name: str,
        dataset: Dataset[object],
        collector: PairwiseCollector | TokenCollector,
        queries: int,
        sums: Partial,
    ) -> None:
        batch, smallest = self._batch(self.plan.train_batch, queries)
        self.sweep.run(
            name, dataset, collector, _loss(self.sweep.task), batch_size=batch, smallest_batch=smallest, partial=sums
        )

    @staticmethod
    def _batch(planned: int, queries: int) -> tuple[int, int]:
        """The batch size to start with and the smallest to go on with while fewer queries could be resident instead."""
        return planned, 1 if queries == 1 else max(1, int(_SMALLEST_BATCH * planned))

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

        self.sweep.probe(self.train, row, _loss(self.sweep.task), receive)
        return max(seen)


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions and values of each query's highest scores, [queries, count]."""
    found = values.topk(min(count, values.shape[1]), dim=1)
    return found.indices, found.values


def _loss(task: Task[Batch]) -> Objective[Batch]:
    return lambda model, batch, rows: task.train_loss(model, batch)


def _measurement(task: Task[Batch]) -> Objective[Batch]:
    return lambda model, batch, rows: task.measurement(model, batch)


@dataclass(frozen=True)
class _Rows:
    """Some examples of a dataset, in a given order."""

    dataset: Dataset[object]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, row: int, /) -> object:
        return self.dataset[self.positions[row]]
