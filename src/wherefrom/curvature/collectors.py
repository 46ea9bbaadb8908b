"""Collectors of a fit: covariances of tokens or of whole gradients, and mean squared gradients in a basis.

This module knows captured tensors and sums; it does not know what is swept or what factors are used for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.curvature.operators import Basis, gradient_transforms
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.memory import Workspace
from wherefrom.runtime.precision import product, widened_dtype


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
            factors = zip(("gradients", "activations"), layer.padded_shape, layer.diagonal_factors, strict=True)
            for factor, size, diagonal in factors:
                shape = (size,) if diagonal else (size, size)
                self.sums[f"{name}.{factor}"] = torch.zeros(shape, dtype=dtype, device=device)
            self.sums[f"{name}.tokens"] = torch.zeros((), dtype=torch.int64, device=device)

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
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
            for factor, size in (("activations", inputs), ("gradients", outputs)):
                total = self.sums[f"{name}.{factor}"]
                mean = total[(slice(size),) * total.dim()] / tokens
                found[f"{name}.{factor}"] = mean if mean.dim() == 1 else mean.triu() + mean.triu(1).T
        return found


class EigenvalueCollector(Collector):
    """Sums squared per-example gradients, rotated where there is a basis: Lambda = E[(Q_S^T G Q_A)^2].

    Args:
        scaling: P^(1/2) [out, in] of layers that are conditioned, of which P^(1/2) * G takes the place of G.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        bases: Mapping[str, Basis],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        scaling: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layers = layers
        self._transforms = gradient_transforms(layers, bases, scaling or {})
        self._examples = examples
        self._workspace = Workspace()
        self.sums = {
            name: torch.zeros(layer.padded_shape, dtype=dtype, device=device) for name, layer in layers.items()
        }

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        gradients = weight_gradients(captured, self._transforms[layer], self._workspace)
        if captured.columns is None:
            self.sums[layer] += sum_of_squares(gradients, 0, overwrite=True).to(self.sums[layer].device)
        else:
            add_columns(self.sums[layer], gradients.square_(), captured.columns)

    def release(self) -> None:
        self._workspace.release()

    def means(self) -> dict[str, Tensor]:
        """Lambda of every layer, a mean over examples."""
        return {name: self.sums[name][:, : layer.shape[1]] / self._examples for name, layer in self._layers.items()}


class GradientCovarianceCollector(CovarianceCollector):
    """Sums G G^T and G^T G over examples: L [out, out] as `LAYER.gradients`, R [in, in] as `LAYER.activations`.

    G [out, in] is an example's gradient, the sum over its tokens (Gupta et al. 2018, Shampoo; its statistics are of a
    batch's gradient). What is counted are examples, so the means are E[G G^T] and E[G^T G]. Of factors that are
    diagonal, only the diagonals are summed; of a one-hot layer R is not diagonal, and this leaves out how often two
    ids stand in one example.

    Args:
        scaling: P^(1/2) [out, in] of layers that are conditioned, of which P^(1/2) * G takes the place of G.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        dtype: torch.dtype,
        device: torch.device,
        scaling: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(layers, dtype, device)
        self._transforms = gradient_transforms(layers, {}, scaling or {})
        self._workspace = Workspace()

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        outputs, inputs = self.sums[f"{layer}.gradients"], self.sums[f"{layer}.activations"]
        matrices = weight_gradients(captured, self._transforms[layer], self._workspace)  # [batch, out, columns]
        outputs += second_moment(matrices.transpose(1, 2), outputs.dim() == 1).to(outputs.device)
        if captured.columns is None:
            inputs += second_moment(matrices, inputs.dim() == 1).to(inputs.device)
        else:
            add_columns(inputs, matrices.square().sum(1), captured.columns)
        self.sums[f"{layer}.tokens"] += len(matrices)

    def release(self) -> None:
        self._workspace.release()


def add_columns(total: Tensor, numbers: Tensor, columns: Tensor) -> None:
    """Add numbers [batch, ..., columns] to the columns of `total` [..., width] that they are of.

    Args:
        columns: int64 [batch, columns].
    """
    added = numbers.movedim(0, -2).flatten(-2).to(total.device, total.dtype)  # [..., batch * columns]
    total.index_add_(-1, columns.flatten().to(total.device), added)


# Where a norm reads numbers once; a CPU takes ten times as long for one as for squaring and adding up.
_NORM_DEVICES = frozenset({"cuda"})


def sum_of_squares(numbers: Tensor, dimension: int, *, overwrite: bool = False) -> Tensor:
    """The sum of squares along a dimension, in float32 or wider.

    A norm squared where that is quicker: no square is written to memory, and those of bfloat16 numbers are not rounded.

    Args:
        overwrite: whether the numbers may be replaced by their squares.
    """
    dtype = widened_dtype(numbers.dtype)
    if numbers.device.type in _NORM_DEVICES:
        norm: Tensor = torch.linalg.vector_norm(numbers, dim=dimension, dtype=dtype)
        return norm.square_()
    return (numbers.square_() if overwrite else numbers.square()).sum(dimension, dtype=dtype)


def second_moment(vectors: Tensor, diagonal: bool) -> Tensor:
    """The sum of v v^T over [batch, tokens, size], without its lower triangle; or its diagonal alone."""
    flat = vectors.flatten(0, 1)
    return sum_of_squares(flat, 0) if diagonal else upper_product(flat)


# Narrower tiles waste fewer products below the diagonal, wider ones multiply faster.
_TILE = {"cpu": 256, "cuda": 1024}


def upper_product(vectors: Tensor) -> Tensor:
    """V^T V of vectors [n, size], with zeros below the tiles on the diagonal: little more than half of the products."""
    size, tile = vectors.shape[1], _TILE.get(vectors.device.type, 1024)
    result = vectors.new_zeros(size, size, dtype=widened_dtype(vectors.dtype))
    for start in range(0, size, tile):
        result[start : start + tile, start:] = product(vectors[:, start : start + tile].T, vectors[:, start:])
    return result
