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
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.capture import Captured
from wherefrom.damping import Side, added_damping, check_eigenvalues, damped_inverse
from wherefrom.errors import InputError, LossError, MismatchError
from wherefrom.fingerprint import Fingerprint, differences
from wherefrom.layers import TrackedLayer
from wherefrom.memory import Workspace
from wherefrom.moments import add_columns, second_moment
from wherefrom.precision import product, rotated
from wherefrom.sweep import Collector


@dataclass(frozen=True)
class Strategy:
    """What a strategy needs.

    Attributes:
        basis: what gradients are rotated into the eigenvectors of: the two "covariances" of tokens, A = E[a a^T] and
            S = E[s s^T], or those of whole examples' "gradients", R = E[G^T G] and L = E[G G^T]; None leaves them.
        eigenvalues: "fitted" as mean squared (rotated) gradients, as the "product" of the covariances'
            eigenvalues, "recorded" in training, or "none", with which preconditioning does nothing.
    """

    basis: Literal["covariances", "gradients"] | None
    eigenvalues: Literal["none", "product", "fitted", "recorded"]

    def stage(self, result: str) -> str:
        """The name of a result of the fit, the same for strategies that have it in common.

        Args:
            result: "covariance", "eigenbasis" or "eigenvalues".
        """
        return {None: "diagonal", "covariances": result, "gradients": f"gradient-{result}"}[self.basis]


STRATEGIES: dict[str, Strategy] = {
    "identity": Strategy(basis=None, eigenvalues="none"),
    "diagonal": Strategy(basis=None, eigenvalues="fitted"),
    "kfac": Strategy(basis="covariances", eigenvalues="product"),
    "ekfac": Strategy(basis="covariances", eigenvalues="fitted"),
    "shampoo": Strategy(basis="gradients", eigenvalues="fitted"),
}
ADAM = Strategy(basis=None, eigenvalues="recorded")
"""That of factors that are not fitted; `adam.adam_factors` makes them."""


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

    def sides(self, width: int) -> Sides:
        """What turns gradients of `width` columns (see `TrackedLayer.width`) into this basis."""
        if self.activations is None:
            return Sides(self.gradients)
        missing = width - len(self.activations)
        return Sides(self.gradients, functional.pad(self.activations, (0, missing, 0, missing)))

    def rotate(self, gradients: Tensor) -> Tensor:
        """Q_S^T G Q_A for [..., out, in]."""
        turned = gradients if self.gradients is None else self.gradients.T @ gradients
        return turned if self.activations is None else turned @ self.activations

    def rotate_back(self, gradients: Tensor) -> Tensor:
        """Q_S G Q_A^T for [..., out, in]."""
        turned = gradients if self.gradients is None else self.gradients @ gradients
        return turned if self.activations is None else turned @ self.activations.T


class Sides(NamedTuple):
    """What per-example gradients are multiplied with from the left (transposed) and from the right; None is nothing."""

    left: Tensor | None = None
    right: Tensor | None = None

    def on(self, device: torch.device) -> Sides:
        """Both on a device."""
        return Sides(*(None if each is None else each.to(device, non_blocking=True) for each in self))


