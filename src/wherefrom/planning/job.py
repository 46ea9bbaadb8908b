"""What there is to score, and what an example of it costs: operations and bytes, by arithmetic on sizes.

This module does not know how scores are planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wherefrom.curvature.factors import Strategy
from wherefrom.engine.layers import TrackedLayer
from wherefrom.runtime.memory import Footprint
from wherefrom.runtime.precision import widened_dtype


@dataclass(frozen=True)
class Wanted:
    """What the caller has settled.

    Attributes:
        dtype: of resident query gradients.
        rank: of the two thin matrices that stand for each; None keeps them whole.
        bits: of the integers that stand for their numbers; None keeps the numbers.
        query_batch, train_batch: None leaves the size to the plan.
    """

    dtype: torch.dtype
    rank: int | None = None
    query_batch: int | None = None
    train_batch: int | None = None
    bits: int | None = None


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
class PerExample:
    """Operations for one example, over all layers.

    Attributes:
        forming: its gradients; gradient: the same in the eigenbasis, where there is one.
        covariance: its part of both covariances, of which only one triangle is computed, with what they are made of.
    """

    forming: float
    gradient: float
    covariance: float

    @classmethod
    def of(cls, job: Job, footprint: Footprint) -> PerExample:
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


def side_costs(job: Job, layer: str, sweeps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Operations for the left and the right side: all query gradients back, or all training gradients there."""
    tracked = job.layers[layer]
    outputs, columns = tracked.shape[0], tracked.columns(job.query.tokens_of(layer))
    terms = 2 if in_half(job) else 1  # see `precision.rotated`
    back = [
        0.0 if diagonal else 2.0 * terms * job.queries * outputs * columns * size
        for size, diagonal in zip((outputs, columns), tracked.diagonal_sides, strict=True)
    ]
    left, right = _sides_flop(job, tracked, job.example.tokens_of(layer))
    return (back[0], back[1]), (sweeps * job.train * left, sweeps * job.train * right)


def in_half(job: Job) -> bool:
    """Whether products take bfloat16 operands, rather than their values in float32."""
    return job.wanted.dtype == torch.bfloat16 and job.device.type == "cuda"


def _sides_flop(job: Job, layer: TrackedLayer, tokens: int) -> tuple[float, float]:
    """Operations for one example's gradient into the basis, left and right: its tokens or its rows, whichever fewer."""
    outputs, columns = layer.shape[0], layer.columns(tokens)
    if in_half(job):
        left, right = 4.0 * outputs**2 * tokens, 4.0 * columns**2 * tokens  # see `precision.rotated`
    else:
        left, right = 2.0 * outputs**2 * min(tokens, columns), 2.0 * columns**2 * min(tokens, outputs)
    no_left, no_right = layer.diagonal_sides
    return left * (not no_left), right * (not no_right)
