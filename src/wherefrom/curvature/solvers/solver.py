"""What solvers have in common: the system they solve, what they have found, and how far that is from a solution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError, LossError

# Above these a solve is said not to have converged: the part of scores that the last iteration has changed (one that
# changes them by 0.14 leaves ranks that correlate with those before by 0.97) and, where that is not known, the relative
# residual: 0 is a solution, and 1 what x = 0 has.
MOST_CHANGE, MOST_RESIDUAL = 0.2, 0.1


class System(Protocol):
    """The matrix H + D, a mean over examples plus the damping, and what stands for its inverse."""

    @property
    def examples(self) -> int:
        """How many examples H is a mean over."""

    @property
    def damping(self) -> Tensor:
        """D, [weights]."""

    def product(self, vectors: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """(H + D) v for each row of [queries, weights], where H is of some examples alone if they are given."""

    def precondition(self, vectors: Tensor) -> Tensor:
        """What the filter makes of each row of [queries, weights]."""


_SAID = {
    "residuals": "the relative residual is",
    "last_changes": "the last has changed scores by an estimated part of",
}


class Solution(NamedTuple):
    """What a solver has found.

    Attributes:
        vectors: x [queries, weights].
        iterations: how many it took.
        residuals: |g - (H + D) x| / |g| before each iteration, and of the vectors last, [iterations + 1, queries]: 1
            where x is 0. `Astra`'s, but for the last, are of each iteration's own batch, so they are noisy, and those
            of all examples are smaller. None where x is no solution of that system.
        changes: by how much each iteration has changed scores, as a part of theirs, [iterations, queries]; estimated by
            `change_of_scores`. None where iterations are noisy.
    """

    vectors: Tensor
    iterations: int
    residuals: Tensor | None = None
    changes: Tensor | None = None

    @property
    def accuracy(self) -> dict[str, Tensor]:
        """The `residuals` of the vectors and their `last_changes`, [queries], as far as they are known."""
        found = {"residuals": self.residuals, "last_changes": self.changes}
        return {name: each[-1] for name, each in found.items() if each is not None}

    def __str__(self) -> str:
        """How many iterations there were, and what they have come to."""
        known = [
            f"{_SAID[name]} {each.median():.2g} in the median of {len(each)} queries, {each.max():.2g} at most"
            for name, each in self.accuracy.items()
        ]
        return f"after {self.iterations} iterations, {'; '.join(known)}"


class Solver(ABC):
    """How query gradients are preconditioned beyond the factors' filter.

    Attributes:
        label: what it adds to the name of scores.
        held: how many vectors of a query gradient's size are in memory for each query.
        block_size: how many queries, one after another, make each other's solutions: they are solved together.
        filtered: whether it starts from the factors' filter.
    """

    label: ClassVar[str]
    filtered: ClassVar[bool] = True
    block_size: int = 1

    @property
    @abstractmethod
    def held(self) -> int: ...

    @abstractmethod
    def solve(self, system: System, gradients: Tensor) -> Solution:
        """Solve (H + D) x = g, or what else it is for, for each row g of [queries, weights].

        Raises:
            LossError: the iterations diverge.
        """


@dataclass(frozen=True, kw_only=True)
class Blocks(Solver):
    """What solvers have in common for which H is the same in every iteration.

    Args:
        examples: how many training examples H is a mean over, drawn once; None is all.
        seed: of that draw.
        block_size: how many queries share their directions: the first so many, the next, and so on.

    Raises:
        InputError: a number is impossible.
    """

    examples: int | None = None
    seed: int = 0
    block_size: int = 1

    def __post_init__(self) -> None:
        check_at_least_one(self, "examples", "block_size")

    def chosen(self, examples: int) -> Sequence[int] | None:
        """Those of so many that H is of; None is all."""
        if self.examples is None or self.examples >= examples:
            return None
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(self.seed))
        return sorted(order[: self.examples].tolist())


def change_of_scores(step: tuple[Tensor, Tensor], solution: tuple[Tensor, Tensor]) -> Tensor:
    """By how much a step has changed a query's scores, as a part of theirs, [queries]; 0 where there are none.

    A score is x . g_t, and H is about the mean of g_t g_t^T, so x^T H x is about the mean square of a query's scores.
    Where that is lost in the rounding of x^T (H + D) x, the rounding stands for it, so that nothing is said to be done.

    Args:
        step: dx^T (H + D) dx and dx^T D dx, [queries] each.
        solution: x^T (H + D) x and x^T D x.
    """
    moved, whole = (
        torch.maximum(both - added, 100 * torch.finfo(both.dtype).eps * both) for both, added in (step, solution)
    )
    return torch.where(whole > 0, moved.clamp_min(0) / whole, 0).sqrt()


def check_at_least_one(solver: Solver, *names: str) -> None:
    """Refuse numbers below 1.

    Raises:
        InputError: names the field.
    """
    for name in names:
        value = getattr(solver, name)
        if value is not None and value < 1:
            raise InputError(f"{type(solver).__name__}: {name}={value}: expected at least 1.")


def check_not_negative(solver: Solver, *names: str) -> None:
    """Refuse what is no finite number from 0.

    Raises:
        InputError: names the field.
    """
    for name in names:
        value = getattr(solver, name)
        if not 0 <= value < math.inf:
            raise InputError(f"{type(solver).__name__}: {name}={value}: expected a number >= 0, such as 1e-3.")


def dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row with the same row of the other matrix, [queries]."""
    return torch.einsum("qw,qw->q", left, right)


