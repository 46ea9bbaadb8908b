"""The plan of a score: batch sizes, how many query gradients are resident, in which form and where, and what it costs.

It is arithmetic on sizes that were measured on one example. Memory decides; where two ways give the same numbers,
floating-point operations do. This module runs no sweep, and a plan that is too optimistic is corrected by `scoring`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from wherefrom.curvature.factors import fit_steps
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.planning.forms import PIECE_BYTES, BankForm, low_rank_product_flop
from wherefrom.planning.machine import Machine, matmul_speed
from wherefrom.planning.stages import GIB, Stage, operations, stage_table
from wherefrom.planning.workload import Workload, forming_flop
from wherefrom.runtime.memory import Footprint
from wherefrom.runtime.precision import type_name, widened_dtype
from wherefrom.store.space import BlockSizes, Step, peak

# How much of the score matrix is in memory at a time; more with very many queries, for shards of some batches.
SHARD_BYTES, SHARD_EXAMPLES = 2**24, 512
# A batch of fewer tokens takes as long as one of so many: a GPU is not filled, and kernels are waited for.
_LEAST_TOKENS = {"cpu": 128, "cuda": 4096}
# Operations of a product in the time in which memory moves one byte, by the data sheets of an A100, an H100 and an
# H200: 150 to 290 in half precision, 10 to 150 in float32 without and with TF32; on a CPU, measured.
_OPERATIONS_PER_BYTE, _HALF_OPERATIONS_PER_BYTE = {"cpu": 16.0, "cuda": 64.0}, 200.0
# Bytes that a forward and backward pass moves outside of products for each byte that it saves: counted for GPT-2, whose
# kernels move 171 GB in a batch of 64 sequences of 512 tokens.
_MOVED_PER_SAVED = 10
# More bytes than any batch takes.
_PLENTY = 2**63
# A matrix in float64 while it is decomposed: itself, its eigenvectors, and workspace of twice that.
_EIGH_ITEM_BYTES = 4 * 8


@dataclass(frozen=True)
class Plan:
    """How scores are computed.

    Attributes:
        block: queries whose gradients are resident together; the training set is swept once for each block.
        form: in which they are resident, and where.
    """

    job: Workload
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
        return job.train_batch or job.example.batch_size(job.fit_train, job.usable, job.device)

    def shards(self, queries: int, train: int, least: int = 1) -> list[range]:
        """Runs of training examples whose scores for some queries are in memory together.

        Args:
            least: how many examples make a run, if there are so many.
        """
        size = max(SHARD_EXAMPLES, least, SHARD_BYTES // (queries * widened_dtype(self.form.dtype).itemsize))
        return [range(start, min(start + size, train)) for start in range(0, train, size)]

    def disk(self, ranks: int = 1, top: int | None = None) -> dict[str, Step]:
        """What the fit and the scores take on disk.

        Args:
            ranks: processes that work on it.
            top: how many of each query's highest and lowest scores are stored; None is all.
        """
        job, blocks = self.job, self.blocks()
        scores = blocks.matrix_step(ranks) if top is None else blocks.top_step(ranks, top)
        return {**fit_steps(job.layers, job.strategy, widened_dtype(self.form.dtype), ranks), "scores": scores}

    def blocks(self, matrices: int = 1) -> BlockSizes:
        """How the scores of all pairs are cut.

        Args:
            matrices: how many of one size there are.
        """
        queries, train = self.job.queries, self.job.train
        shard = len(self.shards(self.block * matrices, train)[0])
        itemsize, errors = widened_dtype(self.form.dtype).itemsize, self.form.approximate
        return BlockSizes(queries, train, itemsize, self.block, shard, matrices, errors)

    def stages(self) -> list[Stage]:
        """The stages of a fit and a score, in their order, as if one rank did all."""
        job, layers = self.job, [self._layer_flop(*each) for each in self.job.layers.items()]
        flop = {name: sum(layer[name] for layer in layers) for name in layers[0]}

        def sweep(name: str, footprint: Footprint, passes: int, batch: int, beside: Mapping[str, int]) -> Stage:
            memory = {"a batch": footprint.batch_bytes(batch), "factors": 2 * job.factor_bytes, **beside}
            return Stage(name, passes, passes * footprint.flop + flop[name], memory)

        found = []
        if job.strategy.basis:
            widest = max(max(layer.shape) for layer in job.layers.values())
            memory = {
                "factors": 2 * job.on_device(job.layer_basis_bytes),
                "workspace": _EIGH_ITEM_BYTES * widest**2,
            }
            found.append(sweep("covariance", job.example, job.fit_train, self.fit_batch, {}))
            found.append(Stage("eigendecomposition", 0, flop["eigendecomposition"], memory))
        if job.strategy.eigenvalues == "fitted":
            found.append(sweep("eigenvalues", job.example, job.fit_train, self.fit_batch, {}))
        bank = {"query gradients": 0 if self.form.offloaded else self.bank_bytes}
        found.append(sweep("query gradients", job.query, job.queries, self.query_batch, bank))
        bank["workspace"] = SHARD_BYTES
        found.append(sweep("pairwise scores", job.example, self.sweeps * job.train, self.train_batch, bank))
        return found

    def _layer_flop(self, name: str, layer: TrackedLayer) -> dict[str, float]:
        """Operations for one layer, besides passes, by stage."""
        job, query, example = self.job, self.job.query.tokens_of(name), self.job.example.tokens_of(name)
        by_tokens, whole = self._product_flop(layer, example)
        # Training gradients are not formed where their tokens are multiplied themselves.
        formed = self.sweeps * job.train * forming_flop(layer, example) * (by_tokens >= whole)
        back_in = self.form.rotated_back.get(name, (True, True))
        costs = [*zip(*job.change_of_basis_flop(name, self.sweeps), back_in, strict=True)]
        back = sum(query for query, _, rotated_back in costs if rotated_back)
        brought = sum(train for _, train, rotated_back in costs if not rotated_back)
        return {
            "covariance": job.fit_train * job.covariance_flop(layer, example),
            "eigendecomposition": job.eigendecomposition_flop(layer),
            "eigenvalues": job.fit_train * job.gradient_flop(layer, example),
            "query gradients": job.queries * job.gradient_flop(layer, query) + back,
            "pairwise scores": formed + brought + job.queries * job.train * min(by_tokens, whole),
        }

    def _product_flop(self, layer: TrackedLayer, tokens: int) -> tuple[float, float]:
        """For a product of a layer's gradients: by tokens, which only low-rank ones can be, and by whole gradients."""
        outputs, width = layer.padded_shape
        if self.form.rank is None or not self.form.low_rank(layer):
            # Of a one-hot layer, the columns that a batch touches, at the most.
            return math.inf, 2.0 * outputs * min(width, self.train_batch * layer.columns(tokens))
        return low_rank_product_flop((outputs, width), self.form.rank, tokens, self.train_batch)

    def __str__(self) -> str:
        """What was chosen and why, on one line."""
        job, form, bank = self.job, self.form, self.bank_bytes / GIB
        rank = f"rank {form.rank}" if form.rank else "whole"
        numbers = type_name(form.dtype) if form.bits is None else f"{form.bits}-bit integers"
        where = f"{form.device}, offloaded from {job.device}" if form.offloaded else form.device
        times = "once" if self.sweeps == 1 else f"{self.sweeps} times"
        return (
            f"Plan: {self.block:,} of {job.queries:,} query gradients resident ({rank}, {numbers}, "
            f"{bank:.2f} GiB on {where}; {job.usable / GIB:.2f} GiB usable), so {job.train:,} training examples are "
            f"swept {times}; batches of {self.query_batch} queries, {self.train_batch} training examples."
        )

    def table(self) -> Table:
        """What every stage takes at least; the times are those of its operations at the speed of a large product."""
        speed, steps = matmul_speed(self.job.device, self.form.dtype), self.disk().values()
        stages = [replace(stage, least_seconds=stage.flop / speed) for stage in self.stages()]
        note = (
            f"At least: at {operations(speed)}/s, what a large product reaches here. Disk: "
            f"{sum(step.stored for step in steps) / GIB:,.2f} GiB stay, {peak(steps) / GIB:,.2f} GiB at the most at "
            "once, with copies and partial sums."
        )
        return stage_table(str(self), stages, ("Passes", "Operations", "Memory, GiB", "At least"), note).table()


