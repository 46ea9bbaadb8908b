"""What a run that does not exist yet would take: operations, time, memory, traffic and disk, stage by stage.

It is the plan that a real run would make (`plan_scores`), of a `Blueprint`, laid out over ranks: each sweeps its share
of a dataset, what is collected is added up over the ranks, and each holds all factors and all resident query
gradients. This module runs nothing and prints nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from wherefrom.cli.shared import StrategyName
from wherefrom.curvature.factors import checked_strategy
from wherefrom.hf.blueprint import Blueprint, measure
from wherefrom.planning.machine import Machine, matmul_speed
from wherefrom.planning.plan import Plan, plan_scores
from wherefrom.planning.stages import GIB, Stage
from wherefrom.planning.workload import Workload
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.memory import FREE_SHARE, free_memory
from wherefrom.runtime.precision import widened_dtype
from wherefrom.scoring.approximation import Approximation
from wherefrom.store.space import Step

# The part of a memory that a run may reach; the rest is the runtime's, the communication's, and fragments.
REACHABLE = 0.9
# The lowest of the parts that `benchmarks/efficiency.py` has measured, 0.56 to 0.66, rounded down.
_MEASURED_EFFICIENCY = 0.55
# What is tried where an alternative needs a number.
_FEW, _TOP, _RANK = 100_000, 1000, 32


@dataclass(frozen=True)
class PlanArguments:
    """A run and the machine for it.

    Attributes:
        model: 'gpt2', 'smollm2-135m', 'llama-3-8b', 'llama-3-70b', a model directory or its config.json.
        train: Training sequences.
        queries: Query sequences.
        length: Tokens of every sequence.
        ranks: GPUs, each with a share of the training set.
        device_memory: GiB of each; this machine's free memory by default.
        flops: TFLOP/s that a large product reaches on each GPU; measured on this machine by default, on its GPU if it
            has one.
        strategy: The curvature.
        layers: Names or patterns of the layers to track, such as '*.mlp.*'; linear ones but the head by default.
        fit_train: Fit the factors on so many of the training sequences; on all by default.
        half_precision: bfloat16 weights, products and query gradients.
        query_rank: Make query gradients pairs of matrices of this rank.
        query_bits: 8 makes query gradients integers of that size, with scales.
        shard_model: Spread the weights over the ranks (FSDP), and gather them block by block; by default each has all.
        offload_factors: Leave factors on the host, and move a layer's when it is its turn.
        top: Store only so many of each query's highest and lowest scores instead of the matrix.
        batch_size: Sequences a batch on each GPU; found by default.
        efficiency: The part of a large product's speed that a stage reaches; by default the lowest that was measured,
            on a CPU.
        eigen_flops: TFLOP/s of eigendecompositions in float64.
        bandwidth: GB/s between ranks.
        host_bandwidth: GB/s between a device and its host.
        host_memory: GiB of the host for each rank.
        page: Also write an HTML page.
    """

    model: str
    train: int
    queries: int
    length: int = 512
    ranks: int = 1
    device_memory: float | None = None
    flops: float | Literal["measured"] = "measured"
    strategy: StrategyName = "ekfac"
    layers: tuple[str, ...] = ()
    fit_train: int | None = None
    half_precision: bool = False
    query_rank: int | None = None
    query_bits: int | None = None
    shard_model: bool = False
    offload_factors: bool = False
    top: int | None = None
    batch_size: int | None = None
    efficiency: float = _MEASURED_EFFICIENCY
    eigen_flops: float = 1.0
    bandwidth: float = 100.0
    host_bandwidth: float = 25.0
    host_memory: float = 256.0
    page: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be computed, and what no machine is: InputError names the argument."""
        Approximation(query_rank=self.query_rank, query_bits=self.query_bits)
        for name in ("train", "queries", "ranks", "fit_train", "top", "batch_size"):
            count = getattr(self, name)
            check_argument(count is None or count >= 1, name, count, "at least 1")
        if self.fit_train is not None and self.fit_train > self.train:
            raise InputError(f"fit_train={self.fit_train}: expected at most the {self.train} training sequences.")
        for name in ("device_memory", "flops", "eigen_flops", "bandwidth", "host_bandwidth", "host_memory"):
            figure = getattr(self, name)
            check_argument(figure in (None, "measured") or 0 < figure < math.inf, name, figure, "a number above 0")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency={self.efficiency}: expected a part of the speed of products, 0 to 1.")

    @property
    def device(self) -> torch.device:
        """What the ranks have: this machine's, where its speed is to be measured."""
        return _here() if self.flops == "measured" else torch.device("cuda")

    @property
    def memory(self) -> float:
        """Bytes of each device."""
        return _free_memory(_here()) if self.device_memory is None else self.device_memory * GIB

    @property
    def machine(self) -> Machine:
        """Speeds, and the host's memory."""
        matmul = _measured_speed(_here(), self.dtype) if self.flops == "measured" else self.flops * 1e12
        return Machine(matmul, self.host_bandwidth * 1e9, int(self.host_memory * GIB))

    @property
    def dtype(self) -> torch.dtype:
        """Of products and query gradients."""
        return torch.bfloat16 if self.half_precision else torch.float32


