"""Influence functions with fitted factors: EK-FAC and its family, from the gradient dot product to Shampoo.

They differ in one row of `STRATEGIES`; damping, solvers, an optimizer's coordinates and `keep` are common to all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import Conditioning, adam_conditioning, conditioning_digest, conditioning_scaling
from wherefrom.curvature.factors import STRATEGIES, Factors
from wherefrom.curvature.fitting import Fitting
from wherefrom.curvature.solvers.solver import not_converged
from wherefrom.engine.loading import Examples
from wherefrom.methods.checkpoints import recorded_only, recorded_times, trained_scale, warn_of_other_weights
from wherefrom.methods.method import Context, Job, Method, dense
from wherefrom.planning.plan import Plan
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.approximation import Approximation
from wherefrom.scoring.collectors import SELF_INFLUENCE, SQUARED_NORM
from wherefrom.scoring.keep import Aggregated, Keep, Pairs, Tokens, Top, layer_groups
from wherefrom.scoring.rescoring import rescored
from wherefrom.scoring.results import ONLY_EXTREMES, Result, Scores
from wherefrom.scoring.scoring import Scoring, make_plan
from wherefrom.scoring.token_scoring import TokenScoring
from wherefrom.scoring.tokens import TokenScores, of_values
from wherefrom.store.artifacts import Layout, read_manifest
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import Dataset, Fingerprint
from wherefrom.store.names import check_result_name, finished, log_others, result_name


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """In which coordinates gradients are taken: a weight's own, or those in which a preconditioned optimizer descends.

    Attributes:
        adam: of Adam, as recorded at the last checkpoint of the study's history (`adam_conditioning`).
        conditioning: what another optimizer has multiplied each weight's gradient with, by parameter name.
    """

    adam: bool = False
    conditioning: Conditioning | None = field(default=None, repr=False)

    def scaling(self, context: Context[Any]) -> dict[str, Tensor]:
        """P^(1/2) of every layer; empty without one.

        Raises:
            InputError: both are given, or nothing is recorded.
        """
        conditioning = self.conditioning
        if self.adam:
            if conditioning is not None:
                raise InputError("adam=True with a conditioning: expected one of them.")
            latest = context.history[-1] if context.history else None
            if latest is None or isinstance(latest, str | Path):
                raise InputError(
                    "adam=True: the study's history does not end with a recorded checkpoint. Give "
                    "Study(history=read_recording(folder)) of a training with Adam, or a conditioning."
                )
            warn_of_other_weights(context)
            conditioning = adam_conditioning(latest)
        return {} if conditioning is None else conditioning_scaling(context.sweep, conditioning)


@dataclass(frozen=True, kw_only=True)
class Factored(Approximation, Coordinates, Method):
    """Scores `g_q^T (H + damping)^-1 g_t` with fitted factors of the curvature H.

    Attributes:
        empirical: use the dataset's targets instead of targets drawn from the model (the Fisher information).
        seed: of the drawn targets.
        factors: fitted elsewhere, for the same model; None fits this study's, or loads them.
        loss_scale: what training minimised, in units of the mean over examples of the task's loss, which is a sum over
            tokens; None takes it to have averaged over these, as a Trainer does. Only with a solver, `adam` and no
            damping: then D is P^-1 / tau, with tau the sum of learning rate x `loss_scale` over the recorded steps.
            Directions with less curvature than that, training has hardly used.

    Raises:
        InputError: the factors are of another strategy, or a field is impossible.
    """

    empirical: bool = False
    seed: int = 0
    factors: Factors | None = field(default=None, repr=False)
    loss_scale: float | None = None

    strategy: ClassVar[str]
    keeps: ClassVar[tuple[type[Keep[Any]], ...]] = (Pairs, Top, Aggregated, Tokens)
    parts: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors is not None and self.factors.strategy != self.strategy:
            raise InputError(
                f"factors are of the strategy {self.factors.strategy!r}: expected those of {type(self).__name__}, "
                f"{self.strategy!r}."
            )
        if self.solver is not None and not self.solver.filtered and self.strategy != Dot.strategy:
            raise InputError(
                f"{self.solver} with {type(self).__name__}: it starts from no factors, so they would be fitted for "
                "nothing. Take Dot(adam=True, solver=...), or ConjugateGradients."
            )
        if self.loss_scale is not None:
            check_argument(0 < self.loss_scale < math.inf, "loss_scale", self.loss_scale, "a number above 0, or None")
            if self.solver is None or not self.adam or self.damping is not None:
                raise InputError(
                    f"loss_scale={self.loss_scale} says which damping a solver has with adam=True and damping=None, "
                    "and nothing else: give these, or leave it out."
                )

    def check(self, keep: Keep[Any], half_precision: bool) -> None:
        super().check(keep, half_precision)
        if self.solver is not None and isinstance(keep, Pairs) and keep.self_influence:
            raise InputError(
                "self_influence=True with a solver, whose solutions are of queries alone. Leave one of them out."
            )
        if self.rescore and not (isinstance(keep, Tokens) or keep == Pairs() or keep == Pairs(self_influence=True)):
            raise InputError(
                f"rescore={self.rescore} with keep={keep!r}: it replaces single scores of all pairs. Leave one of them "
                "out."
            )
        if self.compressed and isinstance(keep, Aggregated) and keep.queries:
            name = "query_rank" if self.query_rank is not None else "query_bits"
            raise InputError(
                f"{name}={getattr(self, name)} with keep={keep!r}: the sum of all query gradients is one gradient, "
                f"which fits whole. Leave {name} out."
            )

    def rise(self, train: int) -> float | None:
        """1 / train where the curvature is a mean over examples: with a solver, or with fitted eigenvalues.

        `KFAC`'s is a mean over tokens, and `Dot` has none.
        """
        mean = self.solver is not None or STRATEGIES[self.strategy].eigenvalues == "fitted"
        return 1 / train if mean else None

    def fit(self, context: Context[Any], name: str | None = None, overwrite: bool = False) -> Factors:
        """Factors of the study's training examples, loaded or fitted; those that were given, as they are."""
        if self.factors is not None:
            self.factors.check_model(context.fingerprint)
            return self.factors
        check_result_name(name)
        execution, scaling = context.sweep.execution, self.scaling(context)
        label = ("empirical" if self.empirical else "sampled") + "-half" * execution.half_precision
        label += "-conditioned" * bool(scaling)
        fingerprint = {
            **context.fingerprint,
            "targets": "dataset" if self.empirical else f"sampled, seed {self.seed}",
            "precision": str(context.sweep.precision),
            **conditioning_digest(scaling),
        }
        cache = context.cache(context.folder("factors", result_name(label, fingerprint, name)), fingerprint)
        context.ranks.first(lambda: log_others(cache.folder, fingerprint))
        examples = context.train if self.empirical else replace(context.train, loss="drawn", seed=self.seed)
        return Fitting(context.sweep, examples, cache, overwrite, scaling).factors(self.strategy)

    def damped(self, context: Context[Any]) -> Self:
        """This method with the damping that a solver has in Adam's coordinates where none is given.

        Raises:
            InputError: something that it follows from is not known.
        """
        if self.solver is None or self.damping is not None or not self.adam:
            return self
        times = recorded_times(recorded_only(context.history, "damping=None", "learning rates", "Give a number."))
        scale = trained_scale(context, self.loss_scale)
        return replace(self, damping=1 / (scale * sum(times)), loss_scale=None)

    def scoring(
        self, context: Context[Any], queries: Examples[Any], factors: Factors, keep: Keep[Any] | None = None
    ) -> Scoring[Any]:
        """What computes scores of these queries."""
        pairs, sums = (keep if isinstance(keep, kind) else None for kind in (Pairs, Aggregated))
        layers = pairs.layers if pairs else sums.layers if sums else False
        approximation = Approximation(**{name: getattr(self, name) for name in Approximation.__dataclass_fields__})
        return Scoring(
            context.sweep,
            STRATEGIES[self.strategy],
            factors.preconditioner(self.damping),
            queries,
            context.train,
            approximation,
            layer_groups(layers, list(context.sweep.layers)),
            self_influence=isinstance(keep, Pairs) and keep.self_influence,
            sum_queries=keep.queries if isinstance(keep, Aggregated) else None,
            sum_train=keep.train if isinstance(keep, Aggregated) else None,
        )

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        damped = self.damped(context)
        if damped is not self:
            return damped.job(context, queries, keep)
        factors = self.fit(context)
        scoring = self.scoring(context, queries, factors, keep)
        compute = self._computation(context, scoring, keep)
        label = self.name + "-conditioned" * bool(factors.scaling) + self.label
        label += "-half" * context.sweep.execution.half_precision
        return Job(label, self.settings(context, factors), compute)

    def _computation(self, context: Context[Any], scoring: Scoring[Any], keep: Keep[Any]) -> Any:
        if isinstance(keep, Tokens):
            queries = scoring.queries.dataset
            return TokenScoring(scoring, keep, lambda: self._sequence_scores(context, queries).values).all_pairs
        if isinstance(keep, Top):
            return lambda result: scoring.highest(keep.k, result)
        if isinstance(keep, Aggregated):
            return scoring.aggregated
        if self.rescore:
            return lambda result: rescored(scoring, result)
        return scoring.pairwise

    def _sequence_scores(self, context: Context[Any], queries: Dataset[object]) -> Scores:
        """Those of all pairs; what is there with more stored beside the same values is as good."""
        examples = context.measured(queries)
        wanted = {**context.fingerprint, "method": self.name, **context.query_settings(examples)}
        wanted |= self.settings(context, self.fit(context))

        def there() -> str | None:
            for path in finished(context.folder("scores")):
                stored: Fingerprint = read_manifest(path)["fingerprint"]
                if of_values(stored) == wanted and ONLY_EXTREMES not in stored:
                    return path.name
            return None

        found = context.ranks.first(there)
        if found is None:
            return self.score(context, queries, Pairs())
        return Scores.load(context.folder("scores", found))

    def settings(self, context: Context[Any], factors: Factors) -> dict[str, str]:
        """What scores depend on beside the study and the queries.

        Raises:
            MismatchError: the factors are of another model.
        """
        factors.check_model(context.fingerprint)
        conditioned = factors.fingerprint.get("conditioning")
        return {
            "factors": factors.fingerprint["training data"],
            "targets": factors.fingerprint["targets"],
            "factors' task": factors.fingerprint["task"],
            "factors' precision": factors.fingerprint["precision"],
            **({} if conditioned is None else {"conditioning": conditioned}),
            "precision": str(context.sweep.precision),
            **self.approximation_settings(),
        }

    def remark(self, result: Result | TokenScores) -> str | None:
        if self.solver is None or isinstance(result, TokenScores):
            return None
        return not_converged(result.accuracy, self.solver, result.fingerprint["damping"])

    def plan(self, context: Context[Any], queries: Dataset[object], keep: Keep[Any]) -> Plan:
        strategy, examples = STRATEGIES[self.strategy], context.measured(queries)
        return make_plan(context.sweep, strategy, examples, context.train, self, loaded=False)

    def self_influence(self, context: Context[Any], name: str | None = None, overwrite: bool = False) -> Tensor:
        if self.solver is not None or self.compressed:
            raise InputError(
                f"self_influence of {self!r}: it needs no query gradients. Leave solver, query_rank and query_bits out."
            )
        check_result_name(name)
        factors = self.fit(context)
        fingerprint = {**context.fingerprint, "method": self.name, **self.settings(context, factors)}
        label = self.name + "-conditioned" * bool(factors.scaling) + "-half" * context.sweep.execution.half_precision
        called = result_name(label, fingerprint, name)
        cache = context.cache(context.folder("self_influence"), fingerprint)
        if overwrite:
            cache.forget(called)
        context.ranks.first(lambda: log_others(cache.folder / called, fingerprint))
        shape = (len(context.train),)
        layout: Layout = {SELF_INFLUENCE: (None, shape), SQUARED_NORM: (None, shape)}
        compute = self.scoring(context, context.train, factors).train_self_influence
        return cache.get_or_compute(called, compute, layout, torch.device("cpu"))[SELF_INFLUENCE]


