"""Self-influence: what training on an example does to its own loss, and the norms that normalised scores divide by.

One sweep without resident gradients: an example's gradient is only multiplied with itself. This module knows curvature
and sweeps, not where results are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.curvature.operators import Preconditioner
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import brought_back, weight_gradients
from wherefrom.engine.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.memory import Workspace

SELF_INFLUENCE, SQUARED_NORM = "self_influence", "squared_norm"


class SelfInfluenceCollector(Collector):
    """Adds up, layer by layer, g^T P g and |P g|^2 of every example, with P the damped inverse of the curvature.

    In the eigenbasis P is a diagonal, and a rotation changes no norm: both are sums over the rotated gradient. Of
    conditioned factors, the second is a sum over what is brought back.

    Args:
        training: whether the examples are those that the curvature is of, which has to be there where gradients are.

    Attributes:
        sums: `self_influence` [examples], and `squared_norm` [examples] of the preconditioned gradients.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Preconditioner,
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        training: bool = True,
    ) -> None:
        self._checked = preconditioner if training else None
        self._sides, self._filters = preconditioner.sides(layers), preconditioner.aligned_filters(layers)
        self._workspace = Workspace()
        self.sums = {name: torch.zeros(examples, dtype=dtype, device=device) for name in (SELF_INFLUENCE, SQUARED_NORM)}

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        if self._checked is not None:
            self._checked.check_gradients(layer, captured)
        sides = self._sides[layer]
        gradients = weight_gradients(captured, sides, self._workspace)
        # Not the squares first: those of small gradients vanish, which a large filter would have brought back.
        chosen = captured.selected(self._filters[layer]) if layer in self._filters else 1.0
        filtered = gradients * chosen
        influence = gradients.mul_(filtered).sum((1, 2))
        conditioned = filtered if sides.roots is None else brought_back(captured, sides, filtered)
        norm = conditioned.square().sum((1, 2))
        self._add(SELF_INFLUENCE, influence, rows)
        self._add(SQUARED_NORM, norm, rows)

    def _add(self, name: str, values: Tensor, rows: slice) -> None:
        self.sums[name][rows] += values.to(self.sums[name].device)

    def release(self) -> None:
        self._workspace.release()


class Together(Collector):
    """Several collectors on one sweep; their sums have different names."""

    def __init__(self, *collectors: Collector) -> None:
        self._collectors = collectors
        self.sums = {name: total for each in collectors for name, total in each.sums.items()}

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        for each in self._collectors:
            each.collect(layer, captured, rows)

    def release(self) -> None:
        for each in self._collectors:
            each.release()
