"""Conjugate gradients, for one query or for blocks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from wherefrom.curvature.solvers.solver import (
    Blocks,
    Solution,
    System,
    change_of_scores,
    check_at_least_one,
    check_not_negative,
    checked,
    dots,
    relative,
)


@dataclass(frozen=True)
class ConjugateGradients(Blocks):
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
        change: a block is done, too, when an iteration has changed no query's scores by a larger part of them than
            this, as far as can be estimated without the training examples (`Solution.changes`). Scores come out well
            long before residuals are small: 0.05 leaves their order alone. 0 is never.

    Raises:
        InputError: a number is impossible.
    """

    iterations: int = 20
    tolerance: float = 1e-3
    change: float = field(default=0.0, kw_only=True)

    label: ClassVar[str] = "cg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "iterations")
        check_not_negative(self, "tolerance", "change")

    @property
    def held(self) -> int:
        return 8

    def solve(self, system: System, gradients: Tensor) -> Solution:
        chosen, size = self.chosen(system.examples), self.block_size
        norms = gradients.norm(dim=1)
        found, residual = torch.zeros_like(gradients), gradients.clone()
        direction = system.precondition(residual)
        residuals, changes = [relative(residual, norms)], [(norms > 0).to(norms)]
        while len(residuals) <= self.iterations:
            unsolved = residuals[-1] > self.tolerance
            if self.change:
                unsolved &= changes[-1] > self.change
            going = torch.cat([each.any().expand(len(each)) for each in unsolved.split(size)])
            if not bool(going.any()):
                break
            curved = torch.zeros_like(direction)
            curved[going] = system.product(direction[going], chosen)
            blocks = [each.split(size) for each in (found, residual, direction, curved, gradients)]
            # Of V^T (H + D) V, where V are a block's directions.
            inverses = [_inverse(v @ w.T) for v, w in zip(*blocks[2:4], strict=True)]
            changed = []
            for inverse, x, r, v, w, g in zip(inverses, *blocks, strict=True):
                steps = (inverse @ (v @ r.T)).T  # [queries, directions]
                step = steps @ v
                # dx^T (H + D) dx = dx . r, and x^T (H + D) x = x . (g - r).
                moved = dots(step, r), dots(step * system.damping, step)
                x.add_(step)
                r.sub_(steps @ w)
                changed.append(change_of_scores(moved, (dots(x, g - r), dots(x * system.damping, x))))
            residuals.append(checked(relative(residual, norms), "ConjugateGradients"))
            changes.append(torch.where(going, torch.cat(changed), changes[-1]))
            following = system.precondition(residual)
            for inverse, z, v, w in zip(inverses, following.split(size), *blocks[2:4], strict=True):
                z.sub_((inverse @ (w @ z.T)).T @ v)
            direction = following
        return Solution(found, len(residuals) - 1, torch.stack(residuals), torch.stack(changes[1:] or changes))


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
