"""Curvature: a basis, eigenvalues in that basis, and a filter of the eigenvalues.

Every strategy is one row of `STRATEGIES`. Fitting is at most two sweeps, whose collectors are here, and an
eigendecomposition; preconditioning is `Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T`. The raw fit is stored undamped, so any
damping is free afterwards. A factor whose covariance is diagonal, or taken to be (see `TrackedLayer.diagonal_factors`),
has no eigenvectors: they are the axes. This module does not decide what is swept or where factors are stored, and does
not know what scores are. Factors may be on another device than what is captured; what is needed is moved there.

Martens & Grosse 2015 (K-FAC), George et al. 2018 (EK-FAC), Grosse et al. 2023 (both for influence functions); Gupta
et al. 2018 (Shampoo, here with EK-FAC's eigenvalues).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from wherefrom.curvature.damping import added_damping, check_eigenvalues, damped_inverse
from wherefrom.curvature.operators import Basis, Operator
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.runtime.errors import InputError, MismatchError, check_argument
from wherefrom.runtime.memory import pinned_as
from wherefrom.store.fingerprint import Fingerprint, differences
from wherefrom.store.space import Step, file_overhead


@dataclass(frozen=True)
class Strategy:
    """What a strategy needs.

    Attributes:
        basis: what gradients are rotated into the eigenvectors of: the two "covariances" of tokens, A = E[a a^T] and
            S = E[s s^T], or those of whole examples' "gradients", R = E[G^T G] and L = E[G G^T]; None leaves them.
        eigenvalues: "fitted" as mean squared (rotated) gradients, as the "product" of the covariances'
            eigenvalues, or "none", with which preconditioning does nothing.
    """

    basis: Literal["covariances", "gradients"] | None
    eigenvalues: Literal["none", "product", "fitted"]

    def stage(self, result: str) -> str:
        """The name of a result of the fit, the same for strategies that have it in common.

        Args:
            result: "covariance", "eigenbasis" or "eigenvalues".
        """
        return {None: "diagonal", "covariances": result, "gradients": f"gradient-{result}"}[self.basis]

    @property
    def stages(self) -> list[str]:
        """The names of all results of the fit that are the strategy's own or in its basis, the last one first."""
        found = ["eigenvalues"] if self.basis or self.eigenvalues == "fitted" else []
        found += ["eigenbasis", "covariance"] if self.basis else []
        return [self.stage(each) for each in found]


STRATEGIES: dict[str, Strategy] = {
    "identity": Strategy(basis=None, eigenvalues="none"),
    "diagonal": Strategy(basis=None, eigenvalues="fitted"),
    "kfac": Strategy(basis="covariances", eigenvalues="product"),
    "ekfac": Strategy(basis="covariances", eigenvalues="fitted"),
    "shampoo": Strategy(basis="gradients", eigenvalues="fitted"),
}


def checked_strategy(name: str) -> Strategy:
    """The strategy of a name."""
    check_argument(name in STRATEGIES, "strategy", name, f"one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def bases_to_tensors(bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """Bases as the flat mapping that is stored: `LAYER.FIELD`."""
    named = {
        f"{layer}.{each.name}": getattr(basis, each.name) for layer, basis in bases.items() for each in fields(Basis)
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def bases_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Basis]:
    """The inverse of `bases_to_tensors`."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        layer: Basis(
            tensors.get(f"{layer}.activations"),
            tensors.get(f"{layer}.gradients"),
            tensors[f"{layer}.activation_eigenvalues"],
            tensors[f"{layer}.gradient_eigenvalues"],
        )
        for layer in layers
    }


@dataclass(frozen=True)
class Factors:
    """Everything that preconditioning needs, at any damping.

    Attributes:
        strategy: one of `STRATEGIES`.
        fingerprint: what the factors were fitted from.
        bases: of every layer; empty for a strategy without one.
        eigenvalues: Lambda [out, in] of every layer, a mean over examples, or for `kfac` the product of two means over
            tokens; empty for `identity`.
        scaling: P^(1/2) [out, in] of every layer, if these are factors of gradients P^(1/2) * G; else empty.
    """

    strategy: str
    fingerprint: Fingerprint
    bases: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]
    scaling: Mapping[str, Tensor] = field(default_factory=dict)

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

    def preconditioner(self, damping: float | None = None) -> Operator:
        """The damped inverse of the curvature.

        Args:
            damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer, and 0 makes it the
                Moore-Penrose pseudo-inverse.

        Raises:
            InputError: damping is negative or not finite.
            LossError: a layer's curvature is too small or too large for the numbers' type.
        """
        if damping is not None and not 0 <= damping < math.inf:
            raise InputError(f"damping={damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        product, filters, added = STRATEGIES[self.strategy].eigenvalues == "product", {}, {}
        for name, values in self.eigenvalues.items():
            spectra = self.bases[name].spectra if name in self.bases else ()
            check_eigenvalues(name, values, spectra, product)
            added[name] = added_damping(values, damping)
            filters[name] = pinned_as(damped_inverse(values, added[name], spectra), values)
        flat = frozenset(name for name, each in filters.items() if not bool(each.any()))
        return Operator(self.bases, filters, flat, added, self.scaling)


def fit_steps(
    layers: Mapping[str, TrackedLayer], strategy: Strategy, dtype: torch.dtype, ranks: int
) -> dict[str, Step]:
    """The results of a fit by name, in the order in which they are made.

    Args:
        dtype: of factors.
        ranks: processes, each of which stores the partial sums of its own share.
    """
    found = {}
    if strategy.basis:
        kronecker = [
            (size, padded, diagonal)
            for layer in layers.values()
            for size, padded, diagonal in zip(layer.shape, layer.padded_shape, layer.diagonal_factors, strict=True)
        ]
        squares = sum(size * (1 if diagonal else size) for size, _, diagonal in kronecker) * dtype.itemsize
        sums = sum(padded * (1 if diagonal else padded) for _, padded, diagonal in kronecker) * dtype.itemsize
        vectors = sum(size + (0 if diagonal else size * size) for size, _, diagonal in kronecker) * dtype.itemsize
        headers = file_overhead(3 * len(layers))
        name = strategy.stage("covariance")
        found[name] = Step.swept(name, squares + headers, sums + headers, ranks)
        vectors += file_overhead(4 * len(layers))
        name = strategy.stage("eigenbasis")
        found[name] = Step(name, vectors, vectors)
    if strategy.eigenvalues == "fitted":
        name = strategy.stage("eigenvalues")
        headers = file_overhead(len(layers))
        stored, sums = (
            sum(math.prod(shape) for shape in shapes) * dtype.itemsize + headers
            for shapes in ([each.shape for each in layers.values()], [each.padded_shape for each in layers.values()])
        )
        found[name] = Step.swept(name, stored, sums, ranks)
    return found
