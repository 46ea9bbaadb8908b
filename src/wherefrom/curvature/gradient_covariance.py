"""The collector of covariances of whole gradient matrices, whose eigenvectors are Shampoo's basis.

This module knows captured tensors and sums; it does not know what is swept or what a basis is for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.curvature.factors import CovarianceCollector, gradient_sides
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.layers import TrackedLayer
from wherefrom.runtime.memory import Workspace
from wherefrom.curvature.moments import add_columns, second_moment


class GradientCovarianceCollector(CovarianceCollector):
    """Sums G G^T and G^T G over examples: L [out, out] as `LAYER.gradients`, R [in, in] as `LAYER.activations`.

    G [out, in] is an example's gradient, the sum over its tokens (Gupta et al. 2018, Shampoo; its statistics are of a
    batch's gradient). What is counted are examples, so the means are E[G G^T] and E[G^T G]. Of a layer whose sides are
    diagonal, only their diagonals are summed; of a one-hot layer R is not diagonal, and this leaves out how often two
    ids stand in one example.

    Args:
        roots: P^(1/2) [out, in] of layers that are conditioned, of which P^(1/2) * G takes the place of G.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        dtype: torch.dtype,
        device: torch.device,
        roots: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(layers, dtype, device)
        self._sides = gradient_sides(layers, {}, roots or {})
        self._workspace = Workspace()

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        left, right = self.sums[f"{layer}.gradients"], self.sums[f"{layer}.activations"]
        matrices = weight_gradients(captured, self._sides[layer], self._workspace)  # [batch, out, columns]
        left += second_moment(matrices.transpose(1, 2), left.dim() == 1).to(left.device)
        if captured.columns is None:
            right += second_moment(matrices, right.dim() == 1).to(right.device)
        else:
            add_columns(right, matrices.square().sum(1), captured.columns)
        self.sums[f"{layer}.tokens"] += len(matrices)

    def release(self) -> None:
        self._workspace.release()