@dataclass(frozen=True, kw_only=True)
class EKFAC(Factored):
    """EK-FAC: eigenvectors of Kronecker factors, with eigenvalues corrected to mean squared gradients in their basis.

    George et al. 2018; for influence functions, Grosse et al. 2023 (arXiv 2308.03296).
    """

    name: ClassVar[str] = "ekfac"
    strategy: ClassVar[str] = "ekfac"


@dataclass(frozen=True, kw_only=True)
class KFAC(Factored):
    """K-FAC: the curvature of each layer as a Kronecker product of two covariances (Martens & Grosse 2015)."""

    name: ClassVar[str] = "kfac"
    strategy: ClassVar[str] = "kfac"


@dataclass(frozen=True, kw_only=True)
class Diagonal(Factored):
    """The diagonal of the Fisher information: mean squared gradients, weight by weight."""

    name: ClassVar[str] = "diagonal"
    strategy: ClassVar[str] = "diagonal"


@dataclass(frozen=True, kw_only=True)
class Shampoo(Factored):
    """Eigenvectors of whole gradients' covariances (Gupta et al. 2018), with eigenvalues corrected as EK-FAC's."""

    name: ClassVar[str] = "shampoo"
    strategy: ClassVar[str] = "shampoo"


@dataclass(frozen=True, kw_only=True)
class Dot(Factored):
    """Dot products of gradients, without curvature; in an optimizer's coordinates, each weight times its step size."""

    name: ClassVar[str] = "dot"
    strategy: ClassVar[str] = "identity"


@dataclass(frozen=True, kw_only=True)
class Cosine(Coordinates, Method):
    """Cosines of gradients, between -1 and 1."""

    name: ClassVar[str] = "cosine"

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        inner = Dot(adam=self.adam, conditioning=self.conditioning)
        factors = inner.fit(context)

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            scores = inner.score(context, queries.dataset, Pairs(self_influence=True))

            def cosines(some: range) -> Tensor:
                chosen = slice(some.start, some.stop)
                assert scores.query_self_influence is not None
                norms = scores.query_self_influence[chosen]
                part = replace(scores, values=scores.values[chosen], query_self_influence=norms)
                return part.normalized("cosine").values

            count, train = scores.values.shape
            return dense(result, count, train, scores.values.element_size(), cosines)

        return Job("cosine" + "-conditioned" * bool(factors.scaling), inner.settings(context, factors), compute)
