"""Trajectory Fisher: AdamW, linearised around a training and walked back in the space of drawn gradients.

Of a small change of the training, weights theta and the running mean m of gradients change, in step t = 0, ..., T - 1
with learning rate eta_t, by

    dm <- beta_1 dm + (1 - beta_1) (H dtheta + sum_i dw_i a_ti g_i)
    dtheta <- (1 - eta_t omega) dtheta - eta_t / (1 - beta_1^(t + 1)) P dm

where a_ti g_i is example i's part of the step's gradient, omega weight decay, and P what Adam divides by at the end of
training. With H = S^T W S, of drawn gradients S [draws, weights], the derivatives of a query's loss by dtheta and by dm
stay in the span of its gradient q and of S: `alpha q + S^T c` and `P (gamma q + S^T e)`. So the walk back needs nothing
but dot products, S P S^T, S P G^T, Q P S^T and Q P G^T, and all queries take it together. This module knows neither how
these are made nor how models are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import adam_conditioning, conditioning_digest, conditioning_scaling
from wherefrom.engine.loading import Examples
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.method import Context, Job, Method
from wherefrom.methods.trajectory.directions import ConditionedCovariances, Directions, by_layer, leading
from wherefrom.methods.trajectory.products import TrajectoryProducts, Visits
from wherefrom.methods.trajectory.steps import (
    Step,
    check_unclipped,
    recorded_checkpoints,
    step_settings,
    steps_of,
)
from wherefrom.runtime.errors import check_argument
from wherefrom.scoring.keep import Keep
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.fingerprint import MODEL, tensors_digest
from wherefrom.store.names import result_name

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


@dataclass(frozen=True, kw_only=True)
class TrajectoryFisher(Method):
    """Linearised AdamW with the sampled Fisher matrix for its curvature, walked back through a training.

    `values[q, t]` is about what `Magic` gives: to first order, leaving example t out of this very training raises the
    query's loss by `values[q, t]`. What is left out: the curvature is the mean of Fisher matrices along the training,
    sampled, instead of each batch's own; second moments are those of the end; and gradients are those at the checkpoint
    that is nearest to the step. There is no damping: training ends.

    It takes M = draws x visits gradients, their M x M dot products, and a product with that matrix in each step; best
    for all weights (`layers=[...]`). The dot products of draws are stored in `RUN/trajectory`, for other queries.

    Attributes:
        training: what made the study's model, of its training examples; it says which examples were in which batch. The
            study's history has its checkpoints: `Study(history=training.record(folder))`.
        draws: of each visit's targets; a visit is an example in a step.
        rank: take gradients in so many leading directions of each layer's outputs, and of its inputs: those of drawn
            gradients of the trained model, in Adam's coordinates. None is all. Layers of no more than rank x rank
            numbers stay whole, and so does a side of more than 4,000, such as a vocabulary. There is little curvature
            in what is left out, and dot products, which take most of the time, are of as many numbers less.
        seed: of the draws.

    Raises:
        InputError: a field is impossible, or gradients were clipped.
    """

    training: ReplayableTraining[Any]
    draws: int = 12
    rank: int | None = None
    seed: int = 0

    name: ClassVar[str] = "trajectory"
    full_precision: ClassVar[str] = "walk would multiply what rounding leaves out"

    def __post_init__(self) -> None:
        check_argument(self.draws >= 1, "draws", self.draws, "at least 1")
        check_argument(self.rank is None or self.rank >= 1, "rank", self.rank, "at least 1, or None for all")
        check_unclipped(self.training)

    def rise(self, train: int) -> float | None:
        return 1.0

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        checkpoints = recorded_checkpoints(context, self.training, type(self).__name__)
        visits, steps = trajectory(self.training, checkpoints)
        scaling = conditioning_scaling(context.sweep, adam_conditioning(checkpoints[-1], inside=True))
        models = [context.states.digest(each.checkpoint) for each in visits]
        recipe = self.training.recipe
        drawn = {
            "models": " + ".join(models),
            "visits": tensors_digest({str(number): each.examples for number, each in enumerate(visits)})[:16],
            "targets": f"{self.draws} drawn at each visit, seed {self.seed}",
            "directions": "all" if self.rank is None else f"{self.rank} leading ones of a layer's sides",
            "precision": str(context.sweep.precision),
            **conditioning_digest(scaling),
        }
        settings = {**drawn, **step_settings(self.training, steps)}

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            fingerprint = {key: each for key, each in context.fingerprint.items() if key != MODEL} | drawn
            cache, called = context.cache(context.folder("trajectory"), fingerprint), result_name("draws", fingerprint)
            there = context.ranks.first(cache.artifact(called).available)
            directions = self._directions(context, cache, visits[-1].checkpoint, scaling)
            products = TrajectoryProducts(context, visits, self.draws, self.seed, scaling, directions)
            found = products.compute(queries, result, among_draws=not there)
            among = cache.get_or_compute(called, lambda _: {name: found.pop(name) for name in ("draws", "train")})
            among = {name: each.to(context.sweep.device) for name, each in among.items()}
            values = walked_back(steps, recipe.betas[0], recipe.weight_decay, self.draws, visits, {**found, **among})
            examples = torch.cat([each.examples for each in visits]).to(values.device)
            total = values.new_zeros(len(values), len(context.train))
            return {"values": total.index_add_(1, examples, values)}

        return Job("trajectory", settings, compute, without=[MODEL])

    def _directions(
        self, context: Context[Any], cache: Cache, trained: Path, scaling: Mapping[str, Tensor]
    ) -> dict[str, Directions]:
        """In which gradients are taken: those of the trained model."""
        sweep, rank = context.sweep, self.rank
        if rank is None:
            return dict.fromkeys(sweep.layers, Directions())

        def compute(_: Unfinished) -> dict[str, Tensor]:
            like = torch.empty(0, dtype=sweep.dtype, device=sweep.device)
            collector = ConditionedCovariances(sweep.layers, scaling, rank, like)
            drawn = replace(context.train, loss="drawn", seed=self.seed)
            with context.states.entered(trained):
                sweep.run("covariances", drawn, collector, batch_size=sweep.execution.train_batch_size)
            return leading(collector.sums, rank)

        called = result_name("directions", cache.fingerprint)
        return by_layer(cache.get_or_compute(called, compute), sweep.layers, sweep.device)


def trajectory(
    training: ReplayableTraining[Any], checkpoints: Sequence[RecordedCheckpoint]
) -> tuple[list[Visits], list[Step]]:
    """Which gradients are taken at which checkpoint, the nearest to the step, and which of them a step has followed.

    These steps have the numbers of visits among all of them where others have examples' positions.
    """
    marks, steps = torch.tensor([each.step for each in checkpoints]), steps_of(training)
    nearest = [int((marks - step).abs().argmin()) for step in range(len(steps))]
    visits, numbers, start = list[Visits](), list[Tensor](), 0
    for number, checkpoint in enumerate(checkpoints):
        here = [each.followed for each, place in zip(steps, nearest, strict=True) if place == number]
        examples = torch.cat([*here, torch.empty(0, dtype=torch.int64)]).unique()
        visits.append(Visits(checkpoint.path, examples))
        numbers += [start + torch.searchsorted(examples, each) for each in here]
        start += len(examples)
    return visits, [replace(step, followed=each) for step, each in zip(steps, numbers, strict=True)]


def walked_back(
    steps: Sequence[Step],
    beta: float,
    weight_decay: float,
    draws: int,
    visits: Sequence[Visits],
    products: Mapping[str, Tensor],
) -> Tensor:
    """Minus the derivative of each query's measurement by the weight of each visit: [queries, visits].

    Args:
        beta: of the running mean of gradients.
        products: what `TrajectoryProducts` gives.
    """
    pairs, queries, among, train = (products[name] for name in ("pairs", "queries", "draws", "train"))
    weights = _draw_weights(steps, draws, visits).to(queries)
    values, alpha, gamma = torch.zeros_like(pairs), 1.0, 0.0
    by_weights, by_mean = torch.zeros_like(queries), torch.zeros_like(queries)  # c and e, [queries, draws]
    for number, step in reversed(list(enumerate(steps))):
        rate = step.rate / (1 - beta ** (number + 1))
        gamma -= rate * alpha
        by_mean -= rate * by_weights
        here = step.followed.to(pairs.device)
        found = gamma * pairs[:, here] + by_mean @ train[:, here]
        values[:, here] -= (1 - beta) * step.shares.to(pairs) * found
        left = 1 - step.rate * weight_decay
        alpha *= left
        by_weights *= left
        by_weights += (1 - beta) * weights * (gamma * queries + by_mean @ among)
        gamma *= beta
        by_mean *= beta
    return values


def _draw_weights(steps: Sequence[Step], draws: int, visits: Sequence[Visits]) -> Tensor:
    """W, [draws]: so that H is the mean over steps of what their losses have for a Fisher matrix."""
    each = torch.zeros(sum(len(place.examples) for place in visits), dtype=torch.float64)
    for step in steps:
        each[step.followed] += step.shares.double() / (len(steps) * draws)
    return torch.cat([part.repeat(draws) for part in each.split([len(place.examples) for place in visits])])
