"""Curvature: a basis, eigenvalues in that basis, and a filter of the eigenvalues.

Every strategy is one row of `STRATEGIES`. Fitting is at most two sweeps, whose collectors are here, and an
eigendecomposition; preconditioning is
`Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T`. The raw fit is kept undamped, so any damping is free afterwards. This module
does not decide what is swept or where factors are stored, and does not know what scores are.

Martens & Grosse 2015 (K-FAC), George et al. 2018 (EK-FAC), Grosse et al. 2023 (both for influence functions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from wherefrom.capture import Captured
from wherefrom.errors import InputError, LossError, MismatchError
from wherefrom.fingerprint import Fingerprint, differences
from wherefrom.layers import TrackedLayer
from wherefrom.sweep import Collector

# Grosse et al. 2023, section 3.2: the damping is this part of a layer's mean eigenvalue.
DAMPING_SHARE = 0.1


@dataclass(frozen=True)
class Strategy:
    """What a strategy needs.

    Attributes:
        basis: whether gradients are rotated into the eigenvectors of the two covariances.
        eigenvalues: "fitted" as mean squared (rotated) gradients, as the "product" of the covariances'
            eigenvalues, or "none", with which preconditioning does nothing.
    """

    basis: bool
    eigenvalues: Literal["none", "product", "fitted"]


STRATEGIES: dict[str, Strategy] = {
    "identity": Strategy(basis=False, eigenvalues="none"),
    "diagonal": Strategy(basis=False, eigenvalues="fitted"),
    "kfac": Strategy(basis=True, eigenvalues="product"),
    "ekfac": Strategy(basis=True, eigenvalues="fitted"),
}


def checked_strategy(name: str) -> Strategy:
    """The strategy of a name."""
    if name not in STRATEGIES:
        raise InputError(f"strategy={name!r}: expected one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of a layer's two covariances, as columns, with their eigenvalues.

    Attributes:
        activations: Q_A [in, in], of A = E[a a^T] over unmasked tokens.
        gradients: Q_S [out, out], of S = E[s s^T] over unmasked tokens.
        activation_eigenvalues: [in], ascending.
        gradient_eigenvalues: [out], ascending.
    """

    activations: Tensor
    gradients: Tensor
    activation_eigenvalues: Tensor
    gradient_eigenvalues: Tensor

    def eigenvalues(self) -> Tensor:
        """Those of S and A multiplied, [out, in]: the K-FAC eigenvalues."""
        return torch.outer(self.gradient_eigenvalues, self.activation_eigenvalues)

    def rotate(self, gradients: Tensor) -> Tensor:
        """Q_S^T G Q_A for [..., out, in]."""
        return self.gradients.T @ gradients @ self.activations

    def rotate_back(self, gradients: Tensor) -> Tensor:
        """Q_S G Q_A^T for [..., out, in]."""
        return self.gradients @ gradients @ self.activations.T


def weight_gradients(captured: Captured) -> Tensor:
    """Each example's gradient of a layer's weight (and bias, the last column): G = s^T a, [batch, out, in]."""
    return captured.gradients.transpose(1, 2) @ captured.activations


def rotated_gradients(captured: Captured, basis: Basis) -> Tensor:
    """Q_S^T G Q_A of each example, [batch, out, in], by whichever order of products costs fewer operations."""
    tokens, inputs = captured.activations.shape[1:]
    outputs = captured.gradients.shape[2]
    if tokens * (inputs**2 + outputs**2) < outputs * inputs * (outputs + inputs):
        rotated = captured._replace(
            activations=captured.activations @ basis.activations,
            gradients=captured.gradients @ basis.gradients,
        )
        return weight_gradients(rotated)
    return basis.rotate(weight_gradients(captured))


class CovarianceCollector(Collector):
    """Sums a a^T and s s^T over unmasked tokens, and counts them."""

    def __init__(self, layers: Mapping[str, TrackedLayer], dtype: torch.dtype, device: torch.device) -> None:
        self.sums = {}
        for name, layer in layers.items():
            outputs, inputs = layer.shape
            self.sums[f"{name}.activations"] = torch.zeros(inputs, inputs, dtype=dtype, device=device)
            self.sums[f"{name}.gradients"] = torch.zeros(outputs, outputs, dtype=dtype, device=device)
            self.sums[f"{name}.tokens"] = torch.zeros((), dtype=torch.int64, device=device)

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        activations, gradients = captured.activations.flatten(0, 1), captured.gradients.flatten(0, 1)
        self.sums[f"{layer}.activations"].addmm_(activations.T, activations)
        self.sums[f"{layer}.gradients"].addmm_(gradients.T, gradients)
        self.sums[f"{layer}.tokens"] += captured.tokens

    def means(self) -> dict[str, Tensor]:
        """A and S of every layer, as `LAYER.activations` and `LAYER.gradients`."""
        return {
            name: total / self.sums[f"{name.rpartition('.')[0]}.tokens"]
            for name, total in self.sums.items()
            if not name.endswith(".tokens")
        }


