"""The plan of a score: batch sizes, how many query gradients are resident, in which form and where, and what it costs.

It is arithmetic on sizes that were measured on one example. Memory decides; where two ways give the same numbers,
floating-point operations do. This module runs no sweep, and a plan that is too optimistic is corrected by `scoring`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from wherefrom.curvature.factors import fit_steps
from wherefrom.engine.layers import TrackedLayer
from wherefrom.planning.forms import PIECE_BYTES, BankForm, thin_product_flop
from wherefrom.planning.job import Job, PerExample, in_half, side_costs
from wherefrom.planning.machine import Machine, matmul_speed
from wherefrom.planning.space import Blocks
from wherefrom.runtime.precision import type_name, widened_dtype
from wherefrom.store.space import Step, peak

# How much of the score matrix is in memory at a time; more with very many queries, for shards of some batches.
SHARD_BYTES, SHARD_ROWS = 2**24, 512
# A batch of fewer tokens takes as long as one of so many: a GPU is not filled, and kernels are waited for.
_LEAST_TOKENS = {"cpu": 128, "cuda": 4096}
# Operations of a product in the time in which memory moves one byte, by the data sheets of an A100, an H100 and an
# H200: 150 to 290 in half precision, 10 to 150 in float32 without and with TF32; on a CPU, measured.
_OPERATIONS_PER_BYTE, _HALF_OPERATIONS_PER_BYTE = {"cpu": 16.0, "cuda": 64.0}, 200.0
# Bytes that a forward and backward pass moves outside of products for each byte that it saves: counted for GPT-2, whose
# kernels move 171 GB in a batch of 64 sequences of 512 tokens.
_MOVED_PER_SAVED = 10


@dataclass(frozen=True)
class Cost:
    """What one stage costs.

    Attributes:
        passes: examples that go forward and backward through the model.
        flop: floating-point operations, at least.
        bytes: the most memory that it takes beyond the model.
    """

    stage: str
    passes: int
    flop: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """How scores are computed.

    Attributes:
        block: queries whose gradients are resident together; the training set is swept once for each block.
        form: how they are kept.
    """

    job: Job
    query_batch: int
    train_batch: int
    block: int
    form: BankForm

    @property
    def sweeps(self) -> int:
        """How often the training set is swept."""
        return -(-self.job.queries // self.block)

    @property
    def bank_bytes(self) -> int:
        """What a block of query gradients takes."""
        return self.block * self.form.bytes_per_query(self.job.layers)

    @property
    def fit_batch(self) -> int:
        """Training examples in a batch of the fit, which no query gradients stand beside."""
        job = self.job
        return job.wanted.train_batch or job.example.batch_size(job.train, job.usable, job.device)

    def shards(self, queries: int, train: int, least: int = 1) -> list[range]:
        """Runs of training examples whose scores for some queries are in memory together.

        Args:
            least: how many examples make a run, if there are so many.
        """
        rows = max(SHARD_ROWS, least, SHARD_BYTES // (queries * widened_dtype(self.form.dtype).itemsize))
        return [range(start, min(start + rows, train)) for start in range(0, train, rows)]

    def disk(self, ranks: int = 1) -> dict[str, Step]:
        """What the fit and the scores of all pairs take on disk.

        Args:
            ranks: processes that work on it.
        """
        job = self.job
        steps = fit_steps(job.layers, job.strategy, widened_dtype(self.form.dtype), ranks)
        return {**steps, "scores": self.blocks().matrix_step(ranks)}

    def blocks(self, matrices: int = 1) -> Blocks:
        """How the scores of all pairs are cut.

        Args:
            matrices: how many of one size there are.
        """
        queries, train = self.job.queries, self.job.train
        shard = len(self.shards(self.block * matrices, train)[0])
        itemsize, errors = widened_dtype(self.form.dtype).itemsize, self.form.approximate
        return Blocks(queries, train, itemsize, self.block, shard, matrices, errors)

    def costs(self) -> list[Cost]:
        """The stages of a fit and a score."""
        job = self.job
        each, query = PerExample.of(job, job.example), PerExample.of(job, job.query)
        factors = 2 * job.factor_bytes
        query_memory = self.bank_bytes + factors + job.query.batch_bytes(self.query_batch)
        fit_memory = job.example.batch_bytes(self.fit_batch) + factors
        back, brought = self._rotations()
        passes = self.sweeps * job.train
        found = [
            Cost("query gradients", job.queries, job.queries * (job.query.flop + query.gradient) + back, query_memory),
            Cost(
                "pairwise scores",
                passes,
                passes * (job.example.flop + self._forming_flop())
                + brought
                + job.queries * job.train * self._dot_flop(),
                self.bank_bytes + factors + job.example.batch_bytes(self.train_batch) + SHARD_BYTES,
            ),
        ]
        if job.strategy.eigenvalues == "fitted":
            flop = job.train * (job.example.flop + each.gradient)
            found.insert(0, Cost("eigenvalues", job.train, flop, fit_memory))
        if job.strategy.basis:
            flop = job.train * (job.example.flop + each.covariance)
            found.insert(0, Cost("covariance", job.train, flop, fit_memory))
        return found

    def _forming_flop(self) -> float:
        """Operations for one training example's gradients, but for layers whose tokens are multiplied themselves."""
        total = 0.0
        for name, layer in self.job.layers.items():
            by_tokens, whole = self._product_flop(name, layer)
            tokens = self.job.example.tokens_of(name)
            total += 2.0 * tokens * layer.shape[0] * layer.columns(tokens) if by_tokens >= whole else 0.0
        return total

    def _dot_flop(self) -> float:
        """Operations for the product of one query's gradient with one training example's."""
        return sum(min(self._product_flop(*each)) for each in self.job.layers.items())

    def _product_flop(self, name: str, layer: TrackedLayer) -> tuple[float, float]:
        """For a product of a layer's gradients: by tokens, which only thin matrices can be, and by whole gradients."""
        tokens, (outputs, width) = self.job.example.tokens_of(name), layer.padded_shape
        if self.form.rank is None or not self.form.thin(layer):
            # Of a one-hot layer, the columns that a batch touches, at the most.
            return math.inf, 2.0 * outputs * min(width, self.train_batch * layer.columns(tokens))
        return thin_product_flop((outputs, width), self.form.rank, tokens, self.train_batch)

    def _rotations(self) -> tuple[float, float]:
        """Operations for bringing query gradients back from the eigenbasis, and training gradients into it."""
        back = brought = 0.0
        for layer, sides in self.form.rotated_back.items():
            for query, train, chosen in zip(*side_costs(self.job, layer, self.sweeps), sides, strict=True):
                back, brought = back + query * chosen, brought + train * (not chosen)
        return back, brought

    def __str__(self) -> str:
        """What was chosen and why, on one line."""
        job, gib = self.job, 2**30
        form = f"rank {self.form.rank}" if self.form.rank else "whole"
        numbers = type_name(self.form.dtype) if self.form.bits is None else f"{self.form.bits}-bit integers"
        where = (
            str(self.form.place) if self.form.place == job.device else f"{self.form.place}, streamed to {job.device}"
        )
        times = "once" if self.sweeps == 1 else f"{self.sweeps} times"
        return (
            f"Plan: {self.block} of {job.queries} query gradients resident ({form}, {numbers}, "
            f"{self.bank_bytes / gib:.2f} GiB on {where}; {job.usable / gib:.2f} GiB usable), so {job.train} training "
            f"examples are swept {times}; batches of {self.query_batch} queries, {self.train_batch} training examples."
        )

    def table(self) -> Table:
        """The estimated cost of every stage; the times are what its operations take at the speed of a large product."""
        speed = matmul_speed(self.job.device, self.form.dtype)
        table = Table("Stage", title=str(self), title_justify="left", caption_justify="left")
        steps = self.disk().values()
        table.caption = (
            f"Seconds: at {speed / 1e9:,.0f} GFLOP/s, what a large product reaches here; a lower bound. Disk: "
            f"{sum(step.kept for step in steps) / 2**30:,.2f} GiB stay, {peak(steps) / 2**30:,.2f} GiB at the most at "
            "once, with copies and partial sums."
        )
        for heading in ("Passes", "GFLOP", "Peak GiB", "Seconds"):
            table.add_column(heading, justify="right")
        for cost in self.costs():
            numbers = (cost.flop / 1e9, cost.bytes / 2**30, cost.flop / speed)
            table.add_row(cost.stage, f"{cost.passes:,}", *(f"{each:,.2f}" for each in numbers))
        return table


