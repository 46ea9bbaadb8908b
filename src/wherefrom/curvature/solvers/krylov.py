"""Krylov spaces: where functions of the curvature can be had of a block of gradients, from a few products with it.

In coordinates in which the damping D is 1, the curvature is D^(-1/2) H D^(-1/2) and a gradient D^(-1/2) g. The space of
k iterations is that of the gradients of a block times the powers of the curvature below k; what a polynomial of lower
degree makes of these gradients is in it, and the projection of the curvature there stands for the matrix itself (block
Lanczos; Saad 1992, section 2, for exponentials). Directions are orthogonalised against all before, twice, since
rounding makes those of short recurrences dependent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.solvers.solver import dots

# Numbers of a vector that are in float64 at a time.
_COLUMNS = 2**20


class KrylovSpace:
    """A space that grows by a block of directions with each product.

    Args:
        damping: D, [weights].
        gradients: of the queries of the block, [queries, weights].

    Attributes:
        directions: V, found so far, [directions, weights]: V D V^T = 1.
        following: those to be multiplied next, [some, weights]; none where the space is complete.
        curvature: V H V^T, [directions, directions], float64.
        coefficients: of D^-1 g, [queries, directions], float64: it is these times `directions`.
    """

    def __init__(self, damping: Tensor, gradients: Tensor) -> None:
        self._damping = damping
        self.directions: list[Tensor] = []
        self.following = self._orthonormal(gradients / damping, self._norms(gradients / damping))
        self._first = _products(gradients, self.following)
        self.curvature = self._first.new_zeros(0, 0)

    @property
    def coefficients(self) -> Tensor:
        return functional.pad(self._first, (0, len(self.curvature) - self._first.shape[1]))

    def extend(self, products: Tensor) -> None:
        """Take up the following directions.

        Args:
            products: (H + D) v of each of them, [some, weights].
        """
        norms = self._norms(products / self._damping)
        products = products - self.following * self._damping
        self.directions.append(self.following)
        beside = torch.cat([_products(each, products) for each in self.directions])  # [directions, some]
        count, some = len(self.curvature), len(products)
        larger = beside.new_zeros(count + some, count + some)
        larger[:count, :count] = self.curvature
        larger[:, count:], larger[count:] = beside, beside.T
        larger[count:, count:] = (beside[count:] + beside[count:].T) / 2
        self.curvature = larger
        self.following = self._orthonormal(products / self._damping, norms)

    def function(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The coefficients of f(D^-1 H) D^-1 g in the space, [queries, directions].

        Args:
            function: f of the eigenvalues of the curvature in units of the damping, [directions].
        """
        values, vectors = torch.linalg.eigh(self.curvature)
        found: Tensor = self.coefficients @ (vectors * function(values.clamp_min(0))) @ vectors.T
        return found

    def combined(self, coefficients: Tensor) -> Tensor:
        """Combinations of directions, [queries, weights].

        Args:
            coefficients: [queries, directions].
        """
        parts = coefficients.to(self._damping.dtype).split([len(each) for each in self.directions], 1)
        found = torch.zeros(
            len(coefficients), len(self._damping), dtype=self._damping.dtype, device=self._damping.device
        )
        for part, each in zip(parts, self.directions, strict=True):
            found.addmm_(part, each)
        return found

    def _orthonormal(self, vectors: Tensor, norms: Tensor) -> Tensor:
        """A basis of what vectors have beside the directions, [as many at most, weights].

        Args:
            norms: of what they are computed from, [vectors], by whose rounding they are off.
        """
        noise = 100 * torch.finfo(vectors.dtype).eps
        # Twice, since what is small after the first time has the rounding of what was large.
        for _ in range(2):
            for each in self.directions:
                vectors = vectors - (vectors * self._damping) @ each.T @ each
            left = self._norms(vectors)
            new = left > noise * norms
            vectors = vectors[new] / left[new].unsqueeze(1)
            values, rotation = torch.linalg.eigh(_products(vectors * self._damping, vectors))
            apart = values > max(noise**2, 1e-14) * len(values)
            vectors = (rotation[:, apart] / values[apart].sqrt()).T.to(vectors.dtype) @ vectors
            norms = self._norms(vectors)
        return vectors

    def _norms(self, vectors: Tensor) -> Tensor:
        """In the damping, [vectors]."""
        return dots(vectors * self._damping, vectors).sqrt()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Dot products of rows, [left, right], in float64, some columns at a time: rounding decides what is dependent."""
    parts = zip(left.split(_COLUMNS, 1), right.split(_COLUMNS, 1), strict=True)
    found = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for one, other in parts:
        found.addmm_(one.double(), other.double().T)
    return found
