"""Collectors of scores: of pairs, layer by layer, and of examples with themselves.

This module knows banks, curvature and captured tensors, not where results are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.curvature.operators import Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import transformed_back, weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.memory import Workspace
from wherefrom.scoring.bank import GradientBank

SELF_INFLUENCE, SQUARED_NORM = "self_influence", "squared_norm"


class PairwiseCollector(Collector):
    """Adds up, layer by layer, the products of resident query gradients with each training gradient.

    Args:
        groups: of layers whose part is stored, by layer; empty stores none.
        summed: add up over training examples too.

    Attributes:
        sums: `values` [queries, examples], or [queries, 1] when summed, and `layers` [groups, queries, examples].
    """

    def __init__(
        self,
        bank: GradientBank,
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Mapping[str, str] | None = None,
        summed: bool = False,
    ) -> None:
        self._bank, self._groups, self._summed = bank, groups or {}, summed
        self._numbers = {group: number for number, group in enumerate(dict.fromkeys(self._groups.values()))}
        shape = (len(bank), 1 if summed else examples)
        self.sums = {"values": torch.zeros(shape, dtype=dtype, device=device)}
        if self._numbers:
            self.sums["layers"] = torch.zeros(len(self._numbers), *shape, dtype=dtype, device=device)

    def release(self) -> None:
        self._bank.release()

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        if self._summed:
            batch = slice(0, 1)
            # Gradients that hold different columns cannot be added up before the product.
            captured = captured.as_one_example() if captured.columns is None else captured
        products = self._bank.product(layer, captured)
        if self._summed:
            products = products.sum(1, keepdim=True)
        self.sums["values"][:, batch] += products.to(self.sums["values"].device)
        if layer in self._groups:
            part = self.sums["layers"][self._numbers[self._groups[layer]]]
            part[:, batch] += products.to(part.device)


class SelfInfluenceCollector(Collector):
    """Adds up, layer by layer, g^T P g and |P g|^2 of every example, with P the damped inverse of the curvature.

    In the eigenbasis P is a diagonal, and a rotation changes no norm: both are sums over the rotated gradient. Of
    conditioned factors, the second is a sum over what is transformed back.

    Args:
        training: whether the examples are those that the curvature is of, which has to be there where gradients are.

    Attributes:
        sums: `self_influence` [examples], and `squared_norm` [examples] of the preconditioned gradients.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Operator,
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
        training: bool = True,
    ) -> None:
        self._checked = preconditioner if training else None
        self._transforms, self._filters = preconditioner.transforms(layers), preconditioner.aligned_filters(layers)
        self._workspace = Workspace()
        self.sums = {name: torch.zeros(examples, dtype=dtype, device=device) for name in (SELF_INFLUENCE, SQUARED_NORM)}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        if self._checked is not None:
            self._checked.check_gradients(layer, captured)
        transform = self._transforms[layer]
        gradients = weight_gradients(captured, transform, self._workspace)
        # Not the squares first: those of small gradients vanish, which a large filter would have brought back.
        chosen = captured.selected(self._filters[layer]) if layer in self._filters else 1.0
        filtered = gradients * chosen
        influence = gradients.mul_(filtered).sum((1, 2))
        conditioned = filtered if transform.scaling is None else transformed_back(captured, transform, filtered)
        norm = conditioned.square().sum((1, 2))
        self._add(SELF_INFLUENCE, influence, batch)
        self._add(SQUARED_NORM, norm, batch)

    def _add(self, name: str, values: Tensor, batch: slice) -> None:
        self.sums[name][batch] += values.to(self.sums[name].device)

    def release(self) -> None:
        self._workspace.release()


class Together(Collector):
    """Several collectors on one sweep; their sums have different names."""

    def __init__(self, *collectors: Collector) -> None:
        self._collectors = collectors
        self.sums = {name: total for each in collectors for name, total in each.sums.items()}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        for each in self._collectors:
            each.collect(layer, captured, batch)

    def release(self) -> None:
        for each in self._collectors:
            each.release()