def diagonalize(covariances: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Basis]:
    """The eigenvectors of every layer's covariances, found in float64 and kept in the covariances' dtype.

    Raises:
        LossError: a covariance is not finite.
    """
    bases = {}
    for layer in layers:
        activation_eigenvalues, activations = _eigh(covariances[f"{layer}.activations"], layer)
        gradient_eigenvalues, gradients = _eigh(covariances[f"{layer}.gradients"], layer)
        bases[layer] = Basis(activations, gradients, activation_eigenvalues, gradient_eigenvalues)
    return bases


def bases_to_tensors(bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """Bases as the flat mapping that is stored: `LAYER.FIELD`."""
    return {
        f"{layer}.{each.name}": getattr(basis, each.name) for layer, basis in bases.items() for each in fields(Basis)
    }


def bases_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Basis]:
    """The inverse of `bases_to_tensors`."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {layer: Basis(*(tensors[f"{layer}.{each.name}"] for each in fields(Basis))) for layer in layers}


def _eigh(matrix: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    if not bool(matrix.isfinite().all()):
        raise LossError(
            f"Layer {layer!r}: its covariance is not finite. Some activation or gradient overflowed; "
            "load the model in float32 or bfloat16 rather than float16."
        )
    wide = torch.float32 if matrix.device.type == "mps" else torch.float64
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.to(wide))
    # A covariance has no negative eigenvalue; what is below zero is rounding.
    return eigenvalues.clamp_min(0).to(matrix.dtype), eigenvectors.to(matrix.dtype)


class EigenvalueCollector(Collector):
    """Sums squared per-example gradients, rotated where there is a basis: Lambda = E[(Q_S^T G Q_A)^2]."""

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        bases: Mapping[str, Basis],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._bases = bases
        self._examples = examples
        self.sums = {name: torch.zeros(layer.shape, dtype=dtype, device=device) for name, layer in layers.items()}

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        basis = self._bases.get(layer)
        gradients = weight_gradients(captured) if basis is None else rotated_gradients(captured, basis)
        self.sums[layer] += gradients.square_().sum(0)

    def means(self) -> dict[str, Tensor]:
        """Lambda of every layer, a mean over examples."""
        return {name: total / self._examples for name, total in self.sums.items()}


@dataclass(frozen=True)
class Factors:
    """Everything that preconditioning needs, at any damping.

    Attributes:
        strategy: one of `STRATEGIES`.
        fingerprint: what the factors were fitted from.
        bases: of every layer; empty for a strategy without one.
        eigenvalues: Lambda [out, in] of every layer, a mean over examples (`diagonal`, `ekfac`) or the product of two
            means over tokens (`kfac`); empty for `identity`.
    """

    strategy: str
    fingerprint: Fingerprint
    bases: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]

    def check_model(self, study: Fingerprint) -> None:
        """Refuse to be used on another model.

        Args:
            study: with the entries `model` and `layers`.

        Raises:
            MismatchError: names what differs.
        """
        changed = differences(
            *({name: each[name] for name in ("model", "layers")} for each in (self.fingerprint, study))
        )
        if changed:
            raise MismatchError(
                f"factors were fitted on another model. {'; '.join(changed)}. Fit factors on this model, or make the "
                "Study with the model that they belong to."
            )

    def preconditioner(self, damping: float | None = None) -> Preconditioner:
        """The damped inverse of the curvature.

        Args:
            damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer.

        Raises:
            InputError: damping is negative or not finite.
        """
        if damping is not None and not 0 <= damping < math.inf:
            raise InputError(f"damping={damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        inverses = {name: _inverse(values, damping) for name, values in self.eigenvalues.items()}
        return Preconditioner(self.bases, inverses)


@dataclass(frozen=True)
class Preconditioner:
    """A filtered curvature, applied to gradients layer by layer.

    Attributes:
        filters: f(Lambda) [out, in] of every layer; a layer without one is left as it is.
    """

    bases: Mapping[str, Basis]
    filters: Mapping[str, Tensor]

    def apply(self, layer: str, gradients: Tensor) -> Tensor:
        """Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T for [..., out, in]."""
        basis = self.bases.get(layer)
        rotated = gradients if basis is None else basis.rotate(gradients)
        filtered = rotated * self.filters[layer] if layer in self.filters else rotated
        return filtered if basis is None else basis.rotate_back(filtered)


def _inverse(eigenvalues: Tensor, damping: float | None) -> Tensor:
    """1 / (Lambda + damping), and 0 where that sum is 0: no training gradient has a part in such a direction."""
    if damping is None:
        damping = DAMPING_SHARE * float(eigenvalues.mean(dtype=torch.float64))
    damped = eigenvalues + damping
    return torch.where(damped > 0, damped.reciprocal(), 0.0)
