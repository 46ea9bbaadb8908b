"""Curvature: a basis, eigenvalues in that basis, and a filter of the eigenvalues.

Every strategy is one row of `STRATEGIES`. Fitting is at most two sweeps, whose collectors are here, and an
eigendecomposition; preconditioning is
`Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T`. The raw fit is kept undamped, so any damping is free afterwards. A side whose
covariance is diagonal, or taken to be (see `TrackedLayer.diagonal_sides`), has no eigenvectors: they are the axes. This
module does not decide what is swept or where factors are stored, and does not know what scores are. Factors may be on
another device than what is captured; what is needed is moved there.

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
from torch.nn import functional

from wherefrom.engine.capture import Captured
from wherefrom.curvature.damping import Side, added_damping, check_eigenvalues, damped_inverse
from wherefrom.runtime.errors import InputError, LossError, MismatchError
from wherefrom.engine.example_gradients import Sides, weight_gradients
from wherefrom.store.fingerprint import Fingerprint, differences
from wherefrom.engine.layers import TrackedLayer
from wherefrom.runtime.memory import Workspace, pinned_as
from wherefrom.curvature.moments import add_columns, second_moment, sum_of_squares
from wherefrom.engine.sweep import Collector


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
    if name not in STRATEGIES:
        raise InputError(f"strategy={name!r}: expected one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


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
    def spectra(self) -> tuple[Side, Side]:
        """The eigenvalues of S and of A, as their inverses need them."""
        return (
            Side(self.gradient_eigenvalues, self.gradients is not None),
            Side(self.activation_eigenvalues, self.activations is not None),
        )

    def eigenvalues(self) -> Tensor:
        """Those of S and A multiplied, [out, in]: the K-FAC eigenvalues."""
        return torch.outer(self.gradient_eigenvalues, self.activation_eigenvalues)

    def rotate(self, gradients: Tensor) -> Tensor:
        """Q_S^T G Q_A for [..., out, in]."""
        turned = gradients if self.gradients is None else self.gradients.T @ gradients
        return turned if self.activations is None else turned @ self.activations

    def rotate_back(self, gradients: Tensor) -> Tensor:
        """Q_S G Q_A^T for [..., out, in]."""
        turned = gradients if self.gradients is None else self.gradients @ gradients
        return turned if self.activations is None else turned @ self.activations.T


class CovarianceCollector(Collector):
    """Sums a a^T and s s^T over unmasked tokens, and counts them.

    The sums have no lower triangle, and where only the diagonal is used they are that alone. Layers that read the same
    tensor, such as the three projections of an attention, share the product of it.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer], dtype: torch.dtype, device: torch.device) -> None:
        self._layers = layers
        self._latest: tuple[Tensor, Tensor] | None = None
        self.sums = {}
        for name, layer in layers.items():
            sides = zip(("gradients", "activations"), layer.padded_shape, layer.diagonal_sides, strict=True)
            for side, size, diagonal in sides:
                shape = (size,) if diagonal else (size, size)
                self.sums[f"{name}.{side}"] = torch.zeros(shape, dtype=dtype, device=device)
            self.sums[f"{name}.tokens"] = torch.zeros((), dtype=torch.int64, device=device)

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        activations, gradients = self.sums[f"{layer}.activations"], self.sums[f"{layer}.gradients"]
        if captured.columns is None:
            activations += self._activation_product(captured.activations, activations.dim() == 1).to(activations.device)
        else:
            add_columns(activations, sum_of_squares(captured.activations, 1), captured.columns)
        gradients += second_moment(captured.gradients, gradients.dim() == 1).to(gradients.device)
        self.sums[f"{layer}.tokens"] += captured.tokens

    def release(self) -> None:
        self._latest = None

    def _activation_product(self, activations: Tensor, diagonal: bool) -> Tensor:
        if self._latest is None or self._latest[0] is not activations:
            self._latest = (activations, second_moment(activations, diagonal))
        return self._latest[1]

    def means(self) -> dict[str, Tensor]:
        """A and S of every layer, `LAYER.activations` and `LAYER.gradients`; their diagonals where only those count."""
        found = {}
        for name, layer in self._layers.items():
            outputs, inputs = layer.shape
            tokens = self.sums[f"{name}.tokens"].clamp_min(1)  # none where no loss depends on the layer
            for side, size in (("activations", inputs), ("gradients", outputs)):
                total = self.sums[f"{name}.{side}"]
                mean = total[(slice(size),) * total.dim()] / tokens
                found[f"{name}.{side}"] = mean if mean.dim() == 1 else mean.triu() + mean.triu(1).T
        return found


def aligned(layer: TrackedLayer, matrix: Tensor) -> Tensor:
    """Numbers [out, in] with a column for each of a captured gradient's, [out, width]; 0 past the layer's own."""
    return pinned_as(functional.pad(matrix, (0, layer.width - matrix.shape[1])), matrix)