def plan_scores(job: Job, machine: Machine | None = None) -> Plan:
    """Choose batch sizes and the form, the device and the number of resident gradients, together, by what they cost.

    Args:
        machine: None measures this one, where that decides.
    """
    # Whole gradients that are on the device as they are need no room for pieces.
    wanted = job.wanted
    pieces = PIECE_BYTES * (wanted.rank is not None or wanted.bits is not None or wanted.dtype == torch.bfloat16)
    available = job.usable - job.factor_bytes - SHARD_BYTES - pieces
    plan = _cheapest(job, job.device, available)
    if job.device.type == "cpu" or plan.sweeps == 1:
        return plan
    machine = machine or Machine.measured(job.device, plan.form.dtype)
    # Pinned memory is handed out in powers of two, so that up to half of it may be wasted.
    streamed = _cheapest(job, torch.device("cpu"), available, int(0.4 * machine.host))
    return min(plan, streamed, key=lambda each: _operations(each, machine))


def _cheapest(job: Job, place: torch.device, available: int, host: int | None = None) -> Plan:
    """The plan of the fewest operations.

    Fewer resident gradients leave room for larger batches, and cost another sweep; smaller batches read the resident
    gradients more often, and fill the device less.

    Args:
        available: bytes on the model's device, for gradients that are resident there and for a batch.
        host: bytes for gradients that are resident on the host.
    """
    tokens = max((job.query.tokens_of(name) for name, layer in job.layers.items() if layer.one_hot), default=0)
    form = BankForm(job.wanted.dtype, place, place != job.device, job.wanted.rank, tokens, bits=job.wanted.bits)
    on_device = SHARD_ROWS * widened_dtype(form.dtype).itemsize  # of each query: scores
    resident = form.bytes_per_query(job.layers)
    best, least = None, math.inf
    for block in _blocks(job.queries):
        left = available - block * (on_device if host is not None else on_device + resident)
        train_batch, query_batch = _batches(job, left)
        too_many = host is not None and block * resident > host
        if block > 1 and (too_many or not (train_batch and query_batch)):
            continue
        plan = _plan(job, form, block, max(1, train_batch), max(1, query_batch))
        operations = _operations(plan)
        if operations < least:
            best, least = plan, operations
        elif (train_batch, query_batch) == _batches(job, None):
            break  # with fewer resident gradients there are only more sweeps
    assert best is not None
    return best


