"""Banks of per-example gradients, kept in memory while a training set is swept against them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wherefrom.capture import Captured
from wherefrom.curvature import Preconditioner, weight_gradients
from wherefrom.layers import TrackedLayer
from wherefrom.sweep import Collector


class GradientBank(Collector):
    """The preconditioned gradient of every query, layer by layer.

    Attributes:
        sums: a tensor [queries, out, in] for each layer, in the bank's dtype.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Preconditioner,
        queries: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._preconditioner = preconditioner
        self.sums = {
            name: torch.zeros(queries, *layer.shape, dtype=dtype, device=device) for name, layer in layers.items()
        }

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        self.sums[layer][rows] = self._preconditioner.apply(layer, weight_gradients(captured))

    def product(self, layer: str, gradients: Tensor) -> Tensor:
        """Dot products of every query with each of `gradients` [batch, out, in]: [queries, batch].

        Operands are rounded to the bank's dtype, products are accumulated in the dtype of `gradients`.
        """
        bank, gradients = self.sums[layer].flatten(1), gradients.flatten(1)
        wide = gradients.dtype
        if bank.dtype == wide:
            return bank @ gradients.T
        if bank.is_cuda:
            return torch.mm(bank, gradients.to(bank.dtype).T, out_dtype=wide)
        # Most CPUs multiply half precision very slowly; rounding the operands gives the same numbers.
        return bank.to(wide) @ gradients.to(bank.dtype).to(wide).T

    def token_products(self, layer: str, query: int, activations: Tensor, gradients: Tensor) -> Tensor:
        """What each position adds to the dot product of one query with training gradients: s_t^T P a_t.

        Args:
            activations: [batch, tokens, in]; gradients: [batch, tokens, out].

        Returns:
            [batch, tokens]; over tokens, the sum is `product`.
        """
        projected = gradients @ self.sums[layer][query].to(gradients.dtype)  # [batch, tokens, in]
        return (projected * activations).sum(-1)


def bytes_per_query(layers: Mapping[str, TrackedLayer], dtype: torch.dtype) -> int:
    """What one query takes in a bank."""
    return sum(outputs * inputs for outputs, inputs in (each.shape for each in layers.values())) * dtype.itemsize
