"""ASTRA: stochastic iterations with the curvature of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.solvers.solver import Solution, Solver, System, check_at_least_one, checked, dots, relative
from wherefrom.runtime.errors import InputError, LossError


@dataclass(frozen=True)
class Astra(Solver):
    """Stochastic Neumann series iterations, preconditioned, with momentum: ASTRA (Wang et al. 2025, arXiv 2507.14740).

    x_0 = P g and x_{k+1} = x_k - rate_k v_k with v_k = momentum v_{k-1} + P ((H_k + D) x_k - g), where P is the filter
    and H_k the curvature of a batch of examples, drawn anew with replacement and the same for all queries (equation 9,
    footnote 13). How far x is from a solution is measured at the end, by a pass over all examples. The defaults are the
    paper's for GPT-2 on WikiText-2 (table 3), but for the rate, which was equal to its damping of 0.011; for its other
    models it was 0.01 or 0.1 of theirs, with batches of 128 or 256, 200 iterations, and half the rate after every 50.

    Iterations diverge at rates above 2 (1 + momentum) / lambda, lambda being the largest eigenvalue of P (H_k + D)
    (Polyak 1964). It is found by a few power iterations on a first batch.

    Args:
        iterations: each is one pass over a batch.
        batch_size: examples of each batch; None is all examples in every iteration, without noise.
        learning_rate: None is 0.3 of the rate at which iterations diverge; a larger one than that is refused.
        momentum: of the heavy ball (Polyak 1964); 0 is none.
        decay: what the rate is multiplied with after every `decay_every` iterations.
        seed: of the batches.

    Raises:
        InputError: a number is impossible.
    """

    iterations: int = 300
    batch_size: int | None = 16
    learning_rate: float | None = None
    momentum: float = 0.9
    decay: float = 0.9
    decay_every: int = 100
    seed: int = 0

    label: ClassVar[str] = "astra"

    def __post_init__(self) -> None:
        check_at_least_one(self, "iterations", "batch_size", "decay_every")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"Astra: learning_rate={self.learning_rate}: expected a number above 0, or None.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"Astra: momentum={self.momentum}: expected a number from 0 to below 1, such as 0.9.")
        if not 0 < self.decay <= 1:
            raise InputError(f"Astra: decay={self.decay}: expected a number above 0 and at most 1, such as 0.9.")

    @property
    def held(self) -> int:
        return 6

    def solve(self, system: System, gradients: Tensor) -> Solution:
        generator = torch.Generator().manual_seed(self.seed)
        rate = self._rate(system, gradients)
        norms, history = gradients.norm(dim=1), []
        found = system.precondition(gradients)
        velocity = torch.zeros_like(found)
        for iteration in range(self.iterations):
            excess = system.product(found, self._batch(system, generator)) - gradients
            history.append(checked(relative(excess, norms), "Astra"))
            velocity = self.momentum * velocity + system.precondition(excess)
            found -= rate * self.decay ** (iteration // self.decay_every) * velocity
        history.append(checked(relative(system.product(found) - gradients, norms), "Astra"))
        return Solution(found, self.iterations, torch.stack(history))

    def _batch(self, system: System, generator: torch.Generator) -> list[int] | None:
        """Examples of a batch; None is all."""
        if self.batch_size is None:
            return None
        drawn: list[int] = torch.randint(system.examples, (self.batch_size,), generator=generator).tolist()
        return drawn

    def _rate(self, system: System, like: Tensor) -> float:
        """The learning rate.

        Raises:
            LossError: iterations diverge with the one that was given.
        """
        generator = torch.Generator().manual_seed(self.seed)
        batch = self._batch(system, generator)
        start = torch.randn(1, like.shape[1], generator=generator, dtype=torch.float64)
        largest = _largest_eigenvalue(system, batch, start.to(like.device, like.dtype))
        limit = 2 * (1 + self.momentum) / largest
        rate = _STABLE_SHARE * limit if self.learning_rate is None else self.learning_rate
        if not rate < limit:
            raise LossError(
                f"Astra: the iterations diverge with learning_rate={rate}: the largest eigenvalue of P (H + D) is "
                f"{largest:.3g} on a batch, so with a momentum of {self.momentum} they do above {limit:.3g}. Give "
                f"a smaller learning_rate, more damping or larger batches, or None for {_STABLE_SHARE} of that."
            )
        return rate


# The part of the rate at which iterations diverge that is safe with the noise of batches; and how often a vector is
# multiplied to find that rate.
_STABLE_SHARE, _POWER_ITERATIONS = 0.3, 6


def _largest_eigenvalue(system: System, batch: Sequence[int] | None, vectors: Tensor) -> float:
    """Of P (H + D), from below, by power iterations.

    Args:
        vectors: where to start, [1, weights].
    """
    found = 0.0
    for _ in range(_POWER_ITERATIONS):
        moved = system.product(vectors, batch)
        following = system.precondition(moved)
        # The Rayleigh quotient of P^(1/2) (H + D) P^(1/2), which is symmetric and has the same eigenvalues.
        found = float(dots(moved, following) / dots(vectors, moved))
        vectors = following / following.norm()
    return found
