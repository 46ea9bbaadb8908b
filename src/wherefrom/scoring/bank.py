"""Banks of per-example gradients, resident in memory while a training set is swept against them.

A bank holds the preconditioned gradient of every query, whole, in 8-bit integers or as a product of two matrices of low
rank, and multiplies it with training gradients. Of one-hot layers it holds the columns that a query touches. It does
not decide how many queries there is memory for (`plan` does).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from wherefrom.curvature.operators import Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import GradientTransform, transformed_back, weight_gradients
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.nonfinite import NotFiniteError
from wherefrom.engine.sweep import Collector
from wherefrom.planning.forms import PIECE_BYTES, BankForm, dequantized, low_rank_product_flop, quantized, truncated
from wherefrom.runtime.memory import Workspace, out_of_memory
from wherefrom.runtime.precision import product, rotated, widened, widened_dtype

# Query gradients that an operator is applied to at a time.
_QUERIES = 16
# After the name of a layer of low rank: its two matrices.
_LEFT, _RIGHT = ".left", ".right"
# After a one-hot layer's name: which columns are held.
_COLUMNS = ".columns"
# After a quantized layer's name: what the integers of each output are multiplied with.
_SCALES = ".scales"
_SQUARED_NORM, _SQUARED_REST = "squared norm", "squared rest"


class GradientBank(Collector):
    """The preconditioned gradient of every query, layer by layer.

    Attributes:
        sums: a tensor [queries, out, width] for each layer or, of low rank, `LAYER.left` [queries, out, rank] and
            `LAYER.right` [queries, rank, width]. Of a one-hot layer only columns that a query touches, [queries, out,
            columns], and which those are, `LAYER.columns` int64 [queries, columns]. The 8-bit integers
            of an output are to be multiplied with its scale, `LAYER.scales` [queries, out].
        accuracy: of the solves that the gradients come from, `Solution.accuracy`; empty without a solver.
    """

    def __init__(
        self,
        layers: Mapping[str, TrackedLayer],
        preconditioner: Operator,
        queries: int,
        form: BankForm,
    ) -> None:
        self._queries = queries
        self._form = form
        self._preconditioner = preconditioner
        self._transforms, self._filters = preconditioner.transforms(layers), preconditioner.aligned_filters(layers)
        self._workspace, self._rebuilt = Workspace(), Workspace()
        self.sums, self.accuracy = dict[str, Tensor](), dict[str, Tensor]()
        for name, layer in layers.items():
            outputs, width = layer.padded_shape
            if form.rank is not None and form.low_rank(layer):
                self.sums[f"{name}{_LEFT}"] = self._zeros(queries, outputs, form.rank)
                self.sums[f"{name}{_RIGHT}"] = self._zeros(queries, form.rank, width)
            elif form.quantized(layer):
                self.sums[name] = self._zeros(queries, outputs, width, dtype=torch.int8)
                self.sums[f"{name}{_SCALES}"] = self._zeros(queries, outputs, dtype=widened_dtype(form.dtype))
            else:
                self.sums[name] = self._zeros(queries, outputs, layer.columns(form.tokens))
            if layer.one_hot:
                self.sums[f"{name}{_COLUMNS}"] = self._zeros(queries, form.tokens, dtype=torch.int64)
        if form.approximate:
            self.sums[_SQUARED_NORM] = torch.zeros(queries, dtype=torch.float64, device=form.device)
            self.sums[_SQUARED_REST] = torch.zeros(queries, dtype=torch.float64, device=form.device)

    def __len__(self) -> int:
        """How many queries there are."""
        return self._queries

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        form = self._form
        return torch.zeros(shape, dtype=dtype or form.dtype, device=form.device, pin_memory=form.offloaded)

    def align(self, most: Callable[[int], int]) -> None:
        for name in list(self.sums):
            if name.endswith(_COLUMNS):
                self.widen(name.removesuffix(_COLUMNS), most(self.sums[name].shape[1]))

    def widen(self, layer: str, columns: int) -> None:
        """Have memory for that many columns of each query's gradient of a one-hot layer."""
        for name in (layer, f"{layer}{_COLUMNS}"):
            before = self.sums[name]
            if before.shape[-1] < columns:
                self.sums[name] = self._zeros(*before.shape[:-1], columns, dtype=before.dtype)
                self.sums[name][..., : before.shape[-1]] = before

    def release(self) -> None:
        self._workspace.release()
        self._rebuilt.release()

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        transform = self._transforms[layer]
        gradients = weight_gradients(captured, transform, self._workspace)
        if layer in self._filters:
            gradients *= captured.selected(self._filters[layer])
        if captured.columns is not None:
            self._collect_columns(layer, self._back(layer, gradients, captured), captured.columns, batch)
        elif f"{layer}{_SCALES}" in self.sums:
            self._collect_quantized(layer, self._back(layer, gradients, captured), batch)
        elif layer in self.sums:
            self.sums[layer][batch] = self._back(layer, gradients, captured)
        elif transform.scaling is None:
            self._collect_low_rank(layer, gradients, transform, batch)
        else:  # matrices of low rank cannot be conditioned
            self._collect_low_rank(layer, self._back(layer, gradients, captured), GradientTransform(), batch)

    def _collect_columns(self, layer: str, gradients: Tensor, columns: Tensor, batch: slice) -> None:
        count = columns.shape[1]
        self.widen(layer, count)
        self.sums[layer][batch, :, :count] = gradients.to(self._form.device)
        self.sums[f"{layer}{_COLUMNS}"][batch, :count] = columns.to(self._form.device)

    def _collect_quantized(self, layer: str, gradients: Tensor, batch: slice) -> None:
        gradients = widened(gradients)
        values, scales = quantized(gradients)
        self.sums[layer][batch], self.sums[f"{layer}{_SCALES}"][batch] = values, scales
        rest = gradients - dequantized(values, scales, torch.empty_like(gradients))
        squared, left_out = (each.square().sum((1, 2), dtype=torch.float64) for each in (gradients, rest))
        self.sums[_SQUARED_NORM][batch] += squared.to(self._form.device)
        self.sums[_SQUARED_REST][batch] += left_out.to(self._form.device)

    def _back(self, layer: str, gradients: Tensor, captured: Captured) -> Tensor:
        """Preconditioned gradients out of those eigenbases that they are to leave, and conditioned again."""
        whole, remaining = self._transforms[layer], self._remaining(layer)
        one, other = (basis if stays is None else None for basis, stays in zip(whole[:2], remaining[:2], strict=True))
        return transformed_back(captured, GradientTransform(one, other, whole.scaling), gradients)

    def _remaining(self, layer: str) -> GradientTransform:
        """What training gradients of a layer are to be multiplied with, because the bank's are in the eigenbasis."""
        gradient_basis, activation_basis, scaling = self._transforms[layer]
        back = self._form.rotated_back.get(layer, (True, True))
        if scaling is not None:  # only the bank's are conditioned, so they come all the way back
            return GradientTransform()
        return GradientTransform(None if back[0] else gradient_basis, None if back[1] else activation_basis)

    def _collect_low_rank(self, layer: str, gradients: Tensor, transform: GradientTransform, batch: slice) -> None:
        """Store the largest singular directions; matrices of low rank are rotated back at little cost."""
        try:
            left, right = truncated(gradients, self.sums[f"{layer}{_LEFT}"].shape[2])
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise NotFiniteError(
                f"Layer {layer!r}: a query gradient has no singular value decomposition ({error}). Leave query_rank "
                "out, or load the model in float64."
            ) from error
        gradient_basis, activation_basis, _ = transform.on(gradients.device)
        squared = gradients.square().sum((1, 2), dtype=torch.float64)
        retained = right.square().sum((1, 2), dtype=torch.float64)  # the left matrix is orthonormal
        self.sums[_SQUARED_NORM][batch] += squared.to(self._form.device)
        self.sums[_SQUARED_REST][batch] += (squared - retained).clamp_min(0).to(self._form.device)
        self.sums[f"{layer}{_LEFT}"][batch] = left if gradient_basis is None else gradient_basis @ left
        self.sums[f"{layer}{_RIGHT}"][batch] = right if activation_basis is None else right @ activation_basis.T

    def apply(self, operator: Operator, layers: Mapping[str, TrackedLayer], device: torch.device) -> None:
        """Multiply whole gradients with an operator, some queries at a time."""
        for name, layer in layers.items():
            gradients, columns, inputs = self.sums[name], self.sums.get(f"{name}{_COLUMNS}"), layer.shape[1]
            for start in range(0, len(gradients), _QUERIES):
                some = slice(start, start + _QUERIES)
                here = gradients[some].to(device)  # [queries, out, width or columns]
                if columns is None:
                    here[..., :inputs] = operator.apply(name, here[..., :inputs])
                else:
                    touched = columns[some].to(device)
                    # Columns that nobody touches stand for any, and are zero.
                    here = operator.apply(name, here, touched.clamp_max(inputs - 1))
                gradients[some] = here.to(gradients.device)

    def whole(self, layers: Mapping[str, TrackedLayer]) -> dict[str, Tensor]:
        """Gradients with all columns of every layer, [queries, out, width]; only of gradients that are stored whole."""
        found = {}
        for name, layer in layers.items():
            columns = self.sums.get(f"{name}{_COLUMNS}")
            every = torch.arange(layer.shape[1], device=self.sums[name].device)
            found[name] = self.sums[name] if columns is None else _spread(self.sums[name], columns, every)
        return found

    def replace(self, layer: str, gradients: Tensor) -> None:
        """Hold other gradients of a layer, [queries, out, in], with all columns; only where they are stored whole."""
        if f"{layer}{_COLUMNS}" not in self.sums:
            self.sums[layer][..., : gradients.shape[2]] = gradients
            return
        self.sums[layer] = gradients.to(self.sums[layer])
        every = torch.arange(gradients.shape[2], device=self.sums[layer].device)
        self.sums[f"{layer}{_COLUMNS}"] = every.repeat(len(gradients), 1)

    def summed(self, total: GradientBank | None = None) -> GradientBank:
        """One gradient, the sum of all queries', added to another such bank; only of whole gradients.

        It is float32 or wider, whatever type the gradients are stored in, and so are its products.
        """
        if total is None:
            total = copy.copy(self)
            total._queries, total.sums, total.accuracy = 1, {}, {}
            total._form = replace(self._form, dtype=widened_dtype(self._form.dtype))
        for name, each in self.accuracy.items():
            worst = [total.accuracy[name]] if name in total.accuracy else []
            total.accuracy[name] = torch.cat([*worst, each]).amax(0, keepdim=True)
        for name, each in self.sums.items():
            if name.endswith(_COLUMNS):
                continue
            columns = self.sums.get(f"{name}{_COLUMNS}")
            before = total.sums.get(name)
            if columns is None:
                added = each.sum(0, keepdim=True, dtype=widened_dtype(each.dtype))
                total.sums[name] = added if before is None else before + added
            else:
                held = total.sums.get(f"{name}{_COLUMNS}")
                summed = _summed_columns(each, columns, before, held)
                total.sums[name], total.sums[f"{name}{_COLUMNS}"] = summed
        return total

    def relative_errors(self) -> Tensor | None:
        """How much of each query's preconditioned gradient a low rank or integers leave out, as a part of its norm.

        Layers that are stored whole count in neither norm.

        Returns:
            [queries]; None when nothing is left out.
        """
        if not self._form.approximate:
            return None
        norm, rest = self.sums[_SQUARED_NORM], self.sums[_SQUARED_REST]
        return torch.where(norm > 0, (rest / norm).sqrt(), 0.0)

    def product(self, layer: str, captured: Captured) -> Tensor:
        """Dot products of every query with each training gradient of a layer: [queries, batch].

        Operands are rounded to the bank's type, products are summed in float32 or wider.

        Raises:
            LossError: the layer's curvature is zero, and a training gradient is not.
        """
        self._preconditioner.check_gradients(layer, captured)
        if layer not in self.sums and self._tokens_are_cheaper(layer, captured):
            return self._product_of_tokens(layer, captured)
        dtype = self._form.dtype
        gradients = weight_gradients(captured, self._remaining(layer), self._workspace, dtype)
        if dtype == torch.bfloat16 and gradients.device.type == "cpu":
            gradients = gradients.float()  # a product that most CPUs do by software; the numbers are the same
        if captured.columns is not None:
            return self._product_of_columns(layer, gradients, captured.columns)
        gradients = gradients.flatten(1)
        pieces = [long_product(piece.flatten(1), gradients) for piece in self._pieces(layer, gradients)]
        return torch.cat(pieces)

    def _product_of_columns(self, layer: str, gradients: Tensor, columns: Tensor) -> Tensor:
        """Dot products with gradients [batch, out, columns], over the columns that both touch: [queries, batch].

        Both are spread out over those columns, some columns and some queries at a time.
        """
        held, touched = self.sums[layer], self.sums[f"{layer}{_COLUMNS}"].to(columns.device)
        common = columns.unique()
        common = common[torch.isin(common, touched)]
        total = gradients.new_zeros(len(held), len(gradients), dtype=widened_dtype(gradients.dtype))
        each = held.shape[1] * gradients.element_size()
        if not len(common):
            return total
        for part in common.split(self._per_piece(len(gradients) * each)):
            trained, start = _spread(gradients, columns, part).flatten(1), 0
            for queries in held.split(self._per_piece(len(part) * each)):
                stop = start + len(queries)
                here = queries.to(gradients.device, gradients.dtype, non_blocking=True)
                total[start:stop] += product(_spread(here, touched[start:stop], part).flatten(1), trained.T)
                start = stop
        return total

    def _pieces(self, layer: str, like: Tensor) -> Iterator[Tensor]:
        """A layer's gradients [queries, out, width] of the type and on the device of `like`, some queries at a time."""
        if f"{layer}{_SCALES}" in self.sums:
            yield from self._dequantized(layer, like)
            return
        if layer in self.sums:
            whole = self.sums[layer]
            same = whole.dtype == like.dtype and whole.device == like.device
            count = len(whole) if same else self._per_piece(whole[0].numel() * like.element_size())
            for piece in whole.split(count):
                yield piece.to(like.device, like.dtype, non_blocking=True)
            return
        left, right = self.sums[f"{layer}{_LEFT}"], self.sums[f"{layer}{_RIGHT}"]
        outputs, width = left.shape[1], right.shape[2]
        count = self._per_piece(outputs * width * like.element_size())
        for some_left, some_right in zip(left.split(count), right.split(count), strict=True):
            out = self._rebuilt.empty((len(some_left), outputs, width), like)
            operands = (each.to(like.device, like.dtype, non_blocking=True) for each in (some_left, some_right))
            yield torch.bmm(*operands, out=out)

    def _dequantized(self, layer: str, like: Tensor) -> Iterator[Tensor]:
        """A quantized layer's gradients, rounded to the bank's type, some queries at a time."""
        values, scales = self.sums[layer], self.sums[f"{layer}{_SCALES}"]
        rounded = like.new_empty(0, dtype=self._form.dtype)
        count = self._per_piece(values[0].numel() * like.element_size())
        for some, their_scales in zip(values.split(count), scales.split(count), strict=True):
            here, factors = (each.to(like.device, non_blocking=True) for each in (some, their_scales))
            yield dequantized(here, factors, self._rebuilt.empty(here.shape, rounded)).to(like.dtype)

    @staticmethod
    def _per_piece(bytes_each: int) -> int:
        return max(1, PIECE_BYTES // bytes_each)

    def _tokens_are_cheaper(self, layer: str, captured: Captured) -> bool:
        """Whether to multiply low-rank matrices with each token, rather than rebuild the gradients they stand for."""
        left, right = self.sums[f"{layer}{_LEFT}"], self.sums[f"{layer}{_RIGHT}"]
        batch, tokens = captured.activations.shape[:2]
        by_tokens, rebuilt = low_rank_product_flop((left.shape[1], right.shape[2]), left.shape[2], tokens, batch)
        return by_tokens < rebuilt

    def _product_of_tokens(self, layer: str, captured: Captured) -> Tensor:
        """sum_t (s_t^T left) (right a_t) for every query and training example: [queries, batch]."""
        left, right = self.sums[f"{layer}{_LEFT}"], self.sums[f"{layer}{_RIGHT}"]
        batch, tokens = captured.activations.shape[:2]
        count = self._per_piece(batch * tokens * left.shape[2] * captured.gradients.element_size())
        found = []
        for some_left, some_right in zip(left.split(count), right.split(count), strict=True):
            here = (each.to(captured.gradients.device, captured.gradients.dtype) for each in (some_left, some_right))
            one = torch.einsum("bto,qor->qbtr", captured.gradients, next(here))
            two = torch.einsum("bti,qri->qbtr", captured.activations, next(here))
            found.append((one * two).sum((2, 3), dtype=widened_dtype(one.dtype)))
        return torch.cat(found)

    def in_basis(self, layer: str, captured: Captured) -> Captured:
        """A training batch's tensors in the basis that the bank has a layer's gradients in, for `token_products`.

        Raises:
            LossError: the layer's curvature is zero, and a training gradient is not.
        """
        self._preconditioner.check_gradients(layer, captured)
        remaining = self._remaining(layer) if layer in self.sums else GradientTransform()
        gradient_basis, activation_basis, _ = remaining.on(captured.gradients.device)
        activations, gradients = captured.activations, captured.gradients
        return captured._replace(
            activations=activations if activation_basis is None else rotated(activations, activation_basis),
            gradients=gradients if gradient_basis is None else rotated(gradients, gradient_basis),
        )

    def token_products(self, layer: str, query: int, captured: Captured) -> Tensor:
        """What each position adds to the dot product of one query with training gradients: s_t^T P a_t.

        Args:
            captured: of some training examples, `in_basis`.

        Returns:
            [batch, tokens]; over tokens, the sum is `product`.
        """
        names = [layer] if layer in self.sums else [f"{layer}{_LEFT}", f"{layer}{_RIGHT}"]
        wide = widened_dtype(captured.gradients.dtype)
        projected = captured.gradients.to(wide)
        for name in names:
            matrix = self.sums[name][query].to(projected.device, wide)
            if f"{name}{_SCALES}" in self.sums:
                matrix = matrix * self.sums[f"{name}{_SCALES}"][query].to(projected.device, wide).unsqueeze(1)
            if captured.columns is not None:
                matrix = self._columns_of(layer, query, matrix, captured.columns)  # [batch, out, columns]
            projected = projected @ matrix
        return (projected * captured.activations).sum(-1)  # projected: [batch, tokens, columns]

    def _columns_of(self, layer: str, query: int, matrix: Tensor, columns: Tensor) -> Tensor:
        """The given columns [batch, columns] of one query's gradient [out, own columns]: [batch, out, columns]."""
        chosen, indices = columns.unique(return_inverse=True)
        own = self.sums[f"{layer}{_COLUMNS}"][query].to(columns.device)
        return _spread(matrix.unsqueeze(0), own.unsqueeze(0), chosen)[0][:, indices].transpose(0, 1)


def _summed_columns(
    gradients: Tensor, columns: Tensor, before: Tensor | None, held: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of gradients [n, out, columns], and of one before, with each column that any of them holds once."""
    flat, touched = gradients.movedim(0, 1).flatten(1), columns.flatten()  # [out, n * columns]
    if before is not None and held is not None:
        flat, touched = torch.cat([before[0], flat.to(before.dtype)], 1), torch.cat([held[0], touched])
    chosen, where = touched.unique(return_inverse=True)
    total = flat.new_zeros(len(flat), len(chosen), dtype=widened_dtype(flat.dtype))
    total.index_add_(1, where, flat.to(total.dtype))
    return total.unsqueeze(0), chosen.unsqueeze(0)


def _spread(gradients: Tensor, columns: Tensor, chosen: Tensor) -> Tensor:
    """Gradients [n, out, columns] of which only some columns are held, as the chosen columns: [n, out, chosen].

    Args:
        columns: int64 [n, columns]: which they are; several that stand for one are added up.
        chosen: int64, ascending.
    """
    indices = torch.searchsorted(chosen, columns).clamp_max_(len(chosen) - 1)
    held = (chosen[indices] == columns).unsqueeze(1)  # [n, 1, columns]
    spread = gradients.new_zeros(*gradients.shape[:2], len(chosen))
    return spread.scatter_add_(2, indices.unsqueeze(1).expand_as(gradients), gradients * held)


# Rows and columns of a tile; tiles that fill a GPU, which has 108 (A100) to 132 (H100, H200) units; and a sum that is
# worth a tile of its own.
_TILE, _TILES, _SHORTEST = 128, 128, 4096


# Matrix units read 16 bytes at a time.
_ALIGNMENT = 8


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] times right^T, of right [m, k], summed in float32 or wider: [n, m]."""
    parts = parts_of_sum(len(left), len(right), left.shape[1]) if left.is_cuda else 1
    return split_product(left, right, parts)


def split_product(left: Tensor, right: Tensor, parts: int) -> Tensor:
    """The same as so many products over equal parts of the sum, which are then added up."""
    if parts == 1:
        return product(left, right.T)
    some = product(left.unflatten(1, (parts, -1)).transpose(0, 1), right.unflatten(1, (parts, -1)).permute(1, 2, 0))
    return some.sum(0)


def parts_of_sum(rows: int, columns: int, length: int) -> int:
    """Into how many equal, aligned parts a sum is cut so that the device is filled; 1 where it is anyway."""
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    most = min(_TILES // tiles, length // _SHORTEST)
    return next((parts for parts in range(most, 1, -1) if length % (parts * _ALIGNMENT) == 0), 1)
