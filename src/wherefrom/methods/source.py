"""SOURCE: what training did with an example, by gradient descent unrolled segment by segment.

Bae et al. 2024 (arXiv 2405.12186). A training is cut into segments in which curvature H_l and gradients g_l are taken
to be constant, the means over the segment's checkpoints. With the learning rate eta and K steps of a segment,

    S_l = exp(-eta K H_l)    r_l = (1 - exp(-eta K H_l)) H_l^-1 g_l    score = g_query^T sum_l S_L ... S_{l+1} r_l

(their equations for the Jacobian, the response and the estimator). The curvature is that of averaged covariances and,
in their eigenvectors, averaged eigenvalues; so S and r are filters. Steps -eta P g of Adam, with P the mean of a
segment's checkpoints, are these in coordinates P^(-1/2) theta (see `conditioning`): with H'_l = P^(1/2) H_l P^(1/2),

    S_l = P^(1/2) exp(-eta K H'_l) P^(-1/2)    r_l = P^(1/2) (1 - exp(-eta K H'_l)) H'_l^-1 P^(1/2) g_l

Decoupled weight decay multiplies weights by 1 - eta omega in each step, in any coordinates, so it is omega added to the
curvature in both exponentials and in the inverse: a damping. This module knows nothing of how checkpoints came about
but learning rates, steps, weight decay and second moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import adam_conditioning, conditioning_digest, conditioning_scaling
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.curvature.fitting import Fitting
from wherefrom.curvature.operators import Basis, Operator
from wherefrom.engine.loading import Examples
from wherefrom.methods.checkpoints import (
    chosen_checkpoints,
    named_paths,
    recorded_only,
    recorded_times,
    sum_settings,
    trained_scale,
    weighted_sum,
    with_record,
)
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.keep import Keep
from wherefrom.scoring.results import Result, Scores
from wherefrom.scoring.scoring import Scoring
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import MODEL
from wherefrom.store.names import result_name
from wherefrom.tasks.task import Batch

if TYPE_CHECKING:
    from wherefrom.methods.method import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Source(Method):
    """SOURCE, approximate unrolled differentiation over segments of a training (Bae et al. 2024, arXiv 2405.12186).

    Removing training example t of N from all of training raises the query's loss by about `values[q, t] / N`: values
    are N times the paper's, with its sign. The query's gradient is that at the last checkpoint; training gradients are
    those at every checkpoint, averaged in each segment. There is no damping but weight decay's: where an eigenvalue is
    small against 1 / (eta K), training has not used it.

    Steps are taken to be those of gradient descent, or with `adam` of AdamW. SGD's momentum makes steps larger: give
    `times` divided by 1 - momentum. Adam's does not, since it is a running mean.

    Attributes:
        segments: into how many runs of checkpoints training is cut, of equal length or one longer.
        adam: steps are -eta P g with Adam's P (`adam_conditioning`), averaged over a segment's checkpoints, which have
            to be recorded ones. P is that of the checkpoints: what an example has done to second moments is left out.
            With Kronecker factors it says that it predicts retraining less well than `EKFAC` (docs/leaderboard.md).
        strategy: whose curvature: "shampoo", "diagonal" or, without `adam`, "ekfac"; by default "shampoo" with `adam`,
            "ekfac" without.
        checkpoints: in the order of training, the last is the trained model; None is the study's history.
        times: for each checkpoint, learning rate x optimizer steps since the one before of these; by default as
            recorded, with the checkpoint's learning rate for all steps since the one before.
        weight_decay: omega. A step multiplies weights by 1 - eta omega, as AdamW's does; for gradient descent, omega
            may as well stand in the loss, as SGD has it. By default as recorded, the largest of the groups'
            (a Trainer leaves out biases and normalisations; what is left out counts as the rest); 0 for paths. Adam's
            own, which P divides, is not in here: give 0.
        loss_scale: what training minimised, in units of the mean over examples of the task's loss, which is a sum over
            tokens; None takes it to have averaged over these, as a Trainer does.
        empirical: use the dataset's targets instead of targets drawn from the model.
        seed: of the drawn targets.

    Raises:
        InputError: a field is impossible, or two do not go together.
    """

    segments: int = 3
    adam: bool = False
    strategy: Literal["ekfac", "shampoo", "diagonal"] | None = None
    checkpoints: Sequence[Checkpoint] | None = None
    times: Sequence[float] | None = None
    weight_decay: float | None = None
    loss_scale: float | None = None
    empirical: bool = False
    seed: int = 0

    name: ClassVar[str] = "source"
    full_precision: ClassVar[str] = "filters are of full precision"

    def __post_init__(self) -> None:
        if self.loss_scale is not None:
            check_argument(0 < self.loss_scale < math.inf, "loss_scale", self.loss_scale, "a number above 0, or None")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise InputError(
                f"weight_decay={self.weight_decay}: expected a number >= 0, or None for what was recorded."
            )
        known = ("shampoo", "diagonal") if self.adam else ("ekfac", "shampoo", "diagonal")
        if self.strategy not in (None, *known):
            raise InputError(
                f"strategy={self.strategy!r} with adam={self.adam}: expected {', '.join(map(repr, known))} or None."
            )

    def remark(self, result: Result | TokenScores) -> str | None:
        if not self.adam or self.strategy == "diagonal":
            return None
        # A solver with the exact matrix does well with so little damping, see the documentation on solvers.
        return (
            "Source(adam=True): its times imply little damping, which lets the errors of Kronecker factors through. On "
            "the leaderboard (docs/leaderboard.md) it predicted retraining less well than EKFAC and Shampoo(adam=True) "
            "do for a part of the cost."
        )

    def rise(self, train: int) -> float | None:
        return 1 / train

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        checkpoints = chosen_checkpoints(context, self.checkpoints)
        paths = named_paths(checkpoints)
        scale = trained_scale(context, self.loss_scale)
        scaled = [time * scale for time in self._times(checkpoints)]
        if not 1 <= self.segments <= len(paths):
            raise InputError(f"segments={self.segments}: expected 1 to {len(paths)}, as many as there are checkpoints.")
        unrolled = Unrolled(context, queries, self, self._weight_decay(checkpoints) / scale)
        cut = self._cut(context, checkpoints, paths, scaled)
        weights = [1 / len(segment.paths) for segment in cut for _ in segment.paths]
        parts = {
            name: unrolled.settings(" | ".join(map(str, cut[number:]))) | {"models": context.states.digest(path)}
            for number, segment in enumerate(cut)
            for name, path in segment.paths.items()
        }

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            return weighted_sum(unrolled.parts(cut), weights, result)

        return Job("source", sum_settings(parts, weights), compute, without=[MODEL])

    def _cut(
        self,
        context: Context[Any],
        checkpoints: Sequence[Checkpoint],
        paths: Mapping[str, Path],
        times: Sequence[float],
    ) -> list[Segment]:
        """Runs of checkpoints, the first ones longer where they cannot be equal."""
        advice = "Give what read_recording returns, or a RecordedCheckpoint."
        recorded = recorded_only(checkpoints, "adam=True", "Adam's second moments", advice) if self.adam else None
        found, names, start = [], list(paths), 0
        for number in range(self.segments):
            stop = start + len(names) // self.segments + (number < len(names) % self.segments)
            chosen = {name: paths[name] for name in names[start:stop]}
            scaling: dict[str, Tensor] = {}
            if recorded is not None:
                mean = _mean(map(adam_conditioning, recorded[start:stop]), stop - start)
                scaling = conditioning_scaling(context.sweep, mean)
            models = [context.states.digest(path) for path in chosen.values()]
            found.append(Segment(chosen, sum(times[start:stop]), models, scaling))
            start = stop
        return found

    def _weight_decay(self, checkpoints: Sequence[Checkpoint]) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        found = {max(group.weight_decay or 0.0 for group in each.groups) for each in with_record(checkpoints)}
        if len(found) > 1:
            raise InputError(
                f"weight_decay=None, and {sorted(found)} were recorded. Give one number for all of training."
            )
        return found.pop() if found else 0.0

    def _times(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        if self.times is None:
            advice = (
                "Give for each checkpoint its learning rate x the steps since the one before, or what read_recording "
                "returns."
            )
            return recorded_times(recorded_only(checkpoints, "times=None", "learning rates", advice))
        if len(self.times) != len(checkpoints) or not all(0 <= each < math.inf for each in self.times):
            raise InputError(
                f"times={list(self.times)}: expected {len(checkpoints)} numbers >= 0, one for each checkpoint."
            )
        return [float(each) for each in self.times]


@dataclass(frozen=True)
class Segment:
    """Checkpoints that follow each other.

    Attributes:
        paths: where they are, by name.
        time: the sum over its steps of learning rate x loss scale: eta K.
        models: what tells their weights apart.
        scaling: P^(1/2) [out, in] of every layer, of the mean P; empty without one.
    """

    paths: Mapping[str, Path]
    time: float
    models: Sequence[str]
    scaling: Mapping[str, Tensor]

    def __str__(self) -> str:
        conditioned = "".join(f", conditioned by {digest}" for digest in conditioning_digest(self.scaling).values())
        return f"{' + '.join(self.paths)} ({', '.join(self.models)}) for {self.time!r}{conditioned}"


@dataclass(frozen=True)
class Unrolled(Generic[Batch]):
    """What all segments of a training have in common.

    Attributes:
        damping: weight decay in the unit of the curvature, whose loss is `loss_scale` times too large.
    """

    context: Context[Batch]
    queries: Examples[Batch]
    source: Source
    damping: float

    @property
    def strategy(self) -> str:
        """Whose curvature is taken."""
        return self.source.strategy or ("shampoo" if self.source.adam else "ekfac")

    def parts(self, cut: Sequence[Segment]) -> list[Scores]:
        """What each checkpoint adds, in the order of training, before averaging."""
        found: dict[str, Scores] = {}
        later: list[Operator] = []  # S of later segments, the last one first
        last = list(cut[-1].paths.values())[-1]
        for number, segment in reversed(list(enumerate(cut))):
            bases, eigenvalues = self.curvature(segment, number + 1)
            response = {layer: response_filter(each, segment.time) for layer, each in eigenvalues.items()}
            decays = {layer: (-segment.time * each).exp() for layer, each in eigenvalues.items()}
            here = Operator(bases, response, scaling=segment.scaling)
            described = " | ".join(map(str, cut[number:]))
            found |= self._scores(segment, [*later, here], last, described)
            # From the left, S is its transpose: P^(-1/2) exp(-eta K H') P^(1/2).
            outside = {name: scaling.reciprocal() for name, scaling in segment.scaling.items()}
            later.append(replace(here, filters=decays, outer_scaling=outside))
        return [found[name] for segment in cut for name in segment.paths]

    def curvature(self, segment: Segment, number: int) -> tuple[dict[str, Basis], dict[str, Tensor]]:
        """Of a segment: bases of averaged covariances, and eigenvalues there, averaged, with weight decay's part.

        Args:
            number: of the segment; parts are stored in `factors/source-NUMBER-DIGEST8` of the run and of each
                checkpoint's.
        """
        strategy, context = STRATEGIES[self.strategy], self.context

        def mean(part: Callable[[Fitting[Batch]], dict[str, Tensor]]) -> dict[str, Tensor]:
            def of(name: str, path: Path) -> dict[str, Tensor]:
                with context.states.entered(path):
                    return part(self._fitting(context.at(name, path), segment, number))

            return _mean((of(name, path) for name, path in segment.paths.items()), len(segment.paths))

        def covariances(fitting: Fitting[Batch]) -> dict[str, Tensor]:
            fitting.cache.forget(strategy.stage("eigenvalues"))  # of a basis that is gone
            return fitting.covariances(strategy)

        together = replace(context, fingerprint={**context.fingerprint, MODEL: " + ".join(segment.models)})
        whole = self._fitting(together, segment, number)
        bases = whole.bases(strategy, lambda: mean(covariances)) if strategy.basis else {}
        eigenvalues = mean(lambda fitting: fitting.mean_squares(strategy, bases))
        return bases, {layer: each + self.damping for layer, each in eigenvalues.items()}

    def _fitting(self, context: Context[Batch], segment: Segment, number: int) -> Fitting[Batch]:
        source = self.source
        fingerprint = {
            **context.fingerprint,
            "targets": "dataset" if source.empirical else f"sampled, seed {source.seed}",
            "precision": str(context.sweep.precision),
            "segment": " + ".join(segment.models),
            **conditioning_digest(segment.scaling),
        }
        cache = context.cache(context.folder("factors", result_name(f"source-{number}", fingerprint)), fingerprint)
        examples = context.train if source.empirical else replace(context.train, loss="drawn", seed=source.seed)
        return Fitting(context.sweep, examples, cache, scaling=segment.scaling)

    def settings(self, described: str) -> dict[str, str]:
        """What the scores of a checkpoint depend on.

        Args:
            described: its segment and the later ones.
        """
        source = self.source
        return {
            "targets": "dataset" if source.empirical else f"sampled, seed {source.seed}",
            "precision": str(self.context.sweep.precision),
            "segments": described,
            "curvature": self.strategy,
            "damping": repr(self.damping),
        }

    def _scores(self, segment: Segment, operators: Sequence[Operator], last: Path, described: str) -> dict[str, Scores]:
        """What each checkpoint of a segment adds, before averaging.

        Args:
            operators: what query gradients are multiplied with, one after another.
            last: the checkpoint of which query gradients are.
        """
        found = {}
        for name, path in segment.paths.items():
            there = self.context.at(name, path)
            fingerprint = {**there.fingerprint, "method": "source", **there.query_settings(self.queries)}
            fingerprint |= self.settings(described)
            with there.states.entered(path):
                scoring = Scoring(
                    there.sweep,
                    STRATEGIES["identity"],
                    Operator({}, {}),
                    self.queries,
                    there.train,
                    later=operators,
                    at_query_weights=partial(there.states.entered, last),
                )
                called, folder = result_name("source", fingerprint), there.folder("scores")
                tensors = there.cache(folder, fingerprint).get_or_compute(called, scoring.pairwise)
                found[name] = Scores.opened(folder / called, tensors)
        return found


def _mean(parts: Iterable[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Of tensors by name, made one after another."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, each in part.items():
            total[name] = each / count + total.get(name, 0.0)
    return total


def response_filter(eigenvalues: Tensor, time: float) -> Tensor:
    """(1 - exp(-time Lambda)) / Lambda, and its limit `time` where Lambda is 0."""
    scaled = time * eigenvalues  # 0 also where the product of two small numbers vanishes
    safe = torch.where(scaled > 0, scaled, 1.0)
    return time * torch.where(scaled > 0, -torch.expm1(-safe) / safe, 1.0)
