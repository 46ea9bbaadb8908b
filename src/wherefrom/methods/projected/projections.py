"""Compressed gradients: P_S^T G P_A, a few hundred numbers of each layer, and the curvature on what they span.

The columns of P_S and P_A are orthonormal: the leading eigenvectors of the layer's two covariances (LoGra with PCA
initialisation, Choe et al. 2024), or random directions (LoGra with random ones; a TRAK, Park et al. 2023, whose
projection is a Kronecker product). Preconditioning is the inverse of the curvature restricted to their span, P^T H P +
damping with P = P_S x P_A; with square matrices nothing is lost. Numbers may be stored in fewer bits. This module knows
captured tensors and curvature; it does not know where anything is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.damping import added_damping
from wherefrom.curvature.factors import Factors
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.precision import product
from wherefrom.store.fingerprint import tensors_digest

Directions = Literal["eigenvectors", "random"]
Quantization = Literal["float32", "bfloat16", "int8"]

# The largest whole number of an int8 that has a negative.
_LARGEST = 127
# What is stored of compressed gradients.
GRADIENTS, SCALES = "gradients", "scales"


class Projection(NamedTuple):
    """Orthonormal columns for one layer.

    Attributes:
        left: P_S [out, rank].
        right: P_A [in, rank].
    """

    left: Tensor
    right: Tensor

    @property
    def size(self) -> int:
        """How many numbers a compressed gradient has."""
        return self.left.shape[1] * self.right.shape[1]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How gradients are compressed.

    Attributes:
        directions: "random" ones, for any factors; or the leading "eigenvectors" of each layer's covariances, for which
            factors need a basis (`KFAC`, `EKFAC`).
        rank: how many of a layer's outputs, and of its inputs: a layer takes rank x rank numbers, less where it is
            narrower.
        quantization: "int8", with a scale for each layer of each example; "bfloat16"; or none, "float32" (float64 for
            a float64 model).
        seed: of random directions.

    Raises:
        InputError: one of them is impossible.
    """

    directions: Directions = "random"
    rank: int = 16
    quantization: Quantization = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, known in (("directions", get_args(Directions)), ("quantization", get_args(Quantization))):
            if getattr(self, argument) not in known:
                raise InputError(f"{argument}={getattr(self, argument)!r}: expected one of {', '.join(known)}.")
        check_argument(self.rank >= 1, "rank", self.rank, "at least 1")

    @property
    def label(self) -> str:
        """The settings, in a word: what the name of an index begins with."""
        return f"{self.directions}-rank{self.rank}-{self.quantization}"

    def projections(self, layers: Mapping[str, TrackedLayer], factors: Factors | None) -> dict[str, Projection]:
        """Those of every layer.

        Args:
            factors: whose eigenvectors are meant; random directions need none.

        Raises:
            InputError: eigenvectors are wanted of factors that have none.
        """
        if self.directions == "random":
            return {name: self._random(name, layer.shape) for name, layer in layers.items()}
        if factors is None or not factors.bases:
            given = "no" if factors is None else repr(factors.strategy)
            raise InputError(
                f"directions='eigenvectors' of {given} factors, which have none: expected those of 'kfac' or "
                "'ekfac', or random directions."
            )
        found = {}
        for name in layers:
            basis, (gradients, activations) = factors.bases[name], factors.bases[name].spectra
            found[name] = Projection(
                _leading(basis.gradients, gradients.eigenvalues, self.rank),
                _leading(basis.activations, activations.eigenvalues, self.rank),
            )
        return found

    def _random(self, layer: str, shape: tuple[int, int]) -> Projection:
        """Random orthonormal columns that depend on the seed and the layer's name alone."""
        digest = hashlib.sha256(f"{self.seed} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn = (torch.randn(size, min(self.rank, size), generator=generator, dtype=torch.float64) for size in shape)
        return Projection(*(torch.linalg.qr(each).Q for each in drawn))

    def fingerprint(self, projections: Mapping[str, Projection]) -> dict[str, str]:
        """What compressed gradients depend on, beside the study.

        Random directions may differ in their last bits between machines, and are told by their seed. Eigenvectors of
        factors that were fitted again may point the other way, and are told by their bytes.
        """
        random = self.directions == "random"
        of = f"seed {self.seed}" if random else tensors_digest(projections_to_tensors(projections))[:24]
        return {"directions": f"{self.directions}, {of}", "rank": str(self.rank), "quantization": self.quantization}


def _leading(vectors: Tensor | None, eigenvalues: Tensor, rank: int) -> Tensor:
    """The columns of the largest eigenvalues, largest first; of the axes where there are no vectors."""
    chosen = _largest(eigenvalues, rank)
    if vectors is not None:
        return vectors[:, chosen]
    axes = eigenvalues.new_zeros(len(eigenvalues), len(chosen))
    axes[chosen, torch.arange(len(chosen))] = 1
    return axes


def _largest(eigenvalues: Tensor, count: int) -> Tensor:
    """Where the largest are, largest first; of equal ones the first."""
    return eigenvalues.argsort(descending=True, stable=True)[:count]


def projections_to_tensors(projections: Mapping[str, Projection]) -> dict[str, Tensor]:
    """Projections as the flat mapping that is stored: `LAYER.FACTOR`."""
    return {f"{name}.{factor}": each for name, pair in projections.items() for factor, each in pair._asdict().items()}


def projections_from_tensors(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Projection]:
    """The inverse of `projections_to_tensors`, in the order of the layers."""
    return {name: Projection(*(tensors[f"{name}.{factor}"] for factor in Projection._fields)) for name in layers}


def parts(projections: Mapping[str, Projection]) -> dict[str, slice]:
    """Where each layer's numbers are in the compressed gradient of an example, which joins all layers."""
    found, start = {}, 0
    for name, projection in projections.items():
        found[name] = slice(start, start + projection.size)
        start += projection.size
    return found


class CompressedGradients(Collector):
    """The compressed gradient of every example.

    Args:
        scales: what gradients are multiplied with before, element by element, [out, in] of each layer; None is nothing.

    Attributes:
        sums: `gradients` [examples, numbers], a layer's [rank, rank] flattened, layer after layer.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        projections: Mapping[str, Projection],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parts = parts(projections)
        self._projections = {
            name: Projection(
                left.to(device, dtype),
                functional.pad(right, (0, 0, 0, layers[name].width - len(right))).to(device, dtype),
            )
            for name, (left, right) in projections.items()
        }
        self._scales = {
            name: functional.pad(each, (0, layers[name].width - each.shape[1])).to(device, dtype)
            for name, each in (scales or {}).items()
        }
        size = sum(each.size for each in projections.values())
        self.sums = {GRADIENTS: torch.zeros(examples, size, dtype=dtype, device=device)}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        compressed = compressed_gradients(captured, self._projections[layer], self._scales.get(layer))
        total = self.sums[GRADIENTS]
        total[batch, self._parts[layer]] += compressed.flatten(1).to(total.device)


def compressed_gradients(captured: Captured, projection: Projection, scale: Tensor | None = None) -> Tensor:
    """P_S^T G P_A of each example, [batch, rank, rank]; without its gradient G = s^T a: (s P_S)^T (a P_A).

    Args:
        projection: with a row for each column of activations, `TrackedLayer.width`.
        scale: what G is multiplied with element by element, [out, width]; then G is made.
    """
    left, right = (each.to(captured.gradients.device) for each in projection)
    columns = captured.columns
    if columns is not None:
        right = right[columns]  # [batch, columns, rank]
    if scale is not None:
        found = weight_gradients(captured, dtype=left.dtype)  # [batch, out, columns]
        scale = scale.to(found.device)
        return left.T @ (found * (scale if columns is None else scale[:, columns].transpose(0, 1))) @ right
    gradients, activations = captured.gradients.to(left.dtype) @ left, captured.activations.to(left.dtype) @ right
    return product(gradients.transpose(1, 2), activations)


def preconditioned(gradients: Tensor, filters: Mapping[str, Tensor], columns: Mapping[str, slice]) -> Tensor:
    """Preconditioned compressed gradients [examples, numbers].

    Args:
        filters: what `inverse_curvature` gives.
        columns: each layer's `parts`.
    """
    found = torch.empty_like(gradients)
    for name, part in columns.items():
        inverse = filters[name].to(gradients.device, gradients.dtype)
        found[:, part] = gradients[:, part] @ inverse if inverse.dim() == 2 else gradients[:, part] * inverse
    return found


def inverse_curvature(
    factors: Factors, projections: Mapping[str, Projection], directions: Directions, damping: float | None
) -> dict[str, Tensor]:
    """The inverse of the damped curvature on what projections span.

    Along eigenvectors the curvature is diagonal, and its filter is the factors' own. Along random directions P^T H P is
    dense. Without a curvature (`identity`), random directions hold rank^2 / (out x in) of an inner product on average,
    which is made up for.

    Args:
        damping: as in `Factors.preconditioner`; above 0 along random directions.

    Returns:
        For every layer what its compressed gradient is multiplied with: numbers [numbers], one number for all, or a
        matrix [numbers, numbers].

    Raises:
        InputError: damping is 0 or too small along random directions, negative or not finite.
    """
    filters = factors.preconditioner(damping).filters
    if directions == "random" and damping == 0 and filters:
        raise InputError("damping=0 with random directions: expected a number > 0, or None.")
    found = {}
    for name, projection in projections.items():
        if name not in filters:
            found[name] = torch.tensor(len(projection.left) * len(projection.right) / projection.size)
        elif directions == "eigenvectors":
            found[name] = _restricted(factors, name, projection, filters[name])
        else:
            found[name] = _dense_inverse(factors, name, projection, damping)
    return found


def _restricted(factors: Factors, layer: str, projection: Projection, values: Tensor) -> Tensor:
    """The numbers [out, in] of leading eigenvectors, in the order of compressed gradients: [numbers]."""
    spectra = factors.bases[layer].spectra
    left, right = (
        _largest(factor.eigenvalues, each.shape[1]) for factor, each in zip(spectra, projection, strict=True)
    )
    return values[left][:, right].flatten()


def _dense_inverse(factors: Factors, layer: str, projection: Projection, damping: float | None) -> Tensor:
    """(P^T H P + damping)^-1 [numbers, numbers], of H = Q diag(Lambda) Q^T; 0 where there is no curvature at all."""
    values, basis = factors.eigenvalues[layer].double(), factors.bases.get(layer)
    left, right = (each.to(values.device, torch.float64) for each in projection)
    if basis is not None:
        left, right = (
            each if vectors is None else vectors.double().T @ each
            for each, vectors in ((left, basis.gradients), (right, basis.activations))
        )
    # C[ab, cd] = sum_ij Lambda_ij X_ia X_ic Y_jb Y_jd, with X = Q_S^T P_S and Y = Q_A^T P_A.
    squares = [(each.unsqueeze(2) * each.unsqueeze(1)).flatten(1) for each in (left, right)]  # [out, rank * rank]
    curvature = squares[0].T @ values @ squares[1]
    outputs, inputs, numbers = left.shape[1], right.shape[1], left.shape[1] * right.shape[1]
    curvature = curvature.view(outputs, outputs, inputs, inputs).transpose(1, 2).reshape(numbers, numbers)
    added = added_damping(values, damping)
    if added == 0:
        return torch.zeros_like(curvature)
    return damped_power(f"layer {layer!r}", curvature, added, -1)


def damped_power(name: str, curvature: Tensor, damping: float, exponent: float) -> Tensor:
    """(C + damping)^exponent for a symmetric positive semidefinite C [numbers, numbers].

    Args:
        name: of what it is the curvature of, for the error.

    Raises:
        InputError: the damping does not make up for directions without curvature.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    damped = eigenvalues.clamp_min(0) + damping
    if float(damped[0]) <= torch.finfo(damped.dtype).eps * len(damped) * float(damped[-1]):
        raise InputError(
            f"damping={damping:.3g}: too small to invert the projected curvature of {name}, which has directions "
            f"without any and reaches {float(damped[-1]):.3g}. Give a larger number, or None."
        )
    power: Tensor = (vectors * damped**exponent) @ vectors.T
    return power


def packed(gradients: Tensor, quantization: Quantization, columns: Mapping[str, slice]) -> dict[str, Tensor]:
    """Compressed gradients [examples, numbers] as they are stored: with int8, also `scales` [examples, layers].

    An int8 is a number over the scale of its layer and example, to which the largest number there is 127.
    """
    if quantization != "int8":
        return {GRADIENTS: gradients.bfloat16() if quantization == "bfloat16" else gradients}
    scales = torch.stack([gradients[:, part].abs().amax(1) / _LARGEST for part in columns.values()], 1)
    whole = torch.empty_like(gradients, dtype=torch.int8)
    for scale, part in zip(scales.T, columns.values(), strict=True):
        whole[:, part] = (gradients[:, part] / torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_()
    return {GRADIENTS: whole, SCALES: scales}


def unpacked(tensors: Mapping[str, Tensor], dtype: torch.dtype, columns: Mapping[str, slice]) -> Tensor:
    """The inverse of `packed`, but for what rounding has lost: [examples, numbers]."""
    gradients = tensors[GRADIENTS].to(dtype)
    if SCALES in tensors:
        for scale, part in zip(tensors[SCALES].T, columns.values(), strict=True):
            gradients[:, part] *= scale.unsqueeze(1)
    return gradients
