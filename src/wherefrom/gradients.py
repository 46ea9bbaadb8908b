"""Banks of per-example gradients, kept in memory while a training set is swept against them.

A bank holds the preconditioned gradient of every query, whole or as a product of two thin matrices, and multiplies it
with training gradients. It does not decide how many queries there are room for (`plan` does).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.capture import Captured
from wherefrom.curvature import Preconditioner, Sides, weight_gradients
from wherefrom.layers import TrackedLayer
from wherefrom.memory import Workspace
from wherefrom.precision import product, rotated, widened_dtype
from wherefrom.sweep import Collector

# What is moved to the device, widened or rebuilt from thin matrices at a time.
PIECE_BYTES = 2**28
# Directions beyond the rank in a randomised decomposition, and its power iterations (Halko et al. 2011, section 4.5).
_OVERSAMPLING, _ITERATIONS = 8, 2
_SQUARED_NORM, _SQUARED_REST = "squared norm", "squared rest"


@dataclass(frozen=True)
class BankForm:
    """How query gradients are kept.

    Attributes:
        dtype: of their numbers.
        place: the device that they lie on.
        streamed: whether that is another than the model's, so that they are moved there piece by piece for every batch.
        rank: of the two thin matrices; None keeps gradients whole, as do layers in which that takes less.
        rotated_back: for each layer, whether the preconditioned gradient is brought back from the eigenbasis on its
            left and right side; otherwise each training gradient is brought there.
    """

    dtype: torch.dtype
    place: torch.device
    streamed: bool = False
    rank: int | None = None
    rotated_back: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    def thin(self, layer: TrackedLayer) -> bool:
        """Whether a layer's gradients are kept as two thin matrices."""
        outputs, width = layer.padded_shape
        return self.rank is not None and self.rank * (outputs + width) < outputs * width

    def bytes_per_query(self, layers: Mapping[str, TrackedLayer]) -> int:
        """What one query takes."""
        numbers = 0
        for layer in layers.values():
            outputs, width = layer.padded_shape
            numbers += (self.rank or 0) * (outputs + width) if self.thin(layer) else outputs * width
        return numbers * self.dtype.itemsize


