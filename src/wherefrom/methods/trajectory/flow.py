"""Trajectory flow: AdamW, linearised around where a training ended and walked back in a Krylov space.

The steps are those of `scores`, with the exact Gauss-Newton matrix H of the trained model for their curvature. The
derivatives of a query's loss by the weights, a, and by the running mean of gradients, c, are what polynomials in P H
make of its gradient, so they stay in the query's Krylov space, in which H is a small matrix. There the walk back is

    c <- c - eta_t / (1 - beta_1^(t + 1)) P a
    score_i <- score_i - (1 - beta_1) a_ti c . g_i, for the examples of step t
    a <- (1 - eta_t omega) a + (1 - beta_1) H c
    c <- beta_1 c

and needs of a training example nothing but the products of its gradient with the directions of the space: one pass
over the training set, against as many directions as there are iterations and queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import adam_conditioning, conditioning_digest, conditioning_scaling
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.curvature.operators import Operator
from wherefrom.curvature.solvers.gradient_flow import GradientFlow
from wherefrom.curvature.solvers.krylov import KrylovSpace
from wherefrom.curvature.solvers.solver import not_converged
from wherefrom.engine.loading import Examples
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.method import Context, Job, Method
from wherefrom.methods.trajectory.steps import (
    Step,
    check_unclipped,
    recorded_checkpoints,
    step_settings,
    steps_of,
)
from wherefrom.runtime.errors import LossError
from wherefrom.scoring.approximation import Approximation
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.keep import Keep
from wherefrom.scoring.results import Result
from wherefrom.scoring.scoring import Scoring
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import MODEL
from wherefrom.tasks.task import Batch


@dataclass(frozen=True, kw_only=True)
class TrajectoryFlow(Method):
    """Linearised AdamW with the exact Gauss-Newton matrix of the trained model, walked back through a training.

    `values[q, t]` is about what `Magic` gives: to first order, leaving example t out of this very training raises the
    query's loss by `values[q, t]`. What is left out: curvature, gradients and second moments are those of the end, and
    curvature is that of `flow.examples` examples. There is no damping: training ends.

    It costs what `Dot(adam=True, solver=flow)` does, and knows in which steps an example was seen.

    Attributes:
        training: what made the study's model, of its training examples; it says which examples were in which batch. The
            study's history has its last checkpoint: `Study(history=training.record(folder))`.
        flow: how large the Krylov space is, and of how many examples the curvature. Its tolerance, and what is said of
            its last iteration, are about gradient flow for the time of this training, in the same space.

    Raises:
        InputError: gradients were clipped.
        LossError: (when scored) with the curvature of its end, the training would have diverged.
    """

    training: ReplayableTraining[Any]
    flow: GradientFlow = field(default_factory=lambda: GradientFlow(examples=100, block_size=32))

    name: ClassVar[str] = "trajectory-flow"

    def __post_init__(self) -> None:
        check_unclipped(self.training)

    def rise(self, train: int) -> float | None:
        return 1.0

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        last = recorded_checkpoints(context, self.training, type(self).__name__)[-1]
        scaling = conditioning_scaling(context.sweep, adam_conditioning(last, inside=True))
        recipe, steps = self.training.recipe, steps_of(self.training)
        walk = Walk(steps, recipe.betas[0], recipe.weight_decay)
        approximation = Approximation(damping=walk.damping, solver=self.flow)
        scoring = _WalkedScoring(
            context.sweep, STRATEGIES["identity"], Operator({}, {}, scaling=scaling), queries, context.train,
            approximation, walk=walk,
        )  # fmt: skip
        settings = {
            "model at the end": context.states.digest(last.path),
            "precision": str(context.sweep.precision),
            **conditioning_digest(scaling),
            **approximation.approximation_settings(),
            **step_settings(self.training, steps),
        }

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            with context.states.entered(last.path):
                return scoring.pairwise(result)

        return Job(self.name + "-half" * context.sweep.execution.half_precision, settings, compute, without=[MODEL])

    def remark(self, result: Result | TokenScores) -> str | None:
        if isinstance(result, TokenScores):
            return None
        return not_converged(result.accuracy, self.flow, result.fingerprint["damping"])


# Derivatives only shrink on their way back, but for momentum; what has grown so much is on its way to infinity.
_GROWTH = 100


@dataclass(frozen=True)
class Walk:
    """The walk back through the steps of a training.

    Attributes:
        beta: of the running mean of gradients.
    """

    steps: Sequence[Step]
    beta: float
    weight_decay: float

    @property
    def scale(self) -> float:
        """What a step's loss is, in units of the mean over examples of their losses: the mean over steps."""
        return float(sum(float(each.shares.sum()) for each in self.steps)) / len(self.steps)

    @property
    def damping(self) -> float:
        """1 / (tau `scale`), tau being the sum of learning rates; where this x P^-1 is the damping, it is P."""
        return 1 / (self.scale * sum(each.rate for each in self.steps))

    def seen(self, train: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Of some training examples, those that each step has followed: their places among these, and their shares."""
        places = {each: place for place, each in enumerate(train)}
        found = []
        for step in self.steps:
            there = torch.tensor([each in places for each in step.followed.tolist()])
            here = torch.tensor([places[each] for each in step.followed[there].tolist()], dtype=torch.int64)
            found.append((here, step.shares[there]))
        return found

    def back(self, space: KrylovSpace, products: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Minus the derivative of each query's measurement by the weight of some training examples, [queries, train].

        Args:
            space: of the queries; its damping is `damping` x P^-1.
            products: of its directions with the examples' gradients, [directions, train].
            seen: which of them each step has followed.

        Raises:
            LossError: steps as large as these diverge with the curvature and the second moments of the end.
        """
        products = products.to(space.curvature)
        preconditioner = self.damping
        by_weights = space.coefficients  # D^-1 a
        by_mean, values = torch.zeros_like(by_weights), products.new_zeros(len(by_weights), products.shape[1])
        start = by_weights.norm()
        for number, (step, (here, shares)) in reversed(list(enumerate(zip(self.steps, seen, strict=True)))):
            by_mean = by_mean - step.rate / (1 - self.beta ** (number + 1)) * preconditioner * by_weights
            values[:, here] -= (1 - self.beta) * shares.to(values.device) * (by_mean @ products[:, here])
            curved = self.scale * by_mean @ space.curvature
            by_weights = (1 - step.rate * self.weight_decay) * by_weights + (1 - self.beta) * curved
            by_mean = self.beta * by_mean
            if not bool(by_weights.norm() <= _GROWTH * start):
                raise LossError(
                    f"TrajectoryFlow: walked back to step {number + 1} of {len(self.steps)}, derivatives have grown "
                    f"more than {_GROWTH} times: with the curvature and the second moments of its end, this training "
                    "would have diverged, so it is not linear enough for that. Use Magic(training=...), or "
                    "Dot(adam=True, solver=GradientFlow(...))."
                )
        return values


class _DirectionBank(GradientBank):
    """The directions of Krylov spaces where others have the gradients of queries."""

    spaces: Sequence[KrylovSpace] = ()


@dataclass(frozen=True, kw_only=True)
class _WalkedScoring(Scoring[Batch], Generic[Batch]):
    """Scores of a walk: training gradients are multiplied with directions, and these products walked back."""

    walk: Walk

    # Directions are the same each time but for a rotation that rounding decides.
    resumes: ClassVar[bool] = False

    def shards(self, queries: range, train: int) -> list[range]:
        flow = self.approximation.solver
        assert isinstance(flow, GradientFlow)
        return super().shards(range(len(queries) * flow.iterations), train)

    def bank(self, queries: range) -> GradientBank:
        system, layers, flow = self.system(), self.sweep.layers, self.approximation.solver
        assert system is not None and isinstance(flow, GradientFlow)
        gradients = system.space.join(self.gradients(queries, Operator({}, {})).whole(layers)).to(self.sweep.device)
        with self.within_memory(len(queries)):
            spaces, changes = flow.spaces(system, gradients)
            directions = torch.cat([each.release() for each in spaces])
            bank = _DirectionBank(layers, Operator({}, {}), len(directions), self.plan.form)
            for name, matrices in system.space.split(directions).items():
                bank.replace(name, matrices)
        bank.spaces, bank.accuracy = spaces, {"last_changes": changes[-1]}
        return bank

    def block(
        self, bank: Callable[[], GradientBank], queries: range, train: Sequence[int], part: Unfinished
    ) -> dict[str, Tensor]:
        resident = bank()
        assert isinstance(resident, _DirectionBank)
        found = super().block(lambda: resident, queries, train, part)
        products = found["values"].split([len(each.curvature) for each in resident.spaces])
        seen = self.walk.seen(train)
        values = [self.walk.back(*each, seen) for each in zip(resident.spaces, products, strict=True)]
        return {**found, "values": torch.cat(values).to(found["values"])}