def weight_gradients(
    captured: Captured, sides: Sides | None = None, workspace: Workspace | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Each example's gradient of a layer's weight, left^T G right with G = s^T a: [batch, out, width].

    The bias is a column of it, `TrackedLayer.shape[1] - 1`; columns past that are zero. Of a one-hot layer, only
    `Captured.columns` are there.

    Args:
        sides: orthogonal matrices, for gradients in a basis; None is neither.
        workspace: where the result is put; it is good until the next call with the same one.
        dtype: of the result; float32 or wider by default.
    """
    activations, gradients = captured.activations, captured.gradients
    left, right = (sides or Sides()).on(gradients.device)
    tokens, width, outputs = activations.shape[1], activations.shape[2], gradients.shape[2]
    # Each side is rotated where it has fewer rows: token by token, or in the product. Products rounded to bfloat16
    # must not be rotated, since their rounding errors would be rotated with them.
    half = gradients.dtype == torch.bfloat16
    if left is not None and (half or tokens < width):
        gradients, left = rotated(gradients, left), None
    if right is not None and (half or tokens < outputs):
        activations, right = rotated(activations, right), None
    transposed = gradients.transpose(1, 2)
    if workspace is None or half:
        result = product(transposed, activations, dtype if half else None)
    else:
        result = torch.bmm(transposed, activations, out=workspace.empty((len(gradients), outputs, width), gradients))
    if left is not None:
        result = left.T @ result
    if right is not None:
        result = result @ right
    return result if dtype is None else result.to(dtype)


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
            add_columns(activations, captured.activations.square().sum(1, dtype=activations.dtype), captured.columns)
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
    """Sums squared per-example gradients, rotated where there is a basis: Lambda = E[(Q_S^T G Q_A)^2]."""

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        bases: Mapping[str, Basis],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._sides = {name: bases[name].sides(layer.width) for name, layer in layers.items() if name in bases}
        self._examples = examples
        self._workspace = Workspace()
        self.sums = {
            name: torch.zeros(layer.padded_shape, dtype=dtype, device=device) for name, layer in layers.items()
        }

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        squares = weight_gradients(captured, self._sides.get(layer), self._workspace).square_()
        if captured.columns is None:
            self.sums[layer] += squares.sum(0).to(self.sums[layer].device)
        else:
            add_columns(self.sums[layer], squares, captured.columns)

    def release(self) -> None:
        self._workspace.release()

    def means(self) -> dict[str, Tensor]:
        """Lambda of every layer, a mean over examples."""
        return {name: self.sums[name][:, : layer.shape[1]] / self._examples for name, layer in self._layers.items()}


@dataclass(frozen=True)
class Factors:
    """Everything that preconditioning needs, at any damping.

    Attributes:
        strategy: one of `STRATEGIES`, or "adam".
        fingerprint: what the factors were fitted from.
        bases: of every layer; empty for a strategy without one.
        eigenvalues: Lambda [out, in] of every layer, a mean over examples, or for `kfac` the product of two means over
            tokens, or for `adam` the root of recorded squares; empty for `identity`.
    """

    strategy: str
    fingerprint: Fingerprint
    bases: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]

    @property
    def kind(self) -> Strategy:
        """What the strategy needs."""
        return ADAM if self.strategy == "adam" else checked_strategy(self.strategy)

    @property
    def usual_damping(self) -> float | None:
        """What a damping of None stands for: 0 where training has set its own, else None, which is a part of Lambda."""
        return 0.0 if self.kind.eigenvalues == "recorded" else None

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
            damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer (`adam`: nothing),
                and 0 makes it the Moore-Penrose pseudo-inverse.

        Raises:
            InputError: damping is negative or not finite.
            LossError: a layer's curvature is too small or too large for the numbers' type.
        """
        if damping is not None and not 0 <= damping < math.inf:
            raise InputError(f"damping={damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        damping = self.usual_damping if damping is None else damping
        product, filters, added = self.kind.eigenvalues == "product", {}, {}
        for name, values in self.eigenvalues.items():
            sides = self.bases[name].spectra if name in self.bases else ()
            check_eigenvalues(name, values, sides, product)
            added[name] = added_damping(values, damping)
            filters[name] = damped_inverse(values, added[name], sides)
        flat = frozenset(name for name, each in filters.items() if not bool(each.any()))
        return Preconditioner(self.bases, filters, flat, added)


@dataclass(frozen=True)
class Preconditioner:
    """A filtered curvature, applied to gradients layer by layer.

    Attributes:
        filters: f(Lambda) [out, in] of every layer; a layer without one is left as it is.
        flat: layers without curvature in any direction, whose filter is 0.
        damping: what was added to the eigenvalues of each layer with a filter.
    """

    bases: Mapping[str, Basis]
    filters: Mapping[str, Tensor]
    flat: frozenset[str] = frozenset()
    damping: Mapping[str, float] = field(default_factory=dict)

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
        """What turns each layer's captured gradients, with their aligned columns, into the basis."""
        return {name: basis.sides(layers[name].width) for name, basis in self.bases.items()}

    def aligned_filters(self, layers: Mapping[str, TrackedLayer]) -> dict[str, Tensor]:
        """The filters with a column for each of a captured gradient's, [out, width]."""
        return {
            name: functional.pad(each, (0, layers[name].width - each.shape[1])) for name, each in self.filters.items()
        }

    def apply(self, layer: str, gradients: Tensor) -> Tensor:
        """Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T for [..., out, in]."""
        basis = self.bases.get(layer)
        rotated = gradients if basis is None else basis.rotate(gradients)
        filtered = rotated * self.filters[layer] if layer in self.filters else rotated
        return filtered if basis is None else basis.rotate_back(filtered)
