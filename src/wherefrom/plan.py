"""The plan of a score: batch sizes, how many query gradients are resident, in which form and where, and what it costs.

It is arithmetic on sizes that were measured on one example. Memory decides; where two ways give the same numbers,
floating-point operations do. This module runs no sweep, and a plan that is too optimistic is corrected by `scoring`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from wherefrom.curvature import Strategy
from wherefrom.disk import Blocks, Step, fit_steps, peak
from wherefrom.gradients import PIECE_BYTES, BankForm, thin_product_flop
from wherefrom.layers import TrackedLayer
from wherefrom.memory import Footprint, free_memory
from wherefrom.precision import type_name, widened_dtype

# How much of the score matrix is in memory at a time; more with very many queries, for shards of some batches.
SHARD_BYTES, SHARD_ROWS = 2**24, 512


@dataclass(frozen=True)
class Wanted:
    """What the caller has settled.

    Attributes:
        dtype: of resident query gradients.
        rank: of the two thin matrices that stand for each; None keeps them whole.
        query_batch, train_batch: None leaves the size to the plan.
    """

    dtype: torch.dtype
    rank: int | None = None
    query_batch: int | None = None
    train_batch: int | None = None


@dataclass(frozen=True)
class Job:
    """What there is to do, and what it takes.

    Attributes:
        query, example: what a query and a training example take.
        usable: bytes to plan with on `device`, where the model is.
        factors_on_host: only one layer's factors are on the device at a time.
    """

    layers: Mapping[str, TrackedLayer]
    strategy: Strategy
    queries: int
    train: int
    query: Footprint
    example: Footprint
    wanted: Wanted
    usable: int
    device: torch.device
    factors_on_host: bool = False

    @property
    def factor_bytes(self) -> int:
        """What bases and eigenvalues take on the device."""
        if not self.factors_on_host:
            return factor_bytes(self.layers, self.strategy, self.wanted.dtype)
        return max(factor_bytes({name: each}, self.strategy, self.wanted.dtype) for name, each in self.layers.items())


@dataclass(frozen=True)
class Machine:
    """What a plan has to know of a machine besides its device's memory.

    Attributes:
        matmul: floating-point operations a second of a large product.
        copy: bytes a second from the host's memory to the device.
        host: bytes that are free on the host.
    """

    matmul: float
    copy: float
    host: int

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This machine, with a GPU."""
        return cls(matmul_speed(device, dtype), copy_speed(device), free_memory(torch.device("cpu")))


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
        itemsize, errors = widened_dtype(self.form.dtype).itemsize, self.form.rank is not None
        return Blocks(queries, train, itemsize, self.block, shard, matrices, errors)

    def costs(self) -> list[Cost]:
        """The stages of a fit and a score."""
        job = self.job
        each, query = _PerExample.of(job, job.example), _PerExample.of(job, job.query)
        batch = self.train_batch * job.example.bytes
        factors = 2 * job.factor_bytes
        query_memory = self.bank_bytes + factors + self.query_batch * job.query.bytes
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
                self.bank_bytes + factors + batch + SHARD_BYTES,
            ),
        ]
        if job.strategy.eigenvalues == "fitted":
            flop = job.train * (job.example.flop + each.gradient)
            found.insert(0, Cost("eigenvalues", job.train, flop, batch + factors))
        if job.strategy.basis:
            flop = job.train * (job.example.flop + each.covariance)
            found.insert(0, Cost("covariance", job.train, flop, batch + factors))
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
            for query, train, chosen in zip(*_side_costs(self.job, layer, self.sweeps), sides, strict=True):
                back, brought = back + query * chosen, brought + train * (not chosen)
        return back, brought

    def __str__(self) -> str:
        """What was chosen and why, on one line."""
        job, gib = self.job, 2**30
        form = f"rank {self.form.rank}" if self.form.rank else "whole"
        where = (
            str(self.form.place) if self.form.place == job.device else f"{self.form.place}, streamed to {job.device}"
        )
        times = "once" if self.sweeps == 1 else f"{self.sweeps} times"
        return (
            f"Plan: {self.block} of {job.queries} query gradients resident ({form}, {type_name(self.form.dtype)}, "
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


@dataclass(frozen=True)
class _PerExample:
    """Operations for one example, over all layers.

    Attributes:
        forming: its gradients; gradient: the same in the eigenbasis, where there is one.
        covariance: its part of both covariances, of which only one triangle is computed, with what they are made of.
    """

    forming: float
    gradient: float
    covariance: float

    @classmethod
    def of(cls, job: Job, footprint: Footprint) -> _PerExample:
        forming = rotating = covariance = 0.0
        for name, layer in job.layers.items():
            tokens = footprint.tokens_of(name)
            outputs, columns = layer.shape[0], layer.columns(tokens)
            forming += 2.0 * tokens * outputs * columns
            rotating += sum(_sides_flop(job, layer, tokens))
            # Vectors whose outer products a side sums: tokens, or the columns and rows of the gradient.
            vectors = (columns, outputs) if job.strategy.basis == "gradients" else (tokens, tokens)
            covariance += sum(
                count * (1 if diagonal else size) * size
                for count, size, diagonal in zip(vectors, (outputs, columns), layer.diagonal_sides, strict=True)
            )
        covariance += forming * (job.strategy.basis == "gradients")
        return cls(forming, forming + rotating * bool(job.strategy.basis), covariance)


def factor_bytes(layers: Mapping[str, TrackedLayer], strategy: Strategy, dtype: torch.dtype) -> int:
    """What bases and eigenvalues take; while they are in use, they are there twice."""
    numbers = 0
    for layer in layers.values():
        for size, diagonal in zip(layer.padded_shape, layer.diagonal_sides, strict=True):
            numbers += size * (1 if diagonal else size) * bool(strategy.basis)
        if strategy.eigenvalues != "none":
            numbers += math.prod(layer.padded_shape)
    return numbers * widened_dtype(dtype).itemsize


def plan_scores(job: Job, machine: Machine | None = None) -> Plan:
    """Choose batch sizes, and with what memory is left the form, the place and the number of resident gradients.

    Args:
        machine: None measures this one, where that decides.
    """
    train_batch = job.wanted.train_batch or job.example.batch_size(job.train, job.usable, job.device)
    query_batch = job.wanted.query_batch or job.query.batch_size(job.queries, job.usable, job.device)
    batch = max(train_batch * job.example.bytes, query_batch * job.query.bytes)
    # Whole gradients that are on the device as they are need no room for pieces.
    pieces = PIECE_BYTES * (job.wanted.rank is not None or job.wanted.dtype == torch.bfloat16)
    room = job.usable - batch - job.factor_bytes - SHARD_BYTES - pieces
    plan = _fitting(job, query_batch, train_batch, room, job.device)
    if job.device.type == "cpu" or plan.sweeps == 1:
        return plan
    machine = machine or Machine.measured(job.device, plan.form.dtype)
    # Pinned memory is handed out in powers of two, so that up to half of it may be wasted.
    streamed = _fitting(job, query_batch, train_batch, int(0.4 * machine.host), torch.device("cpu"))
    return min(plan, streamed, key=lambda each: _sweep_seconds(each, machine))


def _fitting(job: Job, query_batch: int, train_batch: int, room: int, place: torch.device) -> Plan:
    """As many queries as there is room for, in blocks of equal size."""
    tokens = max((job.query.tokens_of(name) for name, layer in job.layers.items() if layer.one_hot), default=0)
    form = BankForm(job.wanted.dtype, place, place != job.device, job.wanted.rank, tokens)
    each = form.bytes_per_query(job.layers) + SHARD_ROWS * widened_dtype(form.dtype).itemsize
    most = max(1, min(job.queries, room // each))
    sweeps = -(-job.queries // most)
    sides = {name: _cheaper_sides(job, form, name, sweeps) for name in job.layers} if job.strategy.basis else {}
    return Plan(job, query_batch, train_batch, -(-job.queries // sweeps), replace(form, rotated_back=sides))


def _cheaper_sides(job: Job, form: BankForm, layer: str, sweeps: int) -> tuple[bool, bool]:
    """On which sides query gradients are rotated back, since training gradients would cost more to rotate."""
    if form.thin(job.layers[layer]):
        return True, True  # two thin matrices cost next to nothing
    query, train = _side_costs(job, layer, sweeps)
    return query[0] < train[0], query[1] < train[1]


def _side_costs(job: Job, layer: str, sweeps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Operations for the left and the right side: all query gradients back, or all training gradients there."""
    tracked = job.layers[layer]
    outputs, columns = tracked.shape[0], tracked.columns(job.query.tokens_of(layer))
    back = [
        0.0 if diagonal else 2.0 * job.queries * outputs * columns * size
        for size, diagonal in zip((outputs, columns), tracked.diagonal_sides, strict=True)
    ]
    left, right = _sides_flop(job, tracked, job.example.tokens_of(layer))
    return (back[0], back[1]), (sweeps * job.train * left, sweeps * job.train * right)


def _sides_flop(job: Job, layer: TrackedLayer, tokens: int) -> tuple[float, float]:
    """Operations for one example's gradient into the basis, left and right: its tokens or its rows, whichever fewer."""
    outputs, columns = layer.shape[0], layer.columns(tokens)
    if job.wanted.dtype == torch.bfloat16 and job.device.type == "cuda":
        left, right = 4.0 * outputs**2 * tokens, 4.0 * columns**2 * tokens  # see `precision.rotated`
    else:
        left, right = 2.0 * outputs**2 * min(tokens, columns), 2.0 * columns**2 * min(tokens, outputs)
    no_left, no_right = layer.diagonal_sides
    return left * (not no_left), right * (not no_right)


def _sweep_seconds(plan: Plan, machine: Machine) -> float:
    """What the training sweeps take, roughly: passes, and moving a bank that is not on the device for every batch."""
    seconds = plan.costs()[-1].flop / machine.matmul
    if plan.form.place != plan.job.device:
        batches = -(-plan.job.train // plan.train_batch)
        seconds += plan.sweeps * batches * plan.bank_bytes / machine.copy
    return seconds


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product, measured."""
    half = dtype == torch.bfloat16 and device.type == "cuda"
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype if half else torch.float32, device=device)
    return 2 * size**3 / _best_seconds(lambda: matrix @ matrix, device)


def copy_speed(device: torch.device) -> float:
    """Bytes a second from the host's pinned memory to a device, measured."""
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    return host.numel() / _best_seconds(lambda: host.to(device, non_blocking=True), device)


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(once() for _ in range(4))
