"""Scores with the sampled Fisher matrix of all tracked layers together: no blocks, no Kronecker factors.

With M gradients S [M, weights] of losses whose targets the model has drawn, the matrix is `F = S^T S / M`, and

    g_q^T (F + damping)^-1 g_t = (q . t - (S q)^T (S S^T / M + damping)^-1 (S t) / M) / damping

(Woodbury's identity; for optimizers, Ren & Goldfarb 2019, arXiv 1906.02353). Nothing is needed but dot products of
gradients: of drawn losses with each other, with training examples, and of queries with both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import conditioning_digest
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples, Repeated
from wherefrom.methods.factored import Coordinates
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.keep import Keep
from wherefrom.scoring.scoring import Scoring
from wherefrom.store.cache import Unfinished
from wherefrom.store.names import result_name

# Of the mean eigenvalue in the space of samples.
_DAMPING_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Fisher(Coordinates, Method):
    """The inverse of the sampled Fisher matrix, all tracked layers together: `g_q^T (F + damping)^-1 g_t`.

    F is a mean over `samples` draws of each training example's targets. Beyond the damping, sampling is the only
    approximation of F. It takes M = samples x N gradients, their M x M dot products, and the inverse of a matrix of
    that size: for some thousand training examples, and best for all weights (`layers=[...]`). The dot products are
    stored in `RUN/fisher`, so that another damping costs no sweep.

    Attributes:
        samples: draws of each training example's targets.
        damping: absolute, above 0; None is 0.01 x the mean of the M eigenvalues that F can have. In an optimizer's
            coordinates it is damping x P^-1.
        seed: of the draws.

    Raises:
        InputError: a field is impossible.
    """

    samples: int = 3
    damping: float | None = None
    seed: int = 0

    name: ClassVar[str] = "fisher"
    full_precision: ClassVar[str] = "inverse would multiply what rounding leaves out"

    def __post_init__(self) -> None:
        check_argument(self.samples >= 1, "samples", self.samples, "at least 1")
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise InputError(
                f"damping={self.damping}: expected a number above 0, or None for 0.01 x the mean eigenvalue."
            )

    def rise(self, train: int) -> float | None:
        return 1 / train

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        scaling, train = self.scaling(context), context.train
        drawn = replace(train, dataset=Repeated(train.dataset, self.samples), loss="drawn", seed=self.seed)
        coordinates = conditioning_digest(scaling)

        def dots(left: Examples[Any], right: Examples[Any]) -> Tensor:
            """Dot products [left, right], stored in a folder of their own."""
            kinds = {"left": self._described(left), "right": self._described(right)}
            fingerprint = {**context.fingerprint, **kinds, "precision": str(context.sweep.precision), **coordinates}
            if left.loss == "measurement":
                fingerprint |= context.query_settings(left)
            scoring = Scoring(context.sweep, STRATEGIES["identity"], Operator({}, {}, scaling=scaling), left, right)
            called = result_name(f"{left.loss}-{right.loss}", fingerprint)
            cache = context.cache(context.folder("fisher"), fingerprint)
            return cache.get_or_compute(called, scoring.pairwise)["values"].double()

        def compute(_: Unfinished) -> Mapping[str, Tensor]:
            products = dots(queries, train), dots(queries, drawn), dots(drawn, train), dots(drawn, drawn)
            values = inverse_products(*products, self.damping)
            return {"values": values.to(context.sweep.dtype)}

        settings = {
            "targets": self._described(drawn),
            "damping": "0.01 x mean eigenvalue" if self.damping is None else repr(self.damping),
            "precision": str(context.sweep.precision),
            **coordinates,
        }
        return Job("fisher" + "-conditioned" * bool(scaling), settings, compute)

    def _described(self, examples: Examples[Any]) -> str:
        return f"{self.samples} drawn for each, seed {self.seed}" if examples.loss == "drawn" else examples.loss


def inverse_products(pairs: Tensor, queries: Tensor, train: Tensor, drawn: Tensor, damping: float | None) -> Tensor:
    """g_q^T (F + damping)^-1 g_t for every pair [queries, train] out of dot products.

    Args:
        pairs: of queries with training examples, [queries, train].
        queries: of queries with samples, [queries, samples].
        train: of samples with training examples, [samples, train].
        drawn: of samples with each other, [samples, samples].
        damping: as in `Fisher`.

    Raises:
        InputError: all drawn gradients are zero, so there is no mean eigenvalue.
    """
    count = len(drawn)
    gram = (drawn + drawn.T) / (2 * count)
    added = _DAMPING_SHARE * float(gram.diagonal().mean()) if damping is None else damping
    if not added > 0:
        raise InputError("damping=None: all gradients of drawn targets are zero, so it would be 0. Give a number.")
    damped = gram + added * torch.eye(count, dtype=gram.dtype)
    found: Tensor = (pairs - queries @ torch.linalg.solve(damped, train) / count) / added
    return found
