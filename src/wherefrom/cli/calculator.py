"""What a run that does not exist yet would take: operations, time, memory, traffic and disk, stage by stage.

It is the plan that a real run would make (`plan_scores`), of a `Blueprint`, laid out over ranks: each sweeps its share
of a dataset, what is collected is added up over the ranks, and each holds all factors and all resident query
gradients. This module runs nothing and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from wherefrom.cli.shared import StrategyName
from wherefrom.curvature.factors import checked_strategy
from wherefrom.hf.blueprint import Blueprint
from wherefrom.planning.job import Job, basis_bytes, eigenvalue_bytes
from wherefrom.planning.machine import Machine
from wherefrom.planning.plan import Plan, plan_scores
from wherefrom.planning.stages import Stage
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.memory import FREE_SHARE
from wherefrom.runtime.precision import widened_dtype
from wherefrom.scoring.options import Options
from wherefrom.store.space import Step

# The part of a memory that a run may reach; the rest is the runtime's, the communication's, and fragments.
REACHABLE = 0.9
# What is tried where an alternative needs a number.
_FEW, _TOP, _RANK = 100_000, 1000, 32


@dataclass(frozen=True)
class Hardware(Machine):
    """What a run is planned for; all figures are those of one rank.

    Attributes:
        ranks: how many there are.
        memory: bytes on the device.
        eigen: operations a second of an eigendecomposition in float64.
        efficiency: the part of `matmul` that the stages are expected to reach.
        link: bytes a second between ranks.
    """

    ranks: int
    memory: float
    eigen: float
    efficiency: float
    link: float
    device: torch.device

    def __post_init__(self) -> None:
        """Refuse what no machine is: InputError names the figure."""
        if self.ranks < 1:
            raise InputError(f"ranks={self.ranks}: expected at least 1.")
        for name in ("memory", "host", "matmul", "eigen", "link", "copy"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency={self.efficiency}: expected a part of the speed of products, 0 to 1.")


@dataclass(frozen=True)
class Request:
    """What is to be computed, and how it is laid out.

    Attributes:
        train: Training sequences.
        queries: Query sequences.
        strategy: The curvature.
        fit_train: Fit the factors on so many of the training sequences; on all by default.
        half_precision: bfloat16 weights, products and query gradients.
        query_rank: Make query gradients pairs of matrices of this rank.
        query_bits: 8 makes query gradients integers of that size, with scales.
        shard_model: Spread the weights over the ranks (FSDP), and gather them block by block; by default each has all.
        offload_factors: Leave factors on the host, and move a layer's when it is its turn.
        top: Store only so many of each query's highest and lowest scores instead of the matrix.
        batch_size: Sequences a batch on each rank; found by default.
    """

    train: int
    queries: int
    strategy: StrategyName = "ekfac"
    fit_train: int | None = None
    half_precision: bool = False
    query_rank: int | None = None
    query_bits: int | None = None
    shard_model: bool = False
    offload_factors: bool = False
    top: int | None = None
    batch_size: int | None = None

    def check(self) -> None:
        """Refuse what cannot be computed: InputError names the argument."""
        Options(query_rank=self.query_rank, query_bits=self.query_bits)
        for name in ("train", "fit_train", "queries", "top", "batch_size"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"{name}={count}: expected at least 1.")
        if self.fit_train is not None and self.fit_train > self.train:
            raise InputError(f"fit_train={self.fit_train}: expected at most the {self.train} training sequences.")


@dataclass(frozen=True)
class Estimate:
    """A run on paper.

    Attributes:
        blueprint: the model's shape.
    """

    blueprint: Blueprint
    request: Request
    hardware: Hardware

    def __post_init__(self) -> None:
        self.request.check()  # not where it is made: of a dataclass that cannot be made, tyro says so in other words

    @cached_property
    def plan(self) -> Plan:
        """What the fit and the scores would be planned as."""
        request, hardware = self.request, self.hardware
        job = Job(
            layers=self.blueprint.layers,
            strategy=checked_strategy(request.strategy),
            queries=request.queries,
            train=request.train,
            query=self.blueprint.example,
            example=self.blueprint.example,
            dtype=torch.bfloat16 if request.half_precision else torch.float32,
            usable=0,
            device=hardware.device,
            query_rank=request.query_rank,
            query_bits=request.query_bits,
            query_batch=request.batch_size,
            train_batch=request.batch_size,
            fit_train=request.fit_train,
            offload_factors=request.offload_factors,
        )
        usable = int(FREE_SHARE * (REACHABLE * hardware.memory - self.weight_bytes)) - job.factor_bytes
        return plan_scores(replace(job, usable=usable), hardware)

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of the plan on this hardware."""
        return [self._on_hardware(stage, *self._traffic[stage.name]) for stage in self.plan.stages()]

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
        fitting = self.basis_bytes + max(self.basis_bytes, self.eigenvalue_bytes)
        return fitting * self.request.offload_factors + self.plan.bank_bytes * self.plan.form.offloaded

    @property
    def lacking(self) -> str | None:
        """What there is too little of: "device memory" or "host memory"; None when all fits."""
        if self.peak.bytes > REACHABLE * self.hardware.memory:
            return "device memory"
        return "host memory" if self.host_bytes > REACHABLE * self.hardware.host else None

    @property
    def weight_bytes(self) -> float:
        """Of the model on one rank."""
        if not self.request.shard_model:
            return self.blueprint.weight_bytes
        return self.blueprint.weight_bytes / self.hardware.ranks + self.blueprint.gathered_bytes

    @property
    def basis_bytes(self) -> int:
        """Of the covariances, or of their eigenvectors, of all layers."""
        return basis_bytes(self.blueprint.layers, checked_strategy(self.request.strategy), torch.float32)

    @property
    def eigenvalue_bytes(self) -> int:
        """Of the eigenvalues of all layers."""
        return eigenvalue_bytes(self.blueprint.layers, checked_strategy(self.request.strategy), torch.float32)

    @property
    def disk(self) -> dict[str, Step]:
        """What stays in the run directory, and the most that is there while it is made."""
        return self.plan.disk(self.hardware.ranks, self.request.top)

    def alternatives(self, measured: Mapping[bool, Blueprint]) -> dict[str, Estimate]:
        """The same run with one option more or less, and with all that save something.

        Args:
            measured: the blueprints in half precision, and not.
        """
        given, factors = self.request, self.basis_bytes + self.eigenvalue_bytes
        few = _FEW if (given.fit_train or given.train) > _FEW else given.fit_train
        savings: dict[str, dict[str, Any]] = {
            "--half-precision": {"half_precision": True},
            f"--query-rank {_RANK}": {"query_rank": given.query_rank or _RANK, "query_bits": None},
            "--offload-factors": {"offload_factors": factors > 0},
            "--shard-model": {"shard_model": self.hardware.ranks > 1},
            f"--fit-train {_FEW}": {"fit_train": few},
            f"--top {_TOP}": {"top": given.top or min(_TOP, given.train)},
        }
        changes = {f"with {option}": change for option, change in savings.items()}
        changes["with all of these"] = {name: value for each in savings.values() for name, value in each.items()}
        for name in ("half_precision", "offload_factors", "shard_model"):
            changes[f"without --{name.replace('_', '-')}"] = {name: False}
        requests = {option: replace(given, **change) for option, change in changes.items()}
        return {
            option: replace(self, request=request, blueprint=measured[request.half_precision])
            for option, request in requests.items()
            if request != given
        }

    def _on_hardware(self, stage: Stage, sent: float, copied: float) -> Stage:
        """A stage with its traffic, and the time that both take."""
        hardware = self.hardware
        arithmetic = self._slowest_flop(stage) / (hardware.matmul if stage.passes else hardware.eigen)
        traffic = sent / hardware.link, copied / hardware.copy
        return replace(
            stage,
            memory={"weights": self.weight_bytes, **stage.memory},
            sent=sent,
            copied=copied,
            seconds=arithmetic / (hardware.efficiency if stage.passes else 1) + sum(traffic),
            least_seconds=max(arithmetic, *traffic),
        )

    def _slowest_flop(self, stage: Stage) -> float:
        """Operations of the rank with the most of them: the most examples, or layers to decompose."""
        ranks, job = self.hardware.ranks, self.plan.job
        if stage.passes:
            return stage.flop * -(-stage.passes // ranks) / stage.passes
        costs = {name: job.eigendecomposition_flop(layer) for name, layer in job.layers.items()}
        return max(sum(costs[name] for name in Ranks(rank, ranks).share_of(costs)) for rank in range(ranks))

    @cached_property
    def _traffic(self) -> dict[str, tuple[float, float]]:
        """By stage, the bytes that each rank sends, and those between its device and its host."""
        request, plan, form, ranks = self.request, self.plan, self.plan.form, self.hardware.ranks
        basis, factors, others = self.basis_bytes, self.basis_bytes + self.eigenvalue_bytes, (ranks - 1) / ranks
        bank = request.queries * form.bytes_per_query(plan.job.layers)

        def sent(total: float, batches: int) -> float:
            """Sums that all ranks get, and sharded weights that are gathered forward and again backward."""
            return 2 * others * (total + batches * self.blueprint.weight_bytes * request.shard_model)

        fit, query = self._batches(plan.job.fitted, plan.fit_batch), self._batches(request.queries, plan.query_batch)
        train, offload = plan.sweeps * self._batches(request.train, plan.train_batch), request.offload_factors
        return {
            "covariance": (sent(basis, fit), fit * basis * offload),
            "eigendecomposition": (basis * others, 2 * basis / ranks * offload),
            "eigenvalues": (sent(factors - basis, fit), fit * factors * offload),
            "query gradients": (sent(bank, query), query * factors * offload + bank * form.offloaded),
            "pairwise scores": (
                sent(4 * request.queries * request.train, train),
                train * (self._rotating_bytes() * offload + plan.bank_bytes * form.offloaded),
            ),
        }

    def _batches(self, examples: int, size: int) -> int:
        """Of the rank with the most examples."""
        share = -(-examples // self.hardware.ranks)
        return -(-share // size)

    def _rotating_bytes(self) -> float:
        """Of the eigenvectors that training gradients are multiplied with in every batch."""
        found = 0
        for name, back in self.plan.form.rotated_back.items():
            shape = self.blueprint.layers[name].padded_shape
            found += sum(size**2 for size, chosen in zip(shape, back, strict=True) if not chosen)
        return found * widened_dtype(self.plan.job.dtype).itemsize
