"""Which sweeps a score takes: one over resident queries for their gradients, one over the training set against those.

This module brings collectors and sweeps together, as a plan says, and with fewer resident queries where that was too
optimistic; it does not know where results are kept or what they are reused for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from wherefrom.curvature.factors import Strategy
from wherefrom.curvature.gauss_newton import DampedGaussNewton
from wherefrom.curvature.operators import Preconditioner
from wherefrom.engine.loading import Rows
from wherefrom.engine.sweep import Collector, Objective, Sweep
from wherefrom.planning.job import Job
from wherefrom.planning.plan import Plan, plan_scores
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import MemoryLimitError
from wherefrom.runtime.memory import within_memory
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.options import Options
from wherefrom.scoring.results import PairwiseCollector, extremes, merged_extremes
from wherefrom.scoring.self_influence import SELF_INFLUENCE, SQUARED_NORM, SelfInfluenceCollector, Together
from wherefrom.store.artifacts import Partial
from wherefrom.store.cache import BlockStages
from wherefrom.store.files import scratch_matrix
from wherefrom.store.fingerprint import Dataset
from wherefrom.store.space import Blocks, Step, check_space, used_bytes
from wherefrom.tasks.task import Batch, Task

logger = logging.getLogger("wherefrom")

# When memory runs out, batches shrink to this part of their planned size before fewer query gradients are resident.
_SMALLEST_BATCH = 0.25


def make_plan(
    sweep: Sweep[Batch],
    strategy: Strategy,
    queries: Dataset[object],
    train: Dataset[object],
    options: Options,
    loaded: bool = True,
) -> Plan:
    """The plan of a score, from what a query and a training example take.

    Args:
        loaded: whether the factors are in memory already; otherwise memory is left for them.
    """
    dtype = torch.bfloat16 if options.half_precision else sweep.dtype
    job = Job(
        layers=sweep.layers,
        strategy=strategy,
        queries=len(queries),
        train=len(train),
        fit_train=len(train),
        query=sweep.footprint(queries, measurement(sweep.task)),
        example=sweep.footprint(train, training_loss(sweep.task)),
        dtype=dtype,
        usable=sweep.ranks.least(sweep.usable_memory()),
        device=sweep.device,
        query_rank=options.query_rank,
        query_bits=options.query_bits,
        query_batch=options.query_batch_size,
        train_batch=options.train_batch_size,
        offload_factors=sweep.offload_factors,
    )
    if not loaded and sweep.memory_budget is None:
        job = replace(job, usable=job.usable - job.factor_bytes)
    if options.solver is not None:
        job = replace(job, usable=job.usable // options.solver.held)
    plan = plan_scores(job)
    # Measured speeds differ between processes, and what all of them do together must not.
    choices = sweep.ranks.first(lambda: (plan.query_batch, plan.train_batch, plan.block, plan.form))
    query_batch, train_batch, block, form = choices
    # Each has a device of its own.
    return Plan(job, query_batch, train_batch, block, form if form.offloaded else replace(form, device=job.device))


@dataclass(frozen=True)
class Scoring(Generic[Batch]):
    """Queries to score against a training set.

    Attributes:
        strategy: of the factors behind the preconditioner.
        groups: of each layer whose part of a score is kept.
    """

    sweep: Sweep[Batch]
    strategy: Strategy
    preconditioner: Preconditioner
    queries: Dataset[object]
    train: Dataset[object]
    options: Options
    groups: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def plan(self) -> Plan:
        """Sizes and forms; made, and said in the log, when there is something to compute."""
        plan = make_plan(self.sweep, self.strategy, self.queries, self.train, self.options)
        # Scores of tokens are planned as those of their sequences were, but for the memory that happens to be free.
        choice = str(replace(plan, job=replace(plan.job, usable=0)))
        if self.ranks.writes and choice not in self.sweep.said:
            logger.info(str(plan))
            self.sweep.said.add(choice)
        return plan

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.sweep.ranks

    def pairwise(self, stages: BlockStages, folder: Path) -> dict[str, Tensor]:
        """The tensors of `Scores`, block by block: `values` [queries, train], and what was asked for beside it.

        Args:
            stages: keeps blocks.
            folder: where matrices lie while they are put together.
        """
        vectors, options = 3 * self.options.self_influence, self.options
        self.check_disk(folder, self._blocks().matrix_step(self.ranks.count, vectors, options.rescore))
        whole = _Assembled(folder, len(self.queries), len(self.train), self.ranks.writes)

        def work(rows: range) -> None:
            bank = cache(partial(self.bank, rows))  # not made when all of its blocks are there
            for columns in self.shards(rows, len(self.train)):
                train = Rows(self.train, columns)
                whole.put(rows, columns, stages.mapped(rows, columns, partial(self.block, bank, rows, train)))

        self.each_block(work, stages)
        if "query_errors" in whole.tensors and self.ranks.writes:
            errors = whole.tensors["query_errors"]
            rank, bits = self.options.query_rank, self.options.query_bits
            form = f"Rank {rank} leaves" if bits is None else f"{bits} bits leave"
            logger.info(
                f"{form} out {errors.mean():.2%} of a query gradient's norm on average, {errors.max():.2%} at most."
            )
        if self.options.self_influence:
            whole.tensors["preconditioned_norms"] = whole.tensors.pop(SQUARED_NORM).sqrt()
            whole.tensors["query_self_influence"] = self._query_self_influence()
        return whole.tensors

    def highest(self, stages: BlockStages, k: int) -> dict[str, Tensor]:
        """The tensors of `TopScores`: each block is reduced to its extremes before it is kept."""
        self.check_disk(stages.stages.folder, self._blocks().top_step(self.ranks.count, k))
        kept: list[dict[str, Tensor]] = []

        def reduced(bank: Callable[[], GradientBank], rows: range, columns: range, sums: Partial) -> dict[str, Tensor]:
            found = self.block(bank, rows, Rows(self.train, columns), sums)
            values = found.pop("values").cpu()
            return {**found, **extremes(values, torch.arange(columns.start, columns.stop), k)}

        def work(rows: range) -> None:
            bank = cache(partial(self.bank, rows))
            best: dict[str, Tensor] = {}
            for columns in self.shards(rows, len(self.train)):
                part = stages.mapped(rows, columns, partial(reduced, bank, rows, columns))
                best = {**part, **merged_extremes([best, part], k)} if best else part
            kept.append(best)

        self.each_block(work, stages)
        return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}

    def aggregated(self, stages: BlockStages) -> dict[str, Tensor]:
        """The tensors of `Scores` with one row for all queries, one column for all training examples, or both."""
        kept: list[dict[str, Tensor]] = []
        everything = range(len(self.train))
        self.check_disk(stages.stages.folder, self._blocks().summed_step(self.ranks.count))

        def work(rows: range) -> None:
            bank = cache(partial(self.bank, rows))
            kept.append(stages.mapped(rows, everything, partial(self.block, bank, rows, self.train)))

        if self.options.aggregate_queries:
            rows = range(len(self.queries))
            kept.append(stages.mapped(rows, everything, partial(self.block, self._summed_bank, rows, self.train)))
        else:
            self.each_block(work, stages)
        divisor = len(self.queries) if self.options.aggregate_queries == "mean" else 1
        divisor *= len(self.train) if self.options.aggregate_train == "mean" else 1
        joined = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
        return {name: each / divisor if each.dim() == 2 else each for name, each in joined.items()}

    def block(
        self, bank: Callable[[], GradientBank], rows: range, train: Dataset[object], sums: Partial
    ) -> dict[str, Tensor]:
        """A sweep over some training examples against resident queries."""
        sweep, resident = self.sweep, bank()
        summed = self.options.aggregate_train is not None
        with self.ranks.agreeing(), self._within_memory(len(rows)):
            collector: Collector = PairwiseCollector(
                resident, len(train), sweep.dtype, sweep.device, self.groups, summed=summed
            )
            if self.options.self_influence and not rows.start:  # once is enough
                collector = Together(collector, self._self_influence(train))
        self.sweep_train("pairwise scores", train, collector, len(resident), sums)
        of_queries = {"query_errors": resident.relative_errors(), "residuals": resident.residuals}
        return collector.sums | {name: each for name, each in of_queries.items() if each is not None}

    def _self_influence(self, examples: Dataset[object], training: bool = True) -> SelfInfluenceCollector:
        sweep, count = self.sweep, len(examples)
        return SelfInfluenceCollector(
            sweep.layers, self.preconditioner, count, sweep.dtype, sweep.device, training=training
        )

    def _query_self_influence(self) -> Tensor:
        """A sweep over queries for their scores with themselves."""
        collector, size = self._self_influence(self.queries, training=False), self.options.query_batch_size
        objective = measurement(self.sweep.task)
        self.sweep.run("query self-influence", self.queries, collector, objective, batch_size=size)
        return collector.sums[SELF_INFLUENCE]

    def train_self_influence(self, sums: Partial) -> dict[str, Tensor]:
        """A sweep over training examples for their scores with themselves."""
        collector, size = self._self_influence(self.train), self.options.train_batch_size
        objective = training_loss(self.sweep.task)
        self.sweep.run("self-influence", self.train, collector, objective, batch_size=size, partial=sums)
        return collector.sums

    def check_disk(self, folder: Path, step: Step) -> None:
        """Refuse to begin what there is too little room for, in a folder that holds nothing but what is begun of it."""
        self.ranks.first(lambda: check_space(folder, [step], used_bytes([folder])))

    def _blocks(self) -> Blocks:
        """How scores are cut, for what they take on the disk."""
        blocks = self.plan.blocks(self._matrices)
        if self.options.aggregate_queries:
            blocks = replace(blocks, queries=1, block=1, shard=blocks.train)
        return replace(blocks, train=1, shard=1) if self.options.aggregate_train else blocks

    @property
    def _matrices(self) -> int:
        """How many of one size a block has: the scores, and the part of each group of layers."""
        return 1 + len(set(self.groups.values()))

    def shards(self, rows: range, train: int) -> list[range]:
        """The planned parts of a training set; a batch for every process at least."""
        return self.plan.shards(len(rows) * self._matrices, train, self.ranks.count * self.plan.train_batch)

    def each_block(self, work: Callable[[range], None], stages: BlockStages | None = None) -> None:
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
        # Of several processes, one by itself must not go on with fewer while the others are further: there, only what
        # they have agreed on is a MemoryLimitError.
        alone = self.ranks.count == 1
        try:
            with self._within_memory(len(rows)) if alone else nullcontext():
                work(rows)
        except MemoryLimitError as error:
            # Of processes that share a model's weights, the others may be in the middle of a pass.
            if len(rows) == 1 or self.sweep.lockstep:
                raise
            logger.warning(f"{error} Going on with {len(rows) // 2} resident query gradients instead of {len(rows)}.")
            return False
        return True

    def _within_memory(self, queries: int) -> AbstractContextManager[None]:
        """Turn a failed allocation into the error of our own that means fewer resident queries."""
        advice = "Give query_bits=8 or a query_rank, track fewer layers, or use a device with more memory."
        return within_memory(f"Gradients of {queries} queries, and what is made of them, do", self.sweep.device, advice)

    def bank(self, rows: range) -> GradientBank:
        """The preconditioned gradients of some queries: a sweep over them, and what a solver makes of those."""
        system = self._system()
        with self.ranks.agreeing(), self._within_memory(len(rows)):
            # A solver preconditions by itself.
            preconditioner = Preconditioner({}, {}, self.preconditioner.flat) if system else self.preconditioner
            bank = GradientBank(self.sweep.layers, preconditioner, len(rows), self.plan.form)
        batch, smallest = self._batch(self.plan.query_batch, len(rows))
        queries = Rows(self.queries, rows)
        self.sweep.run(
            "query gradients", queries, bank, measurement(self.sweep.task), batch_size=batch, smallest_batch=smallest
        )
        if system is not None:
            with self._within_memory(len(rows)):
                self._solve(system, bank)
        return bank

    def _system(self) -> DampedGaussNewton[Batch] | None:
        """What a solver solves; None without one."""
        if self.options.solver is None:
            return None
        return DampedGaussNewton(
            self.sweep, self.preconditioner, self.train, self.options.damping, self.plan.train_batch
        )

    def _solve(self, system: DampedGaussNewton[Batch], bank: GradientBank) -> None:
        """Replace the gradients in a bank by what the solver makes of them."""
        assert self.options.solver is not None
        gradients = system.space.join(bank.sums).to(self.sweep.device)
        solution = self.options.solver.solve(system, gradients)
        for name, matrices in system.space.split(solution.vectors).items():
            bank.sums[name][..., : matrices.shape[2]] = matrices
        bank.residuals = last = solution.final
        if self.ranks.writes:
            logger.info(
                f"{self.options.solver}: after {len(solution.residuals) - 1} iterations, the relative residual is "
                f"{last.median():.2g} in the median of {len(last)} queries, {last.max():.2g} at most."
            )

    def _summed_bank(self) -> GradientBank:
        """One gradient, the sum of all queries' preconditioned gradients."""
        total: list[GradientBank] = []

        def work(rows: range) -> None:
            total[:] = [self.bank(rows).summed(*total)]

        self.each_block(work)
        return total[0]

    def sweep_train(
        self, name: str, dataset: Dataset[object], collector: Collector, queries: int, sums: Partial
    ) -> None:
        """A sweep over training examples while the gradients of some queries are resident."""
        batch, smallest = self._batch(self.plan.train_batch, queries)
        self.sweep.run(
            name,
            dataset,
            collector,
            training_loss(self.sweep.task),
            batch_size=batch,
            smallest_batch=smallest,
            partial=sums,
        )

    @staticmethod
    def _batch(planned: int, queries: int) -> tuple[int, int]:
        """The batch size to start with and the smallest to go on with while fewer queries could be resident instead."""
        return planned, 1 if queries == 1 else max(1, int(_SMALLEST_BATCH * planned))


