"""Which sweeps a score takes: one over resident queries for their gradients, one over the training set against those.

This module brings collectors and sweeps together, as a plan says, and with fewer resident queries where that was too
optimistic; it does not know which methods there are, or what a result is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import ClassVar, Generic

import torch
from torch import Tensor

from wherefrom.curvature.factors import Strategy
from wherefrom.curvature.gauss_newton import DampedGaussNewton
from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Collector, Sweep
from wherefrom.planning.plan import Plan, plan_scores
from wherefrom.planning.workload import Workload
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import MemoryLimitError
from wherefrom.runtime.memory import within_memory
from wherefrom.scoring.approximation import Approximation
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import (
    SELF_INFLUENCE,
    SQUARED_NORM,
    PairwiseCollector,
    SelfInfluenceCollector,
    Together,
)
from wherefrom.scoring.keep import Aggregation
from wherefrom.scoring.results import BESIDE_SCORES, extremes, merged_extremes
from wherefrom.store.cache import Blocks, Unfinished
from wherefrom.store.space import BlockSizes, Step, check_space, used_bytes
from wherefrom.tasks.task import Batch

logger = logging.getLogger("wherefrom")

# When memory runs out, batches shrink to this part of their planned size before fewer query gradients are resident.
_SMALLEST_BATCH = 0.25


def make_plan(
    sweep: Sweep[Batch],
    strategy: Strategy,
    queries: Examples[Batch],
    train: Examples[Batch],
    approximation: Approximation,
    loaded: bool = True,
) -> Plan:
    """The plan of a score, from what a query and a training example take.

    Args:
        loaded: whether the factors are in memory already; otherwise memory is left for them.
    """
    execution = sweep.execution
    # What a solver adds up in many steps is of the model's type; so is what it ends with.
    half = execution.half_precision and approximation.solver is None
    dtype = torch.bfloat16 if half else sweep.dtype
    job = Workload(
        layers=sweep.layers,
        strategy=strategy,
        queries=len(queries),
        train=len(train),
        fit_train=len(train),
        query=sweep.footprint(queries),
        example=sweep.footprint(train),
        dtype=dtype,
        query_rank=approximation.query_rank,
        query_bits=approximation.query_bits,
        query_batch=execution.query_batch_size,
        train_batch=execution.train_batch_size,
        usable=sweep.ranks.least(sweep.usable_memory()),
        device=sweep.device,
        offload_factors=execution.offload_factors,
    )
    if not loaded and execution.memory_budget is None:
        job = replace(job, usable=job.usable - job.factor_bytes)
    if approximation.solver is not None:
        job = replace(job, usable=job.usable // approximation.solver.held)
    plan = plan_scores(job)
    # Measured speeds differ between processes, and what all of them do together must not.
    choices = sweep.ranks.first(lambda: (plan.query_batch, plan.train_batch, plan.block, plan.form))
    query_batch, train_batch, block, form = choices
    # Each has a device of its own.
    return Plan(job, query_batch, train_batch, block, form if form.offloaded else replace(form, device=job.device))


@dataclass(frozen=True)
class Scoring(Generic[Batch]):
    """Queries to score against training examples.

    Attributes:
        strategy: of the factors behind the operator.
        operator: what query gradients are preconditioned with.
        groups: of each layer whose part of a score is stored.
        self_influence: whether each example's score with itself is wanted too.
        sum_queries, sum_train: what is added up.
        later: operators that query gradients are multiplied with afterwards, one after another.
        at_query_weights: enters the weights that query gradients are of, where they are not the training gradients'.
    """

    sweep: Sweep[Batch]
    strategy: Strategy
    operator: Operator
    queries: Examples[Batch]
    train: Examples[Batch]
    approximation: Approximation = field(default_factory=Approximation)
    groups: Mapping[str, str] = field(default_factory=dict)
    self_influence: bool = False
    sum_queries: Aggregation | None = None
    sum_train: Aggregation | None = None
    later: Sequence[Operator] = ()
    at_query_weights: Callable[[], AbstractContextManager[None]] = nullcontext

    # Whether a block that was interrupted goes on where it was: what its bank holds is the same each time.
    resumes: ClassVar[bool] = True

    @cached_property
    def plan(self) -> Plan:
        """Sizes and forms; made, and said in the log, when there is something to compute."""
        plan = make_plan(self.sweep, self.strategy, self.queries, self.train, self.approximation)
        # Scores of tokens are planned as those of their sequences were, but for the memory that happens to be free.
        choice = str(replace(plan, job=replace(plan.job, usable=0)))
        if self.ranks.is_main and choice not in self.sweep.logged:
            logger.info(str(plan))
            self.sweep.logged.add(choice)
        return plan

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.sweep.ranks

    def pairwise(self, result: Unfinished) -> dict[str, Tensor]:
        """The tensors of `Scores`, block by block: `values` [queries, train], and what was requested beside it."""
        vectors = 3 * self.self_influence
        step = self._sizes().matrix_step(self.ranks.count, vectors, self.approximation.rescore)
        self.check_disk([result.parts.folder, result.part], step)
        blocks = result.blocks(len(self.queries), len(self.train))
        beside: dict[str, Tensor] = {}
        resident = Resident(self, blocks)
        for queries in resident:
            with resident.attempt(queries):
                bank = cache(partial(self.bank, queries))  # not made when all of its blocks are there
                for columns in self.shards(queries, len(self.train)):
                    compute = partial(self.block, bank, queries, columns)
                    found = blocks.get_or_compute(queries, columns, compute)
                    for name, each in found.items():
                        self._put(beside, name, each, queries, columns)
        if self.groups:
            result.details["layers"] = list(dict.fromkeys(self.groups.values()))
        self._log_errors(beside.get("query_errors"))
        if self.self_influence:
            beside["preconditioned_norms"] = beside.pop(SQUARED_NORM).sqrt()
            beside["query_self_influence"] = self._query_self_influence()
        return beside

    def _put(self, whole: dict[str, Tensor], name: str, part: Tensor, queries: range, columns: range) -> None:
        """Put a vector of a block, with a number for each query or training example, where it belongs."""
        of_queries = BESIDE_SCORES.get(name, (None, ("train",)))[1][0] == "query"
        size, where = (len(self.queries), queries) if of_queries else (len(self.train), columns)
        whole.setdefault(name, part.new_zeros(size))[where.start : where.stop] = part

    def _log_errors(self, errors: Tensor | None) -> None:
        if errors is None or not self.ranks.is_main:
            return
        rank, bits = self.approximation.query_rank, self.approximation.query_bits
        form = f"Rank {rank} leaves" if bits is None else f"{bits} bits leave"
        logger.info(
            f"{form} out {errors.mean():.2%} of a query gradient's norm on average, {errors.max():.2%} at most."
        )

    def highest(self, k: int, result: Unfinished) -> dict[str, Tensor]:
        """The tensors of `TopScores`: each block is reduced to its extremes before it is stored."""
        self.check_disk([result.parts.folder], self._sizes().top_step(self.ranks.count, k))
        blocks = Blocks(result.parts, len(self.queries), len(self.train))
        found: list[dict[str, Tensor]] = []

        def reduced(
            bank: Callable[[], GradientBank], queries: range, columns: range, part: Unfinished
        ) -> dict[str, Tensor]:
            block = self.block(bank, queries, columns, part)
            values = block.pop("values").cpu()
            return {**block, **extremes(values, torch.arange(columns.start, columns.stop), k)}

        resident = Resident(self, blocks)
        for queries in resident:
            with resident.attempt(queries):
                bank = cache(partial(self.bank, queries))
                best: dict[str, Tensor] = {}
                for columns in self.shards(queries, len(self.train)):
                    part = blocks.get_or_compute(queries, columns, partial(reduced, bank, queries, columns))
                    best = {**part, **merged_extremes([best, part], k)} if best else part
                found.append(best)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def aggregated(self, result: Unfinished) -> dict[str, Tensor]:
        """The tensors of `Scores` with one row for all queries, one column for all training examples, or both."""
        self.check_disk([result.parts.folder], self._sizes().summed_step(self.ranks.count))
        blocks = Blocks(result.parts, len(self.queries), len(self.train))
        found: list[dict[str, Tensor]] = []
        everything = range(len(self.train))
        if self.sum_queries:
            queries = range(len(self.queries))
            compute = partial(self.block, self._summed_bank, queries, everything)
            found.append(blocks.get_or_compute(queries, everything, compute))
        else:
            resident = Resident(self, blocks)
            for queries in resident:
                with resident.attempt(queries):
                    compute = partial(self.block, cache(partial(self.bank, queries)), queries, everything)
                    found.append(blocks.get_or_compute(queries, everything, compute))
        if self.groups:
            result.details["layers"] = list(dict.fromkeys(self.groups.values()))
        divisor = len(self.queries) if self.sum_queries == "mean" else 1
        divisor *= len(self.train) if self.sum_train == "mean" else 1
        whole = {name: torch.cat([part[name] for part in found], -2 if name == "layers" else 0) for name in found[0]}
        return {name: each / divisor if each.dim() >= 2 else each for name, each in whole.items()}

    def block(
        self, bank: Callable[[], GradientBank], queries: range, train: Sequence[int], part: Unfinished
    ) -> dict[str, Tensor]:
        """A sweep over the training examples at these positions against resident queries."""
        sweep, resident = self.sweep, bank()
        examples = self.train if train == range(len(self.train)) else self.train.subset(train)
        with self.ranks.agreeing(), self.within_memory(len(queries)):
            collector: Collector = PairwiseCollector(
                resident, len(train), sweep.dtype, sweep.device, self.groups, summed=self.sum_train is not None
            )
            if self.self_influence and not queries.start:  # once is enough
                collector = Together(collector, self._self_influence(examples))
        batch, smallest = self.train_batch(len(resident))
        partial_sums = part.sums if self.resumes else None
        sweep.run(
            "pairwise scores", examples, collector, batch_size=batch, smallest_batch=smallest, partial=partial_sums
        )
        errors = resident.relative_errors()
        return collector.sums | resident.accuracy | ({} if errors is None else {"query_errors": errors})

    def _self_influence(self, examples: Examples[Batch], training: bool = True) -> SelfInfluenceCollector:
        sweep, count = self.sweep, len(examples)
        return SelfInfluenceCollector(sweep.layers, self.operator, count, sweep.dtype, sweep.device, training=training)

    def _query_self_influence(self) -> Tensor:
        """A sweep over queries for their scores with themselves."""
        collector, size = self._self_influence(self.queries, training=False), self.sweep.execution.query_batch_size
        self.sweep.run("query self-influence", self.queries, collector, batch_size=size)
        return collector.sums[SELF_INFLUENCE]

    def train_self_influence(self, result: Unfinished) -> dict[str, Tensor]:
        """A sweep over training examples for their scores with themselves."""
        collector, size = self._self_influence(self.train), self.sweep.execution.train_batch_size
        self.sweep.run("self-influence", self.train, collector, batch_size=size, partial=result.sums)
        return collector.sums

    def check_disk(self, folders: Sequence[Path], step: Step) -> None:
        """Refuse to begin what there is too little disk space for.

        Args:
            folders: the first is where it will lie; what is in them already is a part of it.
        """
        self.ranks.first(lambda: check_space(folders[0], [step], used_bytes(folders)))

    def _sizes(self) -> BlockSizes:
        """How scores are cut, for what they take on the disk."""
        blocks = self.plan.blocks(self._matrices)
        if self.sum_queries:
            blocks = replace(blocks, queries=1, block=1, shard=blocks.train)
        return replace(blocks, train=1, shard=1) if self.sum_train else blocks

    @property
    def _matrices(self) -> int:
        """How many of one size a block has: the scores, and the part of each group of layers."""
        return 1 + len(set(self.groups.values()))

    def shards(self, queries: range, train: int) -> list[range]:
        """The planned parts of a training set; a batch for every process at least."""
        return self.plan.shards(len(queries) * self._matrices, train, self.ranks.count * self.plan.train_batch)

    def within_memory(self, queries: int) -> AbstractContextManager[None]:
        """Turn a failed allocation into the error of our own that means fewer resident queries."""
        form = "query_bits=8 or a query_rank"
        form = form if self.approximation.solver is None else "the solver a smaller block_size, or fewer iterations"
        advice = f"Give {form}, track fewer layers, or use a device with more memory."
        return within_memory(f"Gradients of {queries} queries, and what is made of them, do", self.sweep.device, advice)

    def bank(self, queries: range) -> GradientBank:
        """The preconditioned gradients of some queries: a sweep over them, and what a solver makes of those."""
        system = self.system()
        # A solver preconditions by itself.
        bank = self.gradients(queries, Operator({}, {}, self.operator.flat) if system else self.operator)
        with self.within_memory(len(queries)):
            for each in self.later:
                bank.apply(each, self.sweep.layers, self.sweep.device)
            if system is not None:
                self._solve(system, bank)
        return bank

    def gradients(self, queries: range, operator: Operator) -> GradientBank:
        """A sweep over some queries for their gradients, preconditioned with an operator."""
        with self.ranks.agreeing(), self.within_memory(len(queries)):
            bank = GradientBank(self.sweep.layers, operator, len(queries), self.plan.form)
        batch, smallest = self._batch(self.plan.query_batch, len(queries))
        with self.at_query_weights():
            examples = self.queries.subset(queries)
            self.sweep.run("query gradients", examples, bank, batch_size=batch, smallest_batch=smallest)
        return bank

    def system(self) -> DampedGaussNewton[Batch] | None:
        """What a solver solves; None without one."""
        if self.approximation.solver is None:
            return None
        damping = self.approximation.damping
        return DampedGaussNewton(self.sweep, self.operator, self.train, damping, self.plan.train_batch)

    def _solve(self, system: DampedGaussNewton[Batch], bank: GradientBank) -> None:
        """Replace the gradients in a bank by what the solver makes of them."""
        solver = self.approximation.solver
        assert solver is not None
        gradients = system.space.join(bank.whole(self.sweep.layers)).to(self.sweep.device)
        solution = solver.solve(system, gradients)
        for name, matrices in system.space.split(solution.vectors).items():
            bank.replace(name, matrices)
        bank.accuracy = solution.accuracy
        if self.ranks.is_main:
            logger.info(f"{solver}: {solution}.")

    def _summed_bank(self) -> GradientBank:
        """One gradient, the sum of all queries' preconditioned gradients."""
        total: list[GradientBank] = []
        resident = Resident(self)
        for queries in resident:
            with resident.attempt(queries):
                total[:] = [self.bank(queries).summed(*total)]
        return total[0]

    def train_batch(self, queries: int) -> tuple[int, int]:
        """The batch size of a training sweep beside so many resident query gradients, and the smallest."""
        return self._batch(self.plan.train_batch, queries)

    @staticmethod
    def _batch(planned: int, queries: int) -> tuple[int, int]:
        """The batch size to start with and the smallest to go on with while fewer queries could be resident instead."""
        return planned, 1 if queries == 1 else max(1, int(_SMALLEST_BATCH * planned))