def _here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# What is measured is the same for a run and its alternatives.
_measured_speed, _free_memory, _measured = cache(matmul_speed), cache(free_memory), cache(measure)


@dataclass(frozen=True)
class Estimate:
    """A run on paper."""

    arguments: PlanArguments

    def __post_init__(self) -> None:
        self.arguments.check()  # not where they are made: of what cannot be made, tyro says so in words of its own

    @property
    def blueprint(self) -> Blueprint:
        """The model's shape, and what a sequence takes."""
        given = self.arguments
        patterns = given.layers or None
        return _measured(
            given.model, given.length, half_precision=given.half_precision, patterns=patterns, device=given.device
        )

    @cached_property
    def plan(self) -> Plan:
        """What the fit and the scores would be planned as."""
        given, blueprint = self.arguments, self.blueprint
        job = Workload(
            layers=blueprint.layers,
            strategy=checked_strategy(given.strategy),
            queries=given.queries,
            train=given.train,
            fit_train=given.fit_train or given.train,
            query=blueprint.example,
            example=blueprint.example,
            dtype=given.dtype,
            usable=0,
            device=given.device,
            query_rank=given.query_rank,
            query_bits=given.query_bits,
            query_batch=given.batch_size,
            train_batch=given.batch_size,
            offload_factors=given.offload_factors,
        )
        usable = int(FREE_SHARE * (REACHABLE * given.memory - self.weight_bytes)) - job.factor_bytes
        return plan_scores(replace(job, usable=usable), given.machine)

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of the plan, each with its traffic and time, and the weights in memory."""
        return [self._on_ranks(stage, *self._traffic[stage.name]) for stage in self.plan.stages()]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> Stage:
        """The stage that takes the most memory on a device."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def host_bytes(self) -> float:
        """What a rank takes on its host: covariances with the bases that are made of them, or the factors."""
        job, plan = self.plan.job, self.plan
        fitting = job.basis_bytes + max(job.basis_bytes, job.eigenvalue_bytes)
        return fitting * job.offload_factors + plan.bank_bytes * plan.form.offloaded

    @property
    def lacking(self) -> str | None:
        """What there is too little of: "device memory" or "host memory"; None when all fits."""
        if self.peak.bytes > REACHABLE * self.arguments.memory:
            return "device memory"
        return "host memory" if self.host_bytes > REACHABLE * self.arguments.machine.host else None

    @property
    def weight_bytes(self) -> float:
        """Of the model on one rank."""
        blueprint, given = self.blueprint, self.arguments
        sharded = blueprint.weight_bytes / given.ranks + blueprint.gathered_bytes
        return sharded if given.shard_model else blueprint.weight_bytes

    @property
    def disk(self) -> dict[str, Step]:
        """What stays in the run directory, and the most that is there while it is made."""
        return self.plan.disk(self.arguments.ranks, self.arguments.top)

    @cached_property
    def alternatives(self) -> dict[str, Estimate]:
        """The same run with one option more or less, and with all that save something."""
        given, few = self.arguments, _FEW if self.plan.job.fit_train > _FEW else self.arguments.fit_train
        savings: dict[str, dict[str, Any]] = {
            "--half-precision": {"half_precision": True},
            f"--query-rank {_RANK}": {"query_rank": given.query_rank or _RANK, "query_bits": None},
            "--offload-factors": {"offload_factors": self.plan.job.factor_bytes > 0},
            "--shard-model": {"shard_model": given.ranks > 1},
            f"--fit-train {_FEW}": {"fit_train": few},
            f"--top {_TOP}": {"top": given.top or min(_TOP, given.train)},
        }
        changes = {f"with {option}": change for option, change in savings.items()}
        changes["with all of these"] = {name: value for each in savings.values() for name, value in each.items()}
        for name in ("half_precision", "offload_factors", "shard_model"):
            changes[f"without --{name.replace('_', '-')}"] = {name: False}
        others = {option: replace(given, **change) for option, change in changes.items()}
        return {option: Estimate(other) for option, other in others.items() if other != given}

    def parts(self, stage: Stage) -> dict[str, float]:
        """The seconds that are expected of a stage, by what they are for."""
        given, machine, flop = self.arguments, self.arguments.machine, self._slowest_flop(stage)
        speed = given.efficiency * machine.matmul if stage.passes else given.eigen_flops * 1e12
        return {
            "arithmetic": flop / speed,
            "exchange between ranks": stage.sent / (given.bandwidth * 1e9),
            "copies to and from the host": stage.copied / machine.copy,
        }

    def _on_ranks(self, stage: Stage, sent: float, copied: float) -> Stage:
        memory = {"weights": self.weight_bytes, **stage.memory}
        stage = replace(stage, memory=memory, sent=sent, copied=copied)
        arithmetic, *traffic = self.parts(stage).values()
        full_speed = arithmetic * (self.arguments.efficiency if stage.passes else 1)
        return replace(stage, seconds=arithmetic + sum(traffic), least_seconds=max(full_speed, *traffic))

    def _slowest_flop(self, stage: Stage) -> float:
        """Operations of the rank with the most of them: the most examples, or layers to decompose."""
        ranks, job = self.arguments.ranks, self.plan.job
        if stage.passes:
            return stage.flop * -(-stage.passes // ranks) / stage.passes
        costs = {name: job.eigendecomposition_flop(layer) for name, layer in job.layers.items()}
        return max(sum(costs[name] for name in Ranks(rank, ranks).share_of(costs)) for rank in range(ranks))

    @cached_property
    def _traffic(self) -> dict[str, tuple[float, float]]:
        """By stage, the bytes that each rank sends, and those between its device and its host."""
        given, plan, form, job = self.arguments, self.plan, self.plan.form, self.plan.job
        others, basis, factors = (
            (given.ranks - 1) / given.ranks,
            job.basis_bytes,
            job.basis_bytes + job.eigenvalue_bytes,
        )
        bank = job.queries * form.bytes_per_query(job.layers)

        def sent(total: float, batches: int) -> float:
            """Sums that all ranks get, and sharded weights that are gathered forward and again backward."""
            return 2 * others * (total + batches * self.blueprint.weight_bytes * given.shard_model)

        fit, query = self._batches(job.fit_train, plan.fit_batch), self._batches(job.queries, plan.query_batch)
        train, offload = plan.sweeps * self._batches(job.train, plan.train_batch), job.offload_factors
        rotating = self._rotating_bytes() * offload + plan.bank_bytes * form.offloaded
        return {
            "covariance": (sent(basis, fit), fit * basis * offload),
            "eigendecomposition": (basis * others, 2 * basis / given.ranks * offload),
            "eigenvalues": (sent(factors - basis, fit), fit * factors * offload),
            "query gradients": (sent(bank, query), query * factors * offload + bank * form.offloaded),
            "pairwise scores": (sent(4 * job.queries * job.train, train), train * rotating),
        }

    def _batches(self, examples: int, size: int) -> int:
        """Of the rank with the most examples."""
        share = -(-examples // self.arguments.ranks)
        return -(-share // size)

    def _rotating_bytes(self) -> float:
        """Of the eigenvectors that training gradients are multiplied with in every batch."""
        found = 0
        for name, back in self.plan.form.rotated_back.items():
            shape = self.blueprint.layers[name].padded_shape
            found += sum(size**2 for size, chosen in zip(shape, back, strict=True) if not chosen)
        return found * widened_dtype(self.plan.job.dtype).itemsize