def gradient_sides(
    layers: Mapping[str, TrackedLayer], bases: Mapping[str, Basis], roots: Mapping[str, Tensor]
) -> dict[str, Sides]:
    """What turns each layer's captured gradients, with their aligned columns, into its basis, conditioned first.

    Args:
        bases: of layers that have one.
        roots: P^(1/2) [out, in] of layers that are conditioned.
    """
    found = {}
    for name, layer in layers.items():
        basis, vectors = bases.get(name), None
        if basis is not None and basis.activations is not None:
            missing = layer.width - len(basis.activations)
            vectors = pinned_as(functional.pad(basis.activations, (0, missing, 0, missing)), basis.activations)
        conditioned = aligned(layer, roots[name]) if name in roots else None
        found[name] = Sides(None if basis is None else basis.gradients, vectors, conditioned)
    return found


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


class EigenvalueCollector(Collector):
    """Sums squared per-example gradients, rotated where there is a basis: Lambda = E[(Q_S^T G Q_A)^2].

    Args:
        roots: P^(1/2) [out, in] of layers that are conditioned, of which P^(1/2) * G takes the place of G.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        bases: Mapping[str, Basis],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        roots: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layers = layers
        self._sides = gradient_sides(layers, bases, roots or {})
        self._examples = examples
        self._workspace = Workspace()
        self.sums = {
            name: torch.zeros(layer.padded_shape, dtype=dtype, device=device) for name, layer in layers.items()
        }

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        gradients = weight_gradients(captured, self._sides[layer], self._workspace)
        if captured.columns is None:
            self.sums[layer] += sum_of_squares(gradients, 0, overwrite=True).to(self.sums[layer].device)
        else:
            add_columns(self.sums[layer], gradients.square_(), captured.columns)

    def release(self) -> None:
        self._workspace.release()

    def means(self) -> dict[str, Tensor]:
        """Lambda of every layer, a mean over examples."""
        return {name: self.sums[name][:, : layer.shape[1]] / self._examples for name, layer in self._layers.items()}


@dataclass(frozen=True)
class Factors:
    """Everything that preconditioning needs, at any damping.

    Attributes:
        strategy: one of `STRATEGIES`.
        fingerprint: what the factors were fitted from.
        bases: of every layer; empty for a strategy without one.
        eigenvalues: Lambda [out, in] of every layer, a mean over examples, or for `kfac` the product of two means over
            tokens; empty for `identity`.
        roots: P^(1/2) [out, in] of every layer, if these are factors of gradients P^(1/2) * G; else empty.
    """

    strategy: str
    fingerprint: Fingerprint
    bases: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]
    roots: Mapping[str, Tensor] = field(default_factory=dict)

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
            sides = self.bases[name].spectra if name in self.bases else ()
            check_eigenvalues(name, values, sides, product)
            added[name] = added_damping(values, damping)
            filters[name] = pinned_as(damped_inverse(values, added[name], sides), values)
        flat = frozenset(name for name, each in filters.items() if not bool(each.any()))
        return Preconditioner(self.bases, filters, flat, added, self.roots)


@dataclass(frozen=True)
class Preconditioner:
    """A filtered curvature, applied to gradients layer by layer.

    Attributes:
        filters: f(Lambda) [out, in] of every layer; a layer without one is left as it is.
        flat: layers without curvature in any direction, whose filter is 0.
        damping: what was added to the eigenvalues of each layer with a filter.
        roots: P^(1/2) [out, in] of layers that are conditioned: the filter stands between P^(1/2) and P^(1/2).
    """

    bases: Mapping[str, Basis]
    filters: Mapping[str, Tensor]
    flat: frozenset[str] = frozenset()
    damping: Mapping[str, float] = field(default_factory=dict)
    roots: Mapping[str, Tensor] = field(default_factory=dict)

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

    def sides(self, layers: Mapping[str, TrackedLayer]) -> dict[str, Sides]:
        """What turns each layer's captured gradients, with their aligned columns, into where the filter is."""
        return gradient_sides(layers, self.bases, self.roots)

    def aligned_filters(self, layers: Mapping[str, TrackedLayer]) -> dict[str, Tensor]:
        """The filters with a column for each of a captured gradient's, [out, width]."""
        return {name: aligned(layers[name], each) for name, each in self.filters.items()}

    def apply(self, layer: str, gradients: Tensor) -> Tensor:
        """Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T for [..., out, in], conditioned before and after."""
        basis, roots = self.bases.get(layer), self.roots.get(layer)
        turned = gradients if roots is None else roots * gradients
        turned = turned if basis is None else basis.rotate(turned)
        turned = turned * self.filters[layer] if layer in self.filters else turned
        turned = turned if basis is None else basis.rotate_back(turned)
        return turned if roots is None else roots * turned
