"""What there is to score, and what an example of it costs: operations and bytes, by arithmetic on sizes.

This module does not know how scores are planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from wherefrom.curvature.factors import Strategy
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.runtime.memory import Footprint
from wherefrom.runtime.precision import widened_dtype

# Operations of a symmetric eigendecomposition with eigenvectors, a size cubed times this (Golub & Van Loan, 8.3).
_EIGH_FLOP = 9.0


@dataclass(frozen=True)
class Workload:
    """What there is to do, and with what.

    Attributes:
        queries, train: how many there are to score.
        fit_train: how many training examples factors are fitted on.
        query, example: what a query and a training example take.
        dtype: of resident query gradients.
        usable: bytes to plan with on `device`, where the model is.
        query_rank, query_bits: of the smaller form that query gradients are resident in; None keeps them as they are.
        query_batch, train_batch: None leaves the size to the plan.
        offload_factors: only one layer's factors are on the device at a time.
    """

    layers: Mapping[str, TrackedLayer]
    strategy: Strategy
    queries: int
    train: int
    fit_train: int
    query: Footprint
    example: Footprint
    dtype: torch.dtype
    usable: int
    device: torch.device
    query_rank: int | None = None
    query_bits: int | None = None
    query_batch: int | None = None
    train_batch: int | None = None
    offload_factors: bool = False

    @property
    def half(self) -> bool:
        """Whether products take bfloat16 operands, rather than their values in float32."""
        return self.dtype == torch.bfloat16 and self.device.type == "cuda"

    @property
    def basis_bytes(self) -> int:
        """What the covariances of all layers take, or their eigenvectors."""
        return sum(map(self.layer_basis_bytes, self.layers.values()))

    @property
    def eigenvalue_bytes(self) -> int:
        """What the eigenvalues of all layers take."""
        return sum(map(self._eigenvalue_bytes, self.layers.values()))

    @property
    def factor_bytes(self) -> int:
        """What bases and eigenvalues take on the device; while they are in use, they are there twice."""
        return self.on_device(lambda layer: self.layer_basis_bytes(layer) + self._eigenvalue_bytes(layer))

    def layer_basis_bytes(self, layer: TrackedLayer) -> int:
        """What both covariances of a layer take, or their eigenvectors."""
        factors = zip(layer.padded_shape, layer.diagonal_factors, strict=True)
        numbers = sum(size * (1 if diagonal else size) for size, diagonal in factors)
        return numbers * bool(self.strategy.basis) * widened_dtype(self.dtype).itemsize

    def _eigenvalue_bytes(self, layer: TrackedLayer) -> int:
        numbers = math.prod(layer.padded_shape) * (self.strategy.eigenvalues != "none")
        return numbers * widened_dtype(self.dtype).itemsize

    def on_device(self, size: Callable[[TrackedLayer], int]) -> int:
        """Of all layers, or of the largest alone if factors are offloaded."""
        sizes = [size(layer) for layer in self.layers.values()]
        return max(sizes) if self.offload_factors else sum(sizes)

    # Operations for one layer

    def gradient_flop(self, layer: TrackedLayer, tokens: int) -> float:
        """To form one example's gradient, in the eigenbasis where there is one."""
        return forming_flop(layer, tokens) + sum(self.rotation_flop(layer, tokens))

    def rotation_flop(self, layer: TrackedLayer, tokens: int) -> tuple[float, float]:
        """To bring one example's gradient into the gradient and into the activation basis.

        Multiplied are its tokens or the gradient itself, whichever is less; in half precision always its tokens, by a
        basis in two terms (see `precision.rotated`).
        """
        outputs, columns = layer.shape[0], layer.columns(tokens)
        gradients, activations = (2 * tokens,) * 2 if self.half else (min(tokens, columns), min(tokens, outputs))
        rotates = self._rotates(layer)
        return 2.0 * outputs**2 * gradients * rotates[0], 2.0 * columns**2 * activations * rotates[1]

    def change_of_basis_flop(self, name: str, sweeps: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """To have all gradients in the same coordinates, those of the gradient and of the activation basis.

        Returns:
            For all query gradients out of the basis, and for all training gradients into it.
        """
        layer, terms = self.layers[name], 2 if self.half else 1
        outputs, columns = layer.shape[0], layer.columns(self.query.tokens_of(name))
        each, rotates = 2.0 * terms * self.queries * outputs * columns, self._rotates(layer)
        gradients, activations = self.rotation_flop(layer, self.example.tokens_of(name))
        back = each * outputs * rotates[0], each * columns * rotates[1]
        return back, (sweeps * self.train * gradients, sweeps * self.train * activations)

    def _rotates(self, layer: TrackedLayer) -> tuple[bool, bool]:
        """Whether the gradient and the activation factor have eigenvectors."""
        rotates = [self.strategy.basis is not None and not diagonal for diagonal in layer.diagonal_factors]
        return rotates[0], rotates[1]

    def covariance_flop(self, layer: TrackedLayer, tokens: int) -> float:
        """For one example's part of both covariances, of which only one triangle is computed."""
        outputs, columns = layer.shape[0], layer.columns(tokens)
        whole = self.strategy.basis == "gradients"
        # Vectors whose outer products a covariance sums: tokens, or the columns and rows of the gradient.
        vectors = (columns, outputs) if whole else (tokens, tokens)
        factors = zip(vectors, (outputs, columns), layer.diagonal_factors, strict=True)
        products = sum(count * (1 if diagonal else size) * size for count, size, diagonal in factors)
        return products + forming_flop(layer, tokens) * whole

    def eigendecomposition_flop(self, layer: TrackedLayer) -> float:
        """For the eigenvectors of both covariances."""
        factors = zip(layer.shape, layer.diagonal_factors, strict=True)
        return _EIGH_FLOP * sum(size**3 for size, diagonal in factors if not diagonal)


def forming_flop(layer: TrackedLayer, tokens: int) -> float:
    """Operations that form one example's gradient of a layer."""
    return 2.0 * tokens * layer.shape[0] * layer.columns(tokens)