class Resident(Generic[Batch]):
    """Runs of queries whose gradients are resident together: as planned, and fewer when memory runs out.

    What a solver solves together stays together.

    Args:
        blocks: what an earlier run has begun with is taken up first.
    """

    def __init__(self, scoring: Scoring[Batch], blocks: Blocks | None = None) -> None:
        self._scoring, self._blocks = scoring, blocks
        solver = scoring.approximation.solver
        self._together = solver.block_size if solver else 1
        self._start, self._size = 0, self._whole(scoring.plan.block)

    def __iter__(self) -> Iterator[range]:
        total = len(self._scoring.queries)
        while self._start < total:
            queries = range(self._start, min(self._start + self._size, total))
            yield queries if self._blocks is None else self._blocks.begun(queries)

    @contextmanager
    def attempt(self, queries: range) -> Iterator[None]:
        """Within it, work on some queries; when memory runs out, the next ones are half of them."""
        # Of several processes, one by itself must not go on with fewer while the others are further: there, only what
        # they have agreed on is a MemoryLimitError.
        scoring = self._scoring
        alone = scoring.ranks.count == 1
        try:
            with scoring.within_memory(len(queries)) if alone else nullcontext():
                yield
        except MemoryLimitError as error:
            # Of processes that share a model's weights, the others may be in the middle of a pass.
            if len(queries) <= self._together or scoring.sweep.lockstep:
                raise
            self._size = self._whole(len(queries) // 2)
            logger.warning(f"{error} Going on with {self._size} resident query gradients instead of {len(queries)}.")
            if self._blocks is not None:
                self._blocks.discard(queries)
        else:
            self._start = queries.stop

    def _whole(self, queries: int) -> int:
        return max(1, queries // self._together) * self._together
