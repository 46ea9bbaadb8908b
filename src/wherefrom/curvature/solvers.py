"""Iterative solvers of (H + D) x = g, for many right-hand sides at once, with a filter as their preconditioner.

H is the exact curvature, D the damping, g the queries' gradients. The filter alone (EK-FAC, say) takes H to be
something that it is not: block-diagonal, of Kronecker products. A solver starts from there and goes on to the solution.
All vectors are the rows of matrices [queries, weights], so that every product with H is one pass for all queries. This
module is tensor algebra; it knows nothing of models, layers or datasets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError, LossError


class System(Protocol):
    """The matrix H + D, a mean over examples plus the damping, and what stands for its inverse."""

    @property
    def examples(self) -> int:
        """How many examples H is a mean over."""

    def product(self, vectors: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """(H + D) v for each row of [queries, weights], where H is of some examples alone if they are given."""

    def precondition(self, vectors: Tensor) -> Tensor:
        """What the filter makes of each row of [queries, weights]."""


# The relative residual above which a solve is said not to have converged: 0 is a solution, and 1 what x = 0 has.
CONVERGED = 0.1


class Solution(NamedTuple):
    """What a solver has found.

    Attributes:
        vectors: x [queries, weights].
        residuals: |g - (H + D) x| / |g| before each iteration, and of the vectors last, [iterations + 1, queries]: 1
            where x is 0. `Astra`'s, but for the last, are of each iteration's own batch, so they are noisy, and those
            of all examples are smaller.
    """

    vectors: Tensor
    residuals: Tensor

    @property
    def final(self) -> Tensor:
        """The residuals of the vectors, [queries]."""
        return self.residuals[-1]


class Solver(ABC):
    """How query gradients are preconditioned beyond the factors' filter.

    Attributes:
        label: what it adds to the name of scores.
        held: how many vectors of a query gradient's size are in memory for each query.
        block_size: how many queries, one after another, make each other's solutions: they are solved together.
    """

    label: ClassVar[str]
    held: ClassVar[int]
    block_size: int = 1

    @abstractmethod
    def solve(self, system: System, gradients: Tensor) -> Solution:
        """Solve (H + D) x = g for each row g of [queries, weights].

        Raises:
            LossError: the iterations diverge.
        """


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel 1952), for blocks of queries (O'Leary 1980).

    For symmetric positive definite H + D. Starting from 0, the first iteration of a query alone gives the filter's own
    answer, up to a factor. The queries of a block share their directions: each is the best that the directions of all
    can make of it, which takes fewer iterations of the same cost. Until they have converged, its scores then depend on
    the queries beside it in its block. H is that of all examples, or of a fixed part of them: with a new part in each
    iteration, directions would not be conjugate.

    Args:
        iterations: at most; each is one pass over the examples.
        tolerance: a block is done when no relative residual |g - (H + D) x| / |g| of its queries is larger; then it
            costs nothing more.
        examples: how many training examples H is a mean over, drawn once; None is all.
        seed: of that draw.
        block_size: how many queries share their directions: the first so many, the next, and so on.

    Raises:
        InputError: a number is impossible.
    """

    iterations: int = 20
    tolerance: float = 1e-3
    examples: int | None = None
    seed: int = 0
    block_size: int = 1

    label: ClassVar[str] = "cg"
    held: ClassVar[int] = 7

    def __post_init__(self) -> None:
        _check_at_least_one(self, "iterations", "examples", "block_size")
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"ConjugateGradients: tolerance={self.tolerance}: expected a number >= 0, such as 1e-3.")

    def solve(self, system: System, gradients: Tensor) -> Solution:
        chosen, size = self._chosen(system.examples), self.block_size
        norms = gradients.norm(dim=1)
        found, residual = torch.zeros_like(gradients), gradients.clone()
        direction = system.precondition(residual)
        history = [_relative(residual, norms)]
        while len(history) <= self.iterations:
            unsolved = (history[-1] > self.tolerance).split(size)
            going = torch.cat([each.any().expand(len(each)) for each in unsolved])
            if not bool(going.any()):
                break
            curved = torch.zeros_like(direction)
            curved[going] = system.product(direction[going], chosen)
            blocks = [each.split(size) for each in (found, residual, direction, curved)]
            # Of V^T (H + D) V, where V are a block's directions.
            inverses = [_inverse(v @ w.T) for v, w in zip(*blocks[2:], strict=True)]
            for inverse, x, r, v, w in zip(inverses, *blocks, strict=True):
                steps = (inverse @ (v @ r.T)).T  # [queries, directions]
                x.add_(steps @ v)
                r.sub_(steps @ w)
            history.append(_checked(_relative(residual, norms), "ConjugateGradients"))
            following = system.precondition(residual)
            for inverse, z, v, w in zip(inverses, following.split(size), *blocks[2:], strict=True):
                z.sub_((inverse @ (w @ z.T)).T @ v)
            direction = following
        return Solution(found, torch.stack(history))

    def _chosen(self, examples: int) -> Sequence[int] | None:
        if self.examples is None or self.examples >= examples:
            return None
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(self.seed))
        return sorted(order[: self.examples].tolist())


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
    held: ClassVar[int] = 6

    def __post_init__(self) -> None:
        _check_at_least_one(self, "iterations", "batch_size", "decay_every")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"Astra: learning_rate={self.learning_rate}: expected a number above 0, or None.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"Astra: momentum={self.momentum}: expected a number from 0 to below 1, such as 0.9.")
        if not 0 < self.decay <= 1:
            raise InputError(f"Astra: decay={self.decay}: expected a number above 0 and at most 1, such as 0.9.")

    def solve(self, system: System, gradients: Tensor) -> Solution:
        generator = torch.Generator().manual_seed(self.seed)
        rate = self._rate(system, gradients)
        norms, history = gradients.norm(dim=1), []
        found = system.precondition(gradients)
        velocity = torch.zeros_like(found)
        for iteration in range(self.iterations):
            excess = system.product(found, self._batch(system, generator)) - gradients
            history.append(_checked(_relative(excess, norms), "Astra"))
            velocity = self.momentum * velocity + system.precondition(excess)
            found -= rate * self.decay ** (iteration // self.decay_every) * velocity
        history.append(_checked(_relative(system.product(found) - gradients, norms), "Astra"))
        return Solution(found, torch.stack(history))

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
        found = float(_dots(moved, following) / _dots(vectors, moved))
        vectors = following / following.norm()
    return found


def not_converged(residuals: Tensor, solver: Solver, damping: str) -> str | None:
    """What is to be said of final relative residuals, [queries]; None where all of them are those of solutions.

    Args:
        damping: in words.
    """
    over = residuals > CONVERGED
    if not bool(over.any()):
        return None
    worse = int((residuals > 1).sum())
    than_nothing = f" ({worse} of them worse than x = 0 would be)" if worse else ""
    return (
        f"{solver}: {int(over.sum())} of {len(residuals)} solves have not converged{than_nothing}. The relative "
        f"residual |g - (H + D) x| / |g| is {residuals.median():.2g} in the median and {residuals.max():.2g} at most, "
        f"where a solution has {CONVERGED} or less: these scores are not those of the Gauss-Newton matrix. Give a "
        f"larger damping than {damping}, which Kronecker factors get along with and the matrix itself often does not, "
        "or more iterations."
    )


def _check_at_least_one(solver: Solver, *names: str) -> None:
    for name in names:
        value = getattr(solver, name)
        if value is not None and value < 1:
            raise InputError(f"{type(solver).__name__}: {name}={value}: expected at least 1.")


def _inverse(products: Tensor) -> Tensor:
    """The inverse of a symmetric, positive semidefinite matrix, where it has one: directions may depend on others."""
    scale = products.diagonal().double().clamp_min(0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, 0.0)
    scaled = scale.unsqueeze(1) * products.double() * scale
    values, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    least = 10 * torch.finfo(products.dtype).eps * values[-1]
    inverted = torch.where(values > least, 1 / values, 0.0)
    inverse: Tensor = (vectors * inverted) @ vectors.T
    return inverse.mul_(scale.unsqueeze(1)).mul_(scale).to(products.dtype)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row with the same row of the other matrix, [queries]."""
    return torch.einsum("qw,qw->q", left, right)


def _relative(vectors: Tensor, norms: Tensor) -> Tensor:
    """Norms of rows in units of others, [queries]; 0 where those are."""
    return torch.where(norms > 0, vectors.norm(dim=1) / norms, 0)


def _checked(residuals: Tensor, solver: str) -> Tensor:
    """Refuse residuals that have grown beyond all bounds."""
    if not bool((residuals < 1e6).all()):
        largest = float(residuals.nan_to_num(torch.inf).max())
        raise LossError(
            f"{solver}: the iterations diverge: a residual is {largest:.3g} times its query gradient. Give more "
            "damping or, for Astra, a smaller learning_rate or a larger batch_size."
        )
    return residuals


SOLVERS: dict[str, type[ConjugateGradients | Astra]] = {each.label: each for each in (ConjugateGradients, Astra)}
