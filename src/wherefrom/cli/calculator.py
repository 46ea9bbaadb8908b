"""What a run that does not exist yet would take: operations, time, memory, traffic and disk, stage by stage.

Arithmetic on a `Blueprint` and the plan that a real run would make with it (`plan_scores`). The layout that is counted
is that of `ranks`: every rank sweeps its share of a dataset, what is collected is added up over the ranks, and every
rank holds all factors and all resident query gradients. This module runs nothing
and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from wherefrom.curvature.factors import checked_strategy
from wherefrom.hf.blueprint import Blueprint
from wherefrom.planning.job import Job, Wanted, factor_bytes
from wherefrom.planning.machine import Machine
from wherefrom.planning.plan import SHARD_BYTES, Cost, Plan, plan_scores
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.memory import FREE_SHARE
from wherefrom.runtime.precision import widened_dtype
from wherefrom.scoring.options import Options
from wherefrom.store.space import Step

# The lowest of the parts that `benchmarks/efficiency.py` has measured, 0.56 to 0.66, rounded down.
MEASURED_EFFICIENCY = 0.55
# Operations of a symmetric eigendecomposition with eigenvectors, a size cubed times this (Golub & Van Loan, 8.3).
_EIGH_FLOP = 9.0
# Matrices of a size that are there at once while one is decomposed: itself, its eigenvectors, and working room.
_EIGH_COPIES = 4
# The part of a memory that a run may reach; the rest is the runtime's, the communication's, and fragments.
REACHABLE = 0.9
# What is tried where an alternative needs a number.
_FEW, _TOP = 100_000, 1000


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for; all figures are those of one rank.

    Attributes:
        memory, host_memory: bytes.
        matmul: floating-point operations a second of a large product.
        eigen: operations a second of an eigendecomposition in float64.
        efficiency: the part of `matmul` that the stages are expected to reach.
        link, copy: bytes a second between ranks, and between a device and its host.
    """

    ranks: int
    memory: float
    host_memory: float
    matmul: float
    eigen: float
    efficiency: float
    link: float
    copy: float
    device: torch.device

    def __post_init__(self) -> None:
        """Refuse what no machine is: InputError names the figure."""
        if self.ranks < 1:
            raise InputError(f"ranks={self.ranks}: expected at least 1.")
        for name in ("memory", "host_memory", "matmul", "eigen", "link", "copy"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency={self.efficiency}: expected a part of the speed of products, 0 to 1.")


@dataclass(frozen=True)
class Request:
    """What is to be computed, and how it is laid out.

    Attributes:
        fit_train: the training sequences that factors are fitted on.
        shard_model: weights lie on the ranks in parts, and are gathered block by block (FSDP).
        offload_factors: sums and factors lie on the host; a layer's are moved when it is its turn.
        top: only the highest scores of each query are kept; None keeps the matrix.
        batch_size: of queries and training sequences; None leaves it to the plan.
    """

    strategy: str
    train: int
    fit_train: int
    queries: int
    query_rank: int | None = None
    half_precision: bool = False
    shard_model: bool = False
    offload_factors: bool = False
    top: int | None = None
    batch_size: int | None = None
    query_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be computed: InputError names the argument."""
        Options(query_rank=self.query_rank, query_bits=self.query_bits)
        for name in ("train", "fit_train", "queries", "query_rank", "top", "batch_size"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"{name}={count}: expected at least 1.")
        if self.fit_train > self.train:
            raise InputError(f"fit_train={self.fit_train}: expected at most the {self.train} training sequences.")


@dataclass(frozen=True)
class Stage:
    """What one stage takes.

    Attributes:
        passes: sequences that go forward and backward, over all ranks.
        flop: operations over all ranks.
        memory: bytes on each rank's device, by what they are for.
        sent: bytes that each rank sends.
        copied: bytes between each device and its host.
        seconds: arithmetic at the expected efficiency, then everything that is sent and copied.
        least_seconds: all at full speed and at the same time; a lower bound.
    """

    name: str
    passes: int
    flop: float
    memory: Mapping[str, float]
    sent: float
    copied: float
    seconds: float
    least_seconds: float

    @property
    def bytes(self) -> float:
        """All that it takes on a rank's device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """A run on paper.

    Attributes:
        request, hardware: what was asked.
        blueprint: the model's shape.
    """

    blueprint: Blueprint
    request: Request
    hardware: Hardware

    @cached_property
    def plan(self) -> Plan:
        """What the scores would be planned as."""
        return self._plan(self.request.train)

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of a fit and a score, in their order."""
        costs = {cost.stage: cost for cost in self._plan(self.request.fit_train).costs()[:-2]}
        costs |= {cost.stage: cost for cost in self.plan.costs()[-2:]}
        makers: dict[str, Callable[[Cost], Stage]] = {
            "covariance": self._covariance,
            "eigenvalues": self._eigenvalues,
            "query gradients": self._query_gradients,
            "pairwise scores": self._pairwise_scores,
        }
        stages = [makers[name](cost) for name, cost in costs.items()]
        if checked_strategy(self.request.strategy).basis:
            stages.insert(1, self._eigendecomposition())
        return stages

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
        fitting = max(2 * self.basis_bytes, self.basis_bytes + self.eigenvalue_bytes)
        streamed = self.plan.bank_bytes if self.plan.form.streamed else 0
        return fitting * self.request.offload_factors + streamed

    @property
    def lacking(self) -> str | None:
        """What there is too little of: "device memory" or "host memory"; None when all fits."""
        if self.peak.bytes > REACHABLE * self.hardware.memory:
            return "device memory"
        return "host memory" if self.host_bytes > REACHABLE * self.hardware.host_memory else None

    @property
    def weight_bytes(self) -> float:
        """Of the model on one rank."""
        if not self.request.shard_model:
            return self.blueprint.weight_bytes
        return self.blueprint.weight_bytes / self.hardware.ranks + self.blueprint.gathered_bytes

    @property
    def basis_bytes(self) -> int:
        """Of the covariances, or of their eigenvectors, of all layers."""
        strategy = checked_strategy(self.request.strategy)
        return factor_bytes(self.blueprint.layers, replace(strategy, eigenvalues="none"), self._dtype)

    @property
    def eigenvalue_bytes(self) -> int:
        """Of the eigenvalues of all layers."""
        strategy = checked_strategy(self.request.strategy)
        return factor_bytes(self.blueprint.layers, replace(strategy, basis=None), self._dtype)

    @cached_property
    def disk(self) -> dict[str, Step]:
        """What stays in the run directory, and the most that is there while it is made."""
        ranks, top = self.hardware.ranks, self.request.top
        steps = self.plan.disk(ranks)
        return steps if top is None else {**steps, "scores": self.plan.blocks().top_step(ranks, top)}

    def alternatives(self, measured: Mapping[bool, Blueprint]) -> dict[str, Estimate]:
        """The same run with one option more or less, and with all that save something.

        Args:
            measured: the blueprints in half precision, and not.
        """
        asked = self.request
        savings: dict[str, dict[str, Any]] = {
            "--half-precision": {"half_precision": True},
            "--query-rank 32": {"query_rank": asked.query_rank or 32, "query_bits": None},
            "--offload-factors": {"offload_factors": self.basis_bytes + self.eigenvalue_bytes > 0},
            "--shard-model": {"shard_model": self.hardware.ranks > 1},
            f"--fit-train {_FEW}": {"fit_train": min(asked.fit_train, _FEW)},
            f"--top {_TOP}": {"top": asked.top or min(_TOP, asked.train)},
        }
        requests = {f"with {option}": replace(asked, **change) for option, change in savings.items()}
        requests["with all of these"] = replace(asked, **{k: v for each in savings.values() for k, v in each.items()})
        flags: dict[str, dict[str, Any]] = {
            f"without --{name.replace('_', '-')}": {name: False}
            for name in ("half_precision", "offload_factors", "shard_model")
        }
        requests |= {option: replace(asked, **change) for option, change in flags.items()}
        return {
            name: replace(self, request=other, blueprint=measured[other.half_precision])
            for name, other in requests.items()
            if other != asked
        }

    # A rank's share, and the plan

    def _share(self, examples: int) -> int:
        """The largest share of a rank."""
        return -(-examples // self.hardware.ranks)

    def _batches(self, examples: int, size: int) -> int:
        """How many a rank passes over."""
        return -(-self._share(examples) // size)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.request.half_precision else torch.float32

    def _plan(self, train: int) -> Plan:
        asked, hardware = self.request, self.hardware
        job = Job(
            layers=self.blueprint.layers,
            strategy=checked_strategy(asked.strategy),
            queries=asked.queries,
            train=train,
            query=self.blueprint.example,
            example=self.blueprint.example,
            wanted=Wanted(self._dtype, asked.query_rank, asked.batch_size, asked.batch_size, asked.query_bits),
            usable=0,
            device=hardware.device,
            factors_on_host=asked.offload_factors,
        )
        usable = int(FREE_SHARE * (REACHABLE * hardware.memory - self.weight_bytes)) - job.factor_bytes
        machine = Machine(hardware.matmul, hardware.copy, int(hardware.host_memory))
        return plan_scores(replace(job, usable=usable), machine)

    # The stages

    def _covariance(self, cost: Cost) -> Stage:
        return self._fitted(cost, self.basis_bytes, self.basis_bytes)

    def _eigenvalues(self, cost: Cost) -> Stage:
        return self._fitted(cost, self.eigenvalue_bytes, self.basis_bytes + self.eigenvalue_bytes)

    def _fitted(self, cost: Cost, sums: int, moved: int) -> Stage:
        """A sweep of the fit, whose sums all ranks add up; with factors on the host, each batch moves some."""
        batches = self._batches(self.request.fit_train, self.plan.fit_batch)
        copied = batches * moved * self.request.offload_factors
        return self._swept(cost, self.plan.fit_batch, self._reduced(sums) + self._gathered(batches), copied)

    def _eigendecomposition(self) -> Stage:
        """Of both covariances of every layer, the layers spread over the ranks."""
        layers, ranks = self.blueprint.layers, self.hardware.ranks
        costs = {name: _EIGH_FLOP * sum(size**3 for size in layer.shape) for name, layer in layers.items()}
        most = max(sum(costs[name] for name in Ranks(index, ranks).share_of(costs)) for index in range(ranks))
        memory = {"weights": self.weight_bytes, "factors": 2.0 * self._on_device(self.basis_bytes)}
        memory["working room"] = 8.0 * _EIGH_COPIES * max(max(layer.shape) for layer in layers.values()) ** 2
        sent = self.basis_bytes * (ranks - 1) / ranks
        copied = 2 * self.basis_bytes / ranks * self.request.offload_factors
        seconds = most / self.hardware.eigen
        return self._timed("eigendecomposition", 0, sum(costs.values()), memory, sent, copied, seconds)

    def _query_gradients(self, cost: Cost) -> Stage:
        """Every rank's share of the queries, whose gradients all ranks then get."""
        plan = self.plan
        batches = self._batches(self.request.queries, plan.query_batch)
        bank = self.request.queries * plan.form.bytes_per_query(plan.job.layers)
        copied = batches * (self.basis_bytes + self.eigenvalue_bytes) * self.request.offload_factors
        copied += bank * plan.form.streamed
        return self._swept(cost, plan.query_batch, self._reduced(bank) + self._gathered(batches), copied, bank=True)

    def _pairwise_scores(self, cost: Cost) -> Stage:
        plan = self.plan
        batches = plan.sweeps * self._batches(self.request.train, plan.train_batch)
        copied = batches * self._rotating_bytes() * self.request.offload_factors
        copied += batches * plan.bank_bytes * plan.form.streamed
        sent = self._reduced(4 * self.request.queries * self.request.train) + self._gathered(batches)
        return self._swept(cost, plan.train_batch, sent, copied, bank=True, room=SHARD_BYTES)

    def _swept(self, cost: Cost, batch: int, sent: float, copied: float, bank: bool = False, room: float = 0) -> Stage:
        """A sweep; the slowest rank has the largest share of its operations."""
        plan = self.plan
        memory = {
            "weights": self.weight_bytes,
            "a batch": 1.0 * self.blueprint.example.batch_bytes(batch),
            "factors": 2.0 * plan.job.factor_bytes,
            "query gradients": 1.0 * plan.bank_bytes * (bank and not plan.form.streamed),
            "working room": room,
        }
        seconds = cost.flop * self._share(cost.passes) / cost.passes / self.hardware.matmul
        return self._timed(cost.stage, cost.passes, cost.flop, memory, sent, copied, seconds, self.hardware.efficiency)

    def _timed(
        self,
        name: str,
        passes: int,
        flop: float,
        memory: Mapping[str, float],
        sent: float,
        copied: float,
        arithmetic: float,
        efficiency: float = 1.0,
    ) -> Stage:
        parts = (arithmetic, sent / self.hardware.link, copied / self.hardware.copy)
        expected = arithmetic / efficiency + sum(parts[1:])
        return Stage(name, passes, flop, memory, sent, copied, expected, max(parts))

    # Bytes

    def _on_device(self, total: float) -> float:
        """All layers' bytes, or only the largest layer's part where the rest is on the host."""
        largest = max(sum(size**2 for size in layer.padded_shape) for layer in self.blueprint.layers.values())
        return 4.0 * largest if self.request.offload_factors else total

    def _rotating_bytes(self) -> float:
        """Of the eigenvectors that training gradients are multiplied with in every batch."""
        found = 0
        for name, back in self.plan.form.rotated_back.items():
            shape = self.blueprint.layers[name].padded_shape
            found += sum(size**2 for size, chosen in zip(shape, back, strict=True) if not chosen)
        return found * widened_dtype(self._dtype).itemsize

    def _reduced(self, size: float) -> float:
        """What a rank sends so that all have the sum of what each has."""
        ranks = self.hardware.ranks
        return 2 * size * (ranks - 1) / ranks

    def _gathered(self, batches: int) -> float:
        """What a rank receives of sharded weights: all of the others', forward and again backward."""
        ranks = self.hardware.ranks
        return 2.0 * batches * self.blueprint.weight_bytes * (ranks - 1) / ranks * self.request.shard_model