class _Assembled:
    """Tensors of scores that are put together block by block; matrices lie in files, which one process writes."""

    def __init__(self, folder: Path, queries: int, train: int, writes: bool) -> None:
        self._folder, self._queries, self._train, self._writes = folder, queries, train, writes
        self.tensors: dict[str, Tensor] = {}

    def put(self, rows: range, columns: range, block: Mapping[str, Tensor]) -> None:
        """Put a block in its place: matrices, and vectors with a number for each query or training example."""
        for name, part in block.items():
            if part.dim() == 1:
                of_queries = name in ("query_errors", "residuals")
                size, place = (self._queries, rows) if of_queries else (self._train, columns)
                whole = self.tensors.setdefault(name, part.new_zeros(size))
                whole[place.start : place.stop] = part
            elif self._writes:
                self._matrix(name, part.dtype)[rows.start : rows.stop, columns.start : columns.stop] = part

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self.tensors:
            file = self._folder / f"matrix{len(self.tensors)}"
            self.tensors[name] = scratch_matrix(file, self._queries, self._train, dtype)
        return self.tensors[name]


def training_loss(task: Task[Batch]) -> Objective[Batch]:
    """What a sweep over training examples passes back through the model."""
    return lambda model, batch, rows: task.train_loss(model, batch)


def measurement(task: Task[Batch]) -> Objective[Batch]:
    """What a sweep over queries passes back through the model."""
    return lambda model, batch, rows: task.measurement(model, batch)
