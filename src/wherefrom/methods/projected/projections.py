"""Compressed gradients: P_S^T G P_A, a few hundred numbers of each layer, and the curvature on what they span.

The columns of P_S and P_A are orthonormal: the leading eigenvectors of the layer's two covariances (LoGra with PCA
initialisation, Choe et al. 2024), or random directions (LoGra with random ones; a TRAK, Park et al. 2023, whose
projection is a Kronecker product). Methods take the curvature from these numbers. This module knows captured tensors
and matrices; it does not know where anything is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.factors import Factors
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.precision import product
from wherefrom.store.fingerprint import tensors_digest

Directions = Literal["eigenvectors", "random"]

# What is stored of compressed gradients.
GRADIENTS = "gradients"


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
        seed: of random directions.

    Raises:
        InputError: one of them is impossible.
    """

    directions: Directions = "random"
    rank: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(Directions)
        check_argument(self.directions in known, "directions", self.directions, f"one of {', '.join(known)}")
        check_argument(self.rank >= 1, "rank", self.rank, "at least 1")

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
        return {"directions": f"{self.directions}, {of}", "rank": str(self.rank)}


def _leading(vectors: Tensor | None, eigenvalues: Tensor, rank: int) -> Tensor:
    """The columns of the largest eigenvalues, largest first, of equal ones the first; of the axes without vectors."""
    chosen = eigenvalues.argsort(descending=True, stable=True)[:rank]
    if vectors is not None:
        return vectors[:, chosen]
    axes = eigenvalues.new_zeros(len(eigenvalues), len(chosen))
    axes[chosen, torch.arange(len(chosen))] = 1
    return axes


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
        filters: a matrix [numbers, numbers] for each of a layer's `parts`.
        columns: these parts.
    """
    found = torch.empty_like(gradients)
    for name, part in columns.items():
        found[:, part] = gradients[:, part] @ filters[name].to(gradients.device, gradients.dtype)
    return found


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
