"""Operators on gradients: a basis, a filter of the eigenvalues there, and both between an optimizer's coordinates.

`Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T`, layer by layer. A factor whose covariance is diagonal, or taken to be (see
`TrackedLayer.diagonal_factors`), has no eigenvectors: they are the axes. This module knows neither how a basis and
eigenvalues are fitted nor what a filter is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.damping import Spectrum
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import GradientTransform, weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.runtime.errors import LossError
from wherefrom.runtime.memory import pinned_as


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of a layer's two covariances, as columns, with their eigenvalues.

    Attributes:
        activations: Q_A [in, in], of A = E[a a^T] over unmasked tokens (`shampoo`: of R = E[G^T G] over examples);
            None for the axes themselves.
        gradients: Q_S [out, out], of S = E[s s^T] (`shampoo`: of L = E[G G^T]), likewise.
        activation_eigenvalues: [in], ascending; along the axes, the mean squares in their order.
        gradient_eigenvalues: [out], likewise.
    """

    activations: Tensor | None
    gradients: Tensor | None
    activation_eigenvalues: Tensor
    gradient_eigenvalues: Tensor

    @property
    def spectra(self) -> tuple[Spectrum, Spectrum]:
        """The eigenvalues of S and of A, as their inverses need them."""
        return (
            Spectrum(self.gradient_eigenvalues, self.gradients is not None),
            Spectrum(self.activation_eigenvalues, self.activations is not None),
        )

    def eigenvalues(self) -> Tensor:
        """Those of S and A multiplied, [out, in]: the K-FAC eigenvalues."""
        return torch.outer(self.gradient_eigenvalues, self.activation_eigenvalues)

    def rotate(self, gradients: Tensor) -> Tensor:
        """Q_S^T G Q_A for [..., out, in]."""
        gradient_basis, activation_basis = self._on(gradients.device)
        turned = gradients if gradient_basis is None else gradient_basis.T @ gradients
        return turned if activation_basis is None else turned @ activation_basis

    def rotate_back(self, gradients: Tensor) -> Tensor:
        """Q_S G Q_A^T for [..., out, in]."""
        gradient_basis, activation_basis = self._on(gradients.device)
        turned = gradients if gradient_basis is None else gradient_basis @ gradients
        return turned if activation_basis is None else turned @ activation_basis.T

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        found = [None if each is None else each.to(device) for each in (self.gradients, self.activations)]
        return found[0], found[1]


def aligned(layer: TrackedLayer, matrix: Tensor) -> Tensor:
    """Numbers [out, in] with a column for each of a captured gradient's, [out, width]; 0 past the layer's own."""
    return pinned_as(functional.pad(matrix, (0, layer.width - matrix.shape[1])), matrix)


def gradient_transforms(
    layers: Mapping[str, TrackedLayer], bases: Mapping[str, Basis], scaling: Mapping[str, Tensor]
) -> dict[str, GradientTransform]:
    """What turns each layer's captured gradients, with their aligned columns, into its basis, conditioned first.

    Args:
        bases: of layers that have one.
        scaling: P^(1/2) [out, in] of layers that are conditioned.
    """
    found = {}
    for name, layer in layers.items():
        basis, vectors = bases.get(name), None
        if basis is not None and basis.activations is not None:
            missing = layer.width - len(basis.activations)
            vectors = pinned_as(functional.pad(basis.activations, (0, missing, 0, missing)), basis.activations)
        conditioned = aligned(layer, scaling[name]) if name in scaling else None
        found[name] = GradientTransform(None if basis is None else basis.gradients, vectors, conditioned)
    return found


@dataclass(frozen=True)
class Operator:
    """A filter of curvature, applied to gradients layer by layer; with 1 / (Lambda + damping), a preconditioner.

    Attributes:
        filters: f(Lambda) [out, in] of every layer; a layer without one is left as it is.
        flat: layers without curvature in any direction, whose filter is 0.
        damping: what was added to the eigenvalues of each layer with a filter.
        scaling: P^(1/2) [out, in] of layers that are conditioned: what comes before the filter.
        outer_scaling: what comes after it; None is the same.
    """

    bases: Mapping[str, Basis]
    filters: Mapping[str, Tensor]
    flat: frozenset[str] = frozenset()
    damping: Mapping[str, float] = field(default_factory=dict)
    scaling: Mapping[str, Tensor] = field(default_factory=dict)
    outer_scaling: Mapping[str, Tensor] | None = None

    def check_gradients(self, layer: str, captured: Captured) -> None:
        """Refuse training gradients of a layer without curvature, whose part of a score has no value.

        Raises:
            LossError: names the layer.
        """
        if layer not in self.flat or not bool(weight_gradients(captured).any()):
            return
        raise LossError(
            f"Layer {layer!r}: its curvature is zero in all directions, and a training example has a gradient there of "
            f"{float(captured.gradients.abs().max()):.3g}. Either squares of gradients this small vanish (scale the "
            "loss up, or load the model in float64), or the fit's targets have no gradient: fit with empirical=True, "
            "or give a damping above 0."
        )

    def transforms(self, layers: Mapping[str, TrackedLayer]) -> dict[str, GradientTransform]:
        """What turns each layer's captured gradients, with their aligned columns, into where the filter is."""
        return gradient_transforms(layers, self.bases, self.scaling)

    def aligned_filters(self, layers: Mapping[str, TrackedLayer]) -> dict[str, Tensor]:
        """The filters with a column for each of a captured gradient's, [out, width]."""
        return {name: aligned(layers[name], each) for name, each in self.filters.items()}

    def apply(self, layer: str, gradients: Tensor, columns: Tensor | None = None) -> Tensor:
        """scaling * Q_S [ f(Lambda) * (Q_S^T (scaling * G) Q_A) ] Q_A^T for G [..., out, in].

        Args:
            columns: of a one-hot layer, whose activations have no eigenvectors: which of its columns are there for each
                of gradients [batch, out, columns], int64 [batch, columns].
        """

        def scaled(found: Tensor, matrices: Mapping[str, Tensor]) -> Tensor:
            if layer not in matrices:
                return found
            matrix = matrices[layer].to(found.device)
            return found * (matrix if columns is None else matrix[:, columns].transpose(0, 1))

        basis = self.bases.get(layer)
        turned = scaled(gradients, self.scaling)
        turned = turned if basis is None else basis.rotate(turned)
        turned = scaled(turned, self.filters)
        turned = turned if basis is None else basis.rotate_back(turned)
        return scaled(turned, self.scaling if self.outer_scaling is None else self.outer_scaling)