class GradientBank(Collector):
    """The preconditioned gradient of every query, layer by layer.

    Attributes:
        sums: a tensor [queries, out, width] for each layer or, of low rank, `LAYER.left` [queries, out, rank] and
            `LAYER.right` [queries, rank, width].
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Preconditioner,
        queries: int,
        form: BankForm,
    ) -> None:
        self._queries = queries
        self._form = form
        self._sides = {name: each.sides(layers[name].width) for name, each in preconditioner.bases.items()}
        self._filters = {
            name: functional.pad(each, (0, layers[name].width - each.shape[1]))
            for name, each in preconditioner.filters.items()
        }
        self._workspace, self._rebuilt = Workspace(), Workspace()
        self.sums = {}
        for name, layer in layers.items():
            outputs, width = layer.padded_shape
            if form.rank is not None and form.thin(layer):
                self.sums[f"{name}.left"] = self._zeros(queries, outputs, form.rank)
                self.sums[f"{name}.right"] = self._zeros(queries, form.rank, width)
            else:
                self.sums[name] = self._zeros(queries, outputs, width)
        if form.rank is not None:
            self.sums[_SQUARED_NORM] = torch.zeros(queries, dtype=torch.float64, device=form.place)
            self.sums[_SQUARED_REST] = torch.zeros(queries, dtype=torch.float64, device=form.place)

    def __len__(self) -> int:
        """How many queries there are."""
        return self._queries

    def _zeros(self, *shape: int) -> Tensor:
        form = self._form
        return torch.zeros(shape, dtype=form.dtype, device=form.place, pin_memory=form.streamed)

    def release(self) -> None:
        self._workspace.release()
        self._rebuilt.release()

    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        sides = self._sides.get(layer, Sides())
        gradients = weight_gradients(captured, sides, self._workspace)
        if layer in self._filters:
            gradients *= self._filters[layer]
        if layer in self.sums:
            self.sums[layer][rows] = self._back(layer, gradients)
        else:
            self._collect_thin(layer, gradients, sides, rows)

    def _back(self, layer: str, gradients: Tensor) -> Tensor:
        """Preconditioned gradients out of the eigenbasis, on the sides that are to be."""
        remaining = self._remaining(layer)
        left, right = self._sides.get(layer, Sides())
        if left is not None and remaining.left is None:
            gradients = left @ gradients
        if right is not None and remaining.right is None:
            gradients = gradients @ right.T
        return gradients

    def _remaining(self, layer: str) -> Sides:
        """What training gradients of a layer are to be multiplied with, because the bank's are in the eigenbasis."""
        left, right = self._sides.get(layer, Sides())
        back_left, back_right = self._form.rotated_back.get(layer, (True, True))
        return Sides(None if back_left else left, None if back_right else right)

    def _collect_thin(self, layer: str, gradients: Tensor, sides: Sides, rows: slice) -> None:
        """Keep the largest singular directions; two thin matrices are rotated back at little cost."""
        left, right = _truncated(gradients, self.sums[f"{layer}.left"].shape[2])
        squared = gradients.square().sum((1, 2), dtype=torch.float64)
        kept = right.square().sum((1, 2), dtype=torch.float64)  # the left matrix is orthonormal
        self.sums[_SQUARED_NORM][rows] += squared.to(self._form.place)
        self.sums[_SQUARED_REST][rows] += (squared - kept).clamp_min(0).to(self._form.place)
        self.sums[f"{layer}.left"][rows] = left if sides.left is None else sides.left @ left
        self.sums[f"{layer}.right"][rows] = right if sides.right is None else right @ sides.right.T

    def summed(self, total: GradientBank | None = None) -> GradientBank:
        """One gradient, the sum of all queries', added to another such bank; only of whole gradients."""
        if total is None:
            total = copy.copy(self)
            total._queries, total.sums = 1, {}
        for name, each in self.sums.items():
            added = each.sum(0, keepdim=True, dtype=widened_dtype(each.dtype)).to(each.dtype)
            total.sums[name] = total.sums[name] + added if name in total.sums else added
        return total

    def relative_errors(self) -> Tensor | None:
        """How much of each query's preconditioned gradient the low rank leaves out, as a part of its norm: [queries].

        Layers that are kept whole count in neither norm. None when there is no low rank.
        """
        if self._form.rank is None:
            return None
        norm, rest = self.sums[_SQUARED_NORM], self.sums[_SQUARED_REST]
        return torch.where(norm > 0, (rest / norm).sqrt(), 0.0)

    def product(self, layer: str, captured: Captured) -> Tensor:
        """Dot products of every query with each training gradient of a layer: [queries, batch].

        Operands are rounded to the bank's type, products are summed in float32 or wider.
        """
        if layer not in self.sums and self._tokens_are_cheaper(layer, captured):
            return self._product_of_tokens(layer, captured)
        dtype = self._form.dtype
        gradients = weight_gradients(captured, self._remaining(layer), self._workspace, dtype).flatten(1)
        if dtype == torch.bfloat16 and gradients.device.type == "cpu":
            gradients = gradients.float()  # a product that most CPUs do by software; the numbers are the same
        pieces = [product(piece.flatten(1), gradients.T) for piece in self._pieces(layer, gradients)]
        return torch.cat(pieces)

    def _pieces(self, layer: str, like: Tensor) -> Iterator[Tensor]:
        """A layer's gradients [queries, out, width] of the type and on the device of `like`, some queries at a time."""
        if layer in self.sums:
            whole = self.sums[layer]
            same = whole.dtype == like.dtype and whole.device == like.device
            count = len(whole) if same else self._per_piece(whole[0].numel() * like.element_size())
            for piece in whole.split(count):
                yield piece.to(like.device, like.dtype, non_blocking=True)
            return
        left, right = self.sums[f"{layer}.left"], self.sums[f"{layer}.right"]
        outputs, width = left.shape[1], right.shape[2]
        count = self._per_piece(outputs * width * like.element_size())
        for thin_left, thin_right in zip(left.split(count), right.split(count), strict=True):
            out = self._rebuilt.empty((len(thin_left), outputs, width), like)
            operands = (each.to(like.device, like.dtype, non_blocking=True) for each in (thin_left, thin_right))
            yield torch.bmm(*operands, out=out)

    @staticmethod
    def _per_piece(bytes_each: int) -> int:
        return max(1, PIECE_BYTES // bytes_each)

    def _tokens_are_cheaper(self, layer: str, captured: Captured) -> bool:
        """Whether to multiply thin matrices with each token, rather than rebuild the gradients they stand for."""
        left, right = self.sums[f"{layer}.left"], self.sums[f"{layer}.right"]
        batch, tokens = captured.activations.shape[:2]
        by_tokens, rebuilt = thin_product_flop((left.shape[1], right.shape[2]), left.shape[2], tokens, batch)
        return by_tokens < rebuilt

    def _product_of_tokens(self, layer: str, captured: Captured) -> Tensor:
        """sum_t (s_t^T left) (right a_t) for every query and training example: [queries, batch]."""
        left, right = self.sums[f"{layer}.left"], self.sums[f"{layer}.right"]
        batch, tokens = captured.activations.shape[:2]
        count = self._per_piece(batch * tokens * left.shape[2] * captured.gradients.element_size())
        found = []
        for thin_left, thin_right in zip(left.split(count), right.split(count), strict=True):
            columns, rows = (
                each.to(captured.gradients.device, captured.gradients.dtype) for each in (thin_left, thin_right)
            )
            one = torch.einsum("bto,qor->qbtr", captured.gradients, columns)
            two = torch.einsum("bti,qri->qbtr", captured.activations, rows)
            found.append((one * two).sum((2, 3), dtype=widened_dtype(one.dtype)))
        return torch.cat(found)

    def in_basis(self, layer: str, captured: Captured) -> Captured:
        """A training batch's tensors in the basis that the bank keeps a layer's gradients in, for `token_products`."""
        left, right = self._remaining(layer) if layer in self.sums else Sides()
        return captured._replace(
            activations=captured.activations if right is None else rotated(captured.activations, right),
            gradients=captured.gradients if left is None else rotated(captured.gradients, left),
        )

    def token_products(self, layer: str, query: int, activations: Tensor, gradients: Tensor) -> Tensor:
        """What each position adds to the dot product of one query with training gradients: s_t^T P a_t.

        Args:
            activations: [batch, tokens, width]; gradients: [batch, tokens, out]; both `in_basis`.

        Returns:
            [batch, tokens]; over tokens, the sum is `product`.
        """
        names = [layer] if layer in self.sums else [f"{layer}.left", f"{layer}.right"]
        wide = widened_dtype(gradients.dtype)
        projected = gradients.to(wide)
        for name in names:
            projected = projected @ self.sums[name][query].to(gradients.device, wide)
        return (projected * activations).sum(-1)  # projected: [batch, tokens, width]


def thin_product_flop(shape: tuple[int, int], rank: int, tokens: int, batch: int) -> tuple[float, float]:
    """Operations for a product of thin matrices with one training gradient: by tokens, and rebuilt once a batch."""
    outputs, width = shape
    return 2.0 * tokens * (outputs + width) * rank, 2.0 * outputs * width * (1 + rank / batch)


def _truncated(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Thin factors of [batch, n, m]: left [batch, n, rank], orthonormal, and right [batch, rank, m].

    A randomised singular value decomposition (Halko, Martinsson & Tropp 2011), from the same random directions for
    every matrix, so that the result does not depend on the batch.
    """
    directions = min(rank + _OVERSAMPLING, *matrices.shape[1:])
    devices = [matrices.device] if matrices.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrices, directions, _ITERATIONS)
    return left[..., :rank], (right * values.unsqueeze(1))[..., :rank].transpose(1, 2)
