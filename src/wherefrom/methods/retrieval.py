"""Retrieval in two stages: a cheap method names candidates, and only those are scored exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.methods.baselines import BM25
from wherefrom.methods.factored import EKFAC, Factored
from wherefrom.methods.method import Context, Job, Method, dense
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.keep import Keep, Pairs, Top
from wherefrom.scoring.rescoring import checked_positions, exact_scores
from wherefrom.scoring.results import extremes
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import tensors_digest


@dataclass(frozen=True, kw_only=True)
class TwoStage(Method):
    """Exact scores of candidates alone, which a cheap method names; only those are swept, all queries' together.

    With `keep=Top(k)`, the highest and lowest of the candidates; of all pairs, what is no candidate has the score 0.

    Attributes:
        first: names each query's candidates, those with its highest scores; or their training positions, whole numbers
            [queries, candidates], each once for a query, such as `GradientIndex.query(...).train`.
        then: scores them.
        candidates: how many of each query.

    Raises:
        InputError: there are no candidates, or the second method does not score pair by pair.
    """

    first: Method | Tensor = field(default_factory=BM25)
    then: Factored = field(default_factory=EKFAC)
    candidates: int = 100

    name: ClassVar[str] = "two-stage"
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_argument(self.candidates >= 1, "candidates", self.candidates, "at least 1")
        check_argument(isinstance(self.then, Factored), "then", self.then, "a method with factors, such as EKFAC()")
        if self.then.compressed:
            raise InputError(
                f"then={self.then}: candidates are scored with whole gradients. Leave out query_rank, query_bits and "
                "rescore."
            )

    def check(self, keep: Keep[Any], half_precision: bool) -> None:
        super().check(keep, half_precision)
        self.then.check(Pairs(), half_precision)

    def rise(self, train: int) -> float | None:
        return self.then.rise(train)

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        positions, train = self._positions(context, queries), len(context.train)
        then = self.then.damped(context)
        factors = then.fit(context)
        scoring = then.scoring(context, queries, factors)

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            exact = exact_scores(scoring, positions, result.parts.parts("candidates"))
            if isinstance(keep, Top):
                return {**exact, **extremes(exact.pop("values"), positions, min(keep.k, positions.shape[1]))}

            def scattered(some: range) -> Tensor:
                chosen = slice(some.start, some.stop)
                values = exact["values"][chosen]
                return values.new_zeros(len(some), train).scatter(1, positions[chosen], values)

            beside = {name: each for name, each in exact.items() if name != "values"}
            return dense(result, len(queries), train, exact["values"].element_size(), scattered) | beside

        wanted = f"{positions.shape[1]} of each query ({tensors_digest({'candidates': positions})[:24]})"
        settings = {"then": then.name, **then.settings(context, factors), "candidates": wanted}
        return Job(f"{then.name}-candidates", settings, compute)

    def _positions(self, context: Context[Any], queries: Examples[Any]) -> Tensor:
        """Each query's candidates, [queries, candidates]."""
        train = len(context.train)
        if not isinstance(self.first, Method):
            return checked_positions(self.first, len(queries), train)
        count = min(self.candidates, train)
        if self.first.streams:
            found = self.first.score(context, queries.dataset, Top(count)).train
        else:
            found = self.first.score(context, queries.dataset, Pairs()).values.topk(count, dim=1).indices
        return found.sort(1).values