def plan_scores(job: Workload, machine: Machine | None = None) -> Plan:
    """Choose batch sizes and the form, the device and the number of resident gradients, together, by what they cost.

    Args:
        machine: None measures this one, where that decides.
    """
    # Whole gradients that are on the device as they are need no pieces of another type beside them.
    pieces = PIECE_BYTES * (job.query_rank is not None or job.query_bits is not None or job.dtype == torch.bfloat16)
    available = job.usable - job.factor_bytes - SHARD_BYTES - pieces
    plan = min(_candidates(job, job.device, available), key=_operations)
    if job.device.type == "cpu" or plan.sweeps == 1:
        return plan
    machine = machine or Machine.measured(job.device, plan.form.dtype)
    # Pinned memory is handed out in powers of two, so that up to half of it may be wasted.
    offloaded = min(_candidates(job, torch.device("cpu"), available, int(0.4 * machine.host)), key=_operations)
    return min(plan, offloaded, key=lambda each: _operations(each, machine))


def _candidates(job: Workload, device: torch.device, available: int, host: int | None = None) -> Iterator[Plan]:
    """Plans of more and more sweeps, until batches are as large as is of use.

    Fewer resident gradients leave memory for larger batches, and cost another sweep; smaller batches read the resident
    gradients more often, and fill the device less.

    Args:
        available: bytes on the model's device, for gradients that are resident there and for a batch.
        host: bytes for gradients that are resident on the host.
    """
    tokens = max((job.query.tokens_of(name) for name, layer in job.layers.items() if layer.one_hot), default=0)
    form = BankForm(job.dtype, device, device != job.device, job.query_rank, tokens, bits=job.query_bits)
    scores, resident = (
        SHARD_EXAMPLES * widened_dtype(form.dtype).itemsize,
        form.bytes_per_query(job.layers),
    )  # of a query
    for block in _blocks(job.queries):
        train_batch, query_batch = _batches(job, available - block * (scores + resident * (host is None)))
        fits = train_batch and query_batch and (host is None or block * resident <= host)
        if fits or block == 1:
            yield _plan(job, form, block, max(1, train_batch), max(1, query_batch))
        if fits and (train_batch, query_batch) == _batches(job, _PLENTY):
            return


