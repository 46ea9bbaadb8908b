"""Where curvature is: the leading directions of each layer's outputs and inputs, of drawn gradients.

This module is linear algebra on captured tensors; it does not know checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from wherefrom.curvature.operators import gradient_transforms
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector

# A side of a layer that is wider, such as a vocabulary, is left whole: its covariance would be too large.
_WIDEST = 4000
_SIDES = ("outputs", "inputs")


class Directions(NamedTuple):
    """Orthonormal columns for a layer's gradients [out, width]; None leaves that side whole.

    Attributes:
        outputs: [out, rank].
        inputs: [width, rank].
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None

    def shape(self, layer: TrackedLayer) -> tuple[int, int]:
        """Of a gradient in these directions."""
        sizes = zip(layer.padded_shape, self, strict=True)
        outputs, inputs = (size if side is None else side.shape[1] for size, side in sizes)
        return outputs, inputs

    def of(self, gradients: Tensor) -> Tensor:
        """Gradients [..., out, width] in these directions."""
        found = gradients if self.outputs is None else self.outputs.T @ gradients
        return found if self.inputs is None else found @ self.inputs


class ConditionedGradients(Collector):
    """Gradients times P^(1/2), in directions of each layer, those of all layers side by side.

    Args:
        scaling: P^(1/2) [out, in] of each layer.
        directions: of each layer.
        gradients: where they are put.

    Attributes:
        sums: `gradients` [examples, numbers].
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        scaling: Mapping[str, Tensor],
        directions: Mapping[str, Directions],
        gradients: Tensor,
    ) -> None:
        self._transforms, self._layers, self._directions = gradient_transforms(layers, {}, scaling), layers, directions
        self._parts, start = dict[str, slice](), 0
        for name, layer in layers.items():
            outputs, inputs = directions[name].shape(layer)
            self._parts[name] = slice(start, start + outputs * inputs)
            start += outputs * inputs
        self.sums = {"gradients": gradients}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        found = whole(captured, self._layers[layer], weight_gradients(captured, self._transforms[layer]))
        self.sums["gradients"][batch, self._parts[layer]] = self._directions[layer].of(found).flatten(1)


class ConditionedCovariances(Collector):
    """Sums of G G^T and G^T G over examples, of gradients G times P^(1/2), for layers that are to be reduced.

    Attributes:
        sums: `LAYER.outputs` [out, out] and `LAYER.inputs` [width, width], of sides that are.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer], scaling: Mapping[str, Tensor], rank: int, like: Tensor):
        self._transforms, self._layers = gradient_transforms(layers, {}, scaling), layers
        self.sums = {
            f"{name}.{side}": like.new_zeros(size, size)
            for name, layer in layers.items()
            for side, size, own in zip(_SIDES, layer.padded_shape, layer.shape, strict=True)
            if math.prod(layer.shape) > rank**2 and rank < own <= _WIDEST
        }

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        found = whole(captured, self._layers[layer], weight_gradients(captured, self._transforms[layer]))
        for side, each in zip(_SIDES, (found.mT, found), strict=True):
            if f"{layer}.{side}" in self.sums:
                flat = each.flatten(0, 1)
                self.sums[f"{layer}.{side}"].addmm_(flat.T, flat)


def whole(captured: Captured, layer: TrackedLayer, gradients: Tensor) -> Tensor:
    """A layer's gradients [batch, out, width], also where only some columns are held."""
    if captured.columns is None:
        return gradients
    found = gradients.new_zeros(len(gradients), *layer.padded_shape)
    return found.scatter_add_(2, captured.columns.unsqueeze(1).expand_as(gradients), gradients)


def leading(covariances: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The eigenvectors of the largest eigenvalues of each, as columns, [size, rank]."""
    return {name: torch.linalg.eigh(each)[1][:, -rank:].contiguous() for name, each in covariances.items()}


def by_layer(
    vectors: Mapping[str, Tensor], layers: Mapping[str, TrackedLayer], device: torch.device
) -> dict[str, Directions]:
    """Stored eigenvectors as the directions of every layer."""
    moved = {name: each.to(device) for name, each in vectors.items()}
    return {name: Directions(*(moved.get(f"{name}.{side}") for side in _SIDES)) for name in layers}