def _blocks(queries: int) -> Iterator[int]:
    """Numbers of queries, descending to 1, each the least for its number of sweeps; of very many sweeps, some."""
    sweeps = 1
    while sweeps < queries:
        yield -(-queries // sweeps)
        sweeps = max(sweeps + 1, int(1.1 * sweeps))
    yield 1


def _batches(job: Job, left: int | None) -> tuple[int, int]:
    """Batch sizes for training examples and queries that fit; 0 where none does, and as large as is of use for None."""
    sizes = []
    for footprint, count, wanted in (
        (job.example, job.train, job.wanted.train_batch),
        (job.query, job.queries, job.wanted.query_batch),
    ):
        most = wanted or min(count, footprint.filling(job.device))
        fitting = most if left is None else footprint.affordable(left)
        sizes.append(most if fitting >= most else 0 if wanted else fitting)
    return sizes[0], sizes[1]


def _plan(job: Job, form: BankForm, block: int, train_batch: int, query_batch: int) -> Plan:
    """A plan with what follows from its sizes."""
    sweeps = -(-job.queries // block)
    sides = {name: _cheaper_sides(job, form, name, sweeps) for name in job.layers} if job.strategy.basis else {}
    wanted = job.wanted
    form = replace(form, rotated_back=sides)
    return Plan(job, wanted.query_batch or query_batch, wanted.train_batch or train_batch, block, form)


def _cheaper_sides(job: Job, form: BankForm, layer: str, sweeps: int) -> tuple[bool, bool]:
    """On which sides query gradients are rotated back, since training gradients would cost more to rotate."""
    # Two thin matrices cost next to nothing. What integers leave out must not depend on how often is swept.
    if form.thin(job.layers[layer]) or form.quantized(job.layers[layer]):
        return True, True
    query, train = side_costs(job, layer, sweeps)
    return query[0] < train[0], query[1] < train[1]


def _operations(plan: Plan, machine: Machine | None = None) -> float:
    """What the scores cost, roughly, with everything that is moved in operations that would take as long.

    Args:
        machine: how much slower than the device's own memory the host's is, where gradients are resident there.
    """
    job, total = plan.job, 0.0
    query, train = plan.costs()[-2:]
    per_byte = _HALF_OPERATIONS_PER_BYTE if in_half(job) else _OPERATIONS_PER_BYTE.get(job.device.type, 16.0)
    for cost, footprint, batch in ((query, job.query, plan.query_batch), (train, job.example, plan.train_batch)):
        unfilled = max(1.0, _LEAST_TOKENS.get(job.device.type, 128) / (batch * footprint.tokens))
        total += unfilled * (cost.flop + cost.passes * per_byte * _MOVED_PER_SAVED * footprint.saved_bytes)
    per_moved = machine.matmul / machine.copy if plan.form.streamed and machine is not None else per_byte
    read = per_moved * plan.bank_bytes
    if plan.form.bits is not None:  # numbers are made of integers, and read
        read += per_byte * 2 * plan.block * replace(plan.form, bits=None).bytes_per_query(job.layers)
    return total + plan.sweeps * -(-job.train // plan.train_batch) * read