def _blocks(queries: int) -> Iterator[int]:
    """Numbers of queries, descending to 1, each the least for its number of sweeps; of very many sweeps, some."""
    sweeps = 1
    while sweeps < queries:
        yield -(-queries // sweeps)
        sweeps = max(sweeps + 1, int(1.1 * sweeps))
    yield 1


def _batches(job: Workload, available: int) -> tuple[int, int]:
    """The largest batches of training examples and of queries that are of use and fit; 0 where none does."""

    def batch(footprint: Footprint, count: int, wanted: int | None) -> int:
        most, fitting = wanted or min(count, footprint.filling(job.device)), footprint.affordable(available)
        return most if fitting >= most else 0 if wanted else fitting

    return batch(job.example, job.train, job.train_batch), batch(job.query, job.queries, job.query_batch)


def _plan(job: Workload, form: BankForm, block: int, train_batch: int, query_batch: int) -> Plan:
    """A plan of some sizes: query gradients are rotated back where training gradients would cost more to rotate."""
    rotated_back = {}
    for name, layer in job.layers.items() if job.strategy.basis else ():
        # Matrices of low rank cost next to nothing. What integers leave out must not depend on how often is swept.
        always = form.low_rank(layer) or form.quantized(layer)
        outputs, inputs = zip(*job.change_of_basis_flop(name, -(-job.queries // block)), strict=True)
        rotated_back[name] = always or outputs[0] < outputs[1], always or inputs[0] < inputs[1]
    form = replace(form, rotated_back=rotated_back)
    return Plan(job, job.query_batch or query_batch, job.train_batch or train_batch, block, form)


def _operations(plan: Plan, machine: Machine | None = None) -> float:
    """What the scores cost, roughly, with everything that is moved in operations that would take as long.

    Args:
        machine: how much slower than the device's own memory the host's is, where gradients are resident there.
    """
    job, total = plan.job, 0.0
    query, train = plan.stages()[-2:]
    per_byte = _HALF_OPERATIONS_PER_BYTE if job.half else _OPERATIONS_PER_BYTE.get(job.device.type, 16.0)
    for stage, footprint, batch in ((query, job.query, plan.query_batch), (train, job.example, plan.train_batch)):
        unfilled = max(1.0, _LEAST_TOKENS.get(job.device.type, 128) / (batch * footprint.tokens))
        total += unfilled * (stage.flop + stage.passes * per_byte * _MOVED_PER_SAVED * footprint.saved_bytes)
    per_moved = machine.matmul / machine.copy if plan.form.offloaded and machine is not None else per_byte
    read = per_moved * plan.bank_bytes
    if plan.form.bits is not None:  # numbers are made of integers, and read
        read += per_byte * 2 * plan.block * replace(plan.form, bits=None).bytes_per_query(job.layers)
    return total + plan.sweeps * -(-job.train // plan.train_batch) * read
