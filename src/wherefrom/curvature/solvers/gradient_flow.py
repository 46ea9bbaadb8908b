"""What training for a finite time makes of a gradient, instead of what it would end with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.solvers.krylov import KrylovSpace
from wherefrom.curvature.solvers.solver import (
    MOST_CHANGE,
    Blocks,
    Solution,
    System,
    change_of_scores,
    check_at_least_one,
    check_not_negative,
)


@dataclass(frozen=True)
class GradientFlow(Blocks):
    """x = (1 - exp(-D^-1 H)) H^-1 g: what training for the time 1 / D makes of a gradient, in a block Krylov space.

    Along dx/dt = P (g - H x), from x = 0 to the time tau, with D = P^-1 / tau: directions of much curvature arrive
    where `ConjugateGradients` ends, at H^-1 g, and those of little have gone by D^-1 g, as there. Between them,
    1 / (H + D) is a stand-in for the training that this is (Bae et al. 2024, arXiv 2405.12186, equation 12, of which it
    is one segment, with the exact matrix for Kronecker factors). The space is that of `krylov`; an iteration is a
    product with H, as for conjugate gradients, and the directions of all iterations stay in memory.

    It starts from no filter, so it is for `Dot`.

    Args:
        iterations: at most; each is one pass over the examples.
        tolerance: a block is done when an iteration has changed no query's scores by a larger part of them than this,
            as far as can be estimated without the training examples (`Solution.changes`).

    Raises:
        InputError: a number is impossible.
    """

    iterations: int = 8
    tolerance: float = 0.02

    label: ClassVar[str] = "flow"
    filtered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "iterations")
        check_not_negative(self, "tolerance")

    @property
    def held(self) -> int:
        return 2 * self.iterations + 6  # directions of all iterations, and a copy that training gradients meet

    def solve(self, system: System, gradients: Tensor) -> Solution:
        spaces, changes = self.spaces(system, gradients)
        found = torch.cat([each.combined(each.function(passed)) for each in spaces])
        return Solution(found, len(changes), changes=changes)

    def spaces(self, system: System, gradients: Tensor) -> tuple[list[KrylovSpace], Tensor]:
        """The Krylov space of each block of queries, and `Solution.changes`."""
        chosen, blocks = self.chosen(system.examples), gradients.split(self.block_size)
        spaces = [KrylovSpace(system.damping, each) for each in blocks]
        found = [each.function(passed) for each in spaces]
        changes = [each.any(1).double() for each in blocks]
        history = [torch.cat(changes)]
        while len(history) <= self.iterations:
            going = [
                number
                for number, (space, change) in enumerate(zip(spaces, changes, strict=True))
                if not space.complete and bool((change > self.tolerance).any())
            ]
            if not going:
                break
            following = [spaces[number].following for number in going]
            products = system.product(torch.cat(following), chosen).split([len(each) for each in following])
            for number, product in zip(going, products, strict=True):
                space, before = spaces[number], found[number]
                space.extend(product)
                found[number] = after = space.function(passed)
                step = after - functional.pad(before, (0, after.shape[1] - before.shape[1]))
                changes[number] = change_of_scores(*(space.energies(each) for each in (step, after)))
            history.append(torch.cat(changes))
        for space, change, last in zip(spaces, changes, history[-1].split(self.block_size), strict=True):
            if bool((change > MOST_CHANGE).any()) and space.complete:
                last.zero_()  # another iteration would change nothing
        return spaces, torch.stack(history[1:] or history)


def passed(curvature: Tensor) -> Tensor:
    """(1 - exp(-H)) / H of eigenvalues, 1 at 0."""
    return torch.where(curvature > 0, -torch.expm1(-curvature) / curvature, 1)