def relative(vectors: Tensor, norms: Tensor) -> Tensor:
    """Norms of rows in units of others, [queries]; 0 where those are."""
    return torch.where(norms > 0, vectors.norm(dim=1) / norms, 0)


def checked(residuals: Tensor, solver: str) -> Tensor:
    """Refuse residuals that have grown beyond all bounds."""
    if not bool((residuals < 1e6).all()):
        largest = float(residuals.nan_to_num(torch.inf).max())
        raise LossError(
            f"{solver}: the iterations diverge: a residual is {largest:.3g} times its query gradient. Give more "
            "damping or, for Astra, a smaller learning_rate or a larger batch_size."
        )
    return residuals


def not_converged(accuracy: Mapping[str, Tensor], solver: Solver, damping: str) -> str | None:
    """What is to be said of solutions, [queries]; None where all of them are good enough for scores.

    Args:
        accuracy: as `Solution.accuracy` has it.
        damping: in words.
    """
    changes, residuals = (accuracy.get(name) for name in ("last_changes", "residuals"))
    said, advice = [], "Give more iterations"
    # What is solved is done, by however long a step.
    unsolved = True if residuals is None else residuals > MOST_RESIDUAL
    if changes is not None and bool(((changes > MOST_CHANGE) & unsolved).any()):
        said.append(
            f"the last iteration has changed scores by an estimated {changes.median():.2g} of their size in the median "
            f"and {changes.max():.2g} at most, where {MOST_CHANGE} hardly moves their order"
        )
    # Scores come out well long before the residual is small, which is a norm over all weights.
    if residuals is not None and bool((residuals > (MOST_RESIDUAL if changes is None else 1)).any()):
        worse = int((residuals > 1).sum())
        than_nothing = f" ({worse} of them worse than x = 0 would be)" * bool(worse)
        said.append(
            f"the relative residual |g - (H + D) x| / |g| is {residuals.median():.2g} in the median and "
            f"{residuals.max():.2g} at most{than_nothing}, where a solution has 0"
        )
        advice += (
            f", or a larger damping than {damping}, which Kronecker factors get along with and the matrix itself often "
            "does not"
        )
    if not said:
        return None
    return (
        f"{solver} has not converged: {'; and '.join(said)}. These scores are not those of the whole "
        f"Gauss-Newton matrix yet. {advice}."
    )
