"""Krylov spaces: where functions of the curvature can be had of a block of gradients, from a few products with it.

In coordinates in which the damping D is 1, the curvature is D^(-1/2) H D^(-1/2) and a gradient D^(-1/2) g. The space of
k iterations is that of the gradients of a block times the powers of the curvature below k; what a polynomial of lower
degree makes of these gradients is in it, and the projection of the curvature there stands for the matrix itself (block
Lanczos; Saad 1992, section 2, for exponentials). Directions are orthogonalised against all before, since rounding makes
those of short recurrences dependent; and again where little is left, which has the rounding of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.solvers.solver import dots
from wherefrom.runtime.errors import LossError

# The part of a vector that has to be left for the rounding of the rest not to count.
_MUCH = 0.5
# An eigenvalue of dot products, as a part of the largest, below which vectors are too nearly dependent to be made
# orthonormal together with the others: what is left of them beside these is another step.
_DEPENDENT = 1e-3


class KrylovSpace:
    """A space that grows by a block of directions with each product.

    Args:
        damping: D, [weights].
        gradients: of the queries of the block, [queries, weights].

    Attributes:
        directions: orthonormal ones where D is 1, D^(1/2) V, found so far: [some, weights] for each product.
        curvature: V H V^T, [directions, directions], float64.
    """

    def __init__(self, damping: Tensor, gradients: Tensor) -> None:
        self._root = damping.sqrt()
        self.directions: list[Tensor] = []
        start = gradients / self._root
        # Vectors that go further than the directions, and the norms of what they were computed from.
        self._further, self._next = (start, start.norm(dim=1)), start.new_empty(0, start.shape[1])
        self._first = (start @ self._following().T).double()
        self.curvature = self._first.new_zeros(0, 0)

    @property
    def following(self) -> Tensor:
        """Directions V that are to be multiplied next, [some, weights]; none where the space is complete."""
        return self._following() / self._root

    @property
    def complete(self) -> bool:
        """Whether products lead no further, but for rounding."""
        return not len(self._following())

    def _following(self) -> Tensor:
        """`following` where D is 1: made when it is asked for, which it is not after the last product."""
        vectors, norms = self._further
        if len(vectors):
            nothing = vectors.new_empty(0, vectors.shape[1])
            self._next, self._further = self._basis(vectors, norms), (nothing, norms.new_empty(0))
        return self._next

    @property
    def coefficients(self) -> Tensor:
        """D^-1 g in terms of V, [queries, directions], float64."""
        return functional.pad(self._first, (0, len(self.curvature) - self._first.shape[1]))

    def extend(self, products: Tensor) -> None:
        """Take up the following directions.

        Args:
            products: (H + D) v of each of them, [some, weights].

        Raises:
            LossError: they are not finite.
        """
        moved = products / self._root
        norms = moved.norm(dim=1)  # of what is computed, by whose rounding the rest is off
        if not bool(norms.isfinite().all()):
            raise LossError(
                "A product with the Gauss-Newton matrix is not finite. Leave half_precision out, or load the model in "
                "float64."
            )
        moved -= self._following()
        self.directions.append(self._following())
        count, some = len(self.curvature), len(moved)
        larger = self.curvature.new_zeros(count + some, count + some)
        larger[:count, :count] = self.curvature
        start = 0
        for each in self.directions:
            beside = moved @ each.T  # [some, directions]
            moved.addmm_(beside, each, alpha=-1)
            here = slice(start, start + len(each))
            larger[count:, here], larger[here, count:] = beside.double(), beside.T.double()
            start += len(each)
        self.curvature = (larger + larger.T) / 2
        self._further, self._next = (moved, norms), moved.new_empty(0, moved.shape[1])

    def function(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The coefficients of f(D^-1 H) D^-1 g in terms of V, [queries, directions], float64.

        Args:
            function: f of the eigenvalues of the curvature in units of the damping, [directions].
        """
        values, vectors = torch.linalg.eigh(self.curvature)
        found: Tensor = self.coefficients @ (vectors * function(values.clamp_min(0))) @ vectors.T
        return found

    def energies(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """x^T (H + D) x and x^T D x of combinations x of V, [queries] each."""
        added = dots(coefficients, coefficients)
        return dots(coefficients @ self.curvature, coefficients) + added, added

    def combined(self, coefficients: Tensor) -> Tensor:
        """Combinations of V, [queries, weights].

        Args:
            coefficients: [queries, directions].
        """
        parts = coefficients.to(self._root.dtype).split([len(each) for each in self.directions], 1)
        found = self._root.new_zeros(len(coefficients), len(self._root))
        for part, each in zip(parts, self.directions, strict=True):
            found.addmm_(part, each)
        return found.div_(self._root)

    def release(self) -> Tensor:
        """V, [directions, weights], which the space then has no more: only its numbers stay."""
        found = torch.cat([self._next[:0], *self.directions]).div_(self._root)
        nothing = found.new_empty(0, found.shape[1])  # a slice would keep all of it
        self.directions, self._further, self._next = [], (nothing, found.new_empty(0)), nothing
        return found

    def _basis(self, vectors: Tensor, norms: Tensor) -> Tensor:
        """An orthonormal basis of what vectors have beside the directions, [as many at most, weights].

        Args:
            vectors: [some, weights], orthogonal to the directions but for rounding.
            norms: of what they were computed from, [some].
        """
        noise, found = 100 * torch.finfo(vectors.dtype).eps, list[Tensor]()
        left = vectors.norm(dim=1)
        if bool((left < _MUCH * norms).any()):
            vectors, left = _beside(vectors, self.directions)
        while bool((new := left > noise * norms).any()):
            vectors, left = vectors[new], left[new].unsqueeze(1)
            values, rotation = torch.linalg.eigh((vectors @ vectors.T / left / left.T).double())
            apart, rotation = values > _DEPENDENT * values[-1], rotation.to(vectors.dtype) / left
            found.append((rotation[:, apart] / values[apart].sqrt().to(vectors.dtype)).T @ vectors)
            vectors = rotation[:, ~apart].T @ vectors
            norms = torch.ones_like(vectors[:, 0])
            vectors, left = _beside(vectors, [*self.directions, *found])
        return found[0] if len(found) == 1 else torch.cat([vectors[:0], *found])


def _beside(vectors: Tensor, directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What vectors have beside orthonormal directions, and its norms; again while the rounding of what goes counts."""
    left = vectors.norm(dim=1)
    while True:
        before = left
        for each in directions:
            vectors = torch.addmm(vectors, vectors @ each.T, each, alpha=-1)
        left = vectors.norm(dim=1)
        if not bool((left < _MUCH * before).any()):
            return vectors, left
