"""What is not finite, and where it came from.

A NaN or an infinity in any batch, in a layer's activations, its output gradients or their products, stays in a sweep's
sums. So these are looked at before anything of them is stored, which costs next to nothing; looking at all tensors of
every batch would read them once more, which a GPU would feel. Only when something is wrong are the batches passed over
again, with a `Search` that looks at everything. This module knows captured tensors and named sums, nothing of sweeps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.runtime.errors import LossError
from wherefrom.runtime.precision import type_name

# How many examples a message lists.
_LISTED = 8
_NARROW = "load a float16 model in float32 or bfloat16, a float32 model in float64 (model.double()), or scale the loss"


class NotFiniteError(LossError):
    """Something in a sweep is not finite; it is not known yet where that comes from."""


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are: the extremes are NaN where one is. Nothing is allocated."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_sums(sweep: str, sums: Mapping[str, Tensor]) -> None:
    """Raise NotFiniteError for the first sum with a number that is not finite."""
    for name, total in sums.items():
        if not is_finite(total):
            raise NotFiniteError(
                f"{sweep}: the sums {name!r} are not finite: some activation or gradient is not, or their products "
                f"overflow {type_name(total.dtype)}. Nothing of this was stored; {_NARROW}."
            )


def named_examples(positions: Sequence[int]) -> str:
    """Dataset positions for a message."""
    first, last = positions[0], positions[-1]
    if len(positions) == 1:
        return f"example {first}"
    if list(positions) == list(range(first, last + 1)):
        return f"examples {first} to {last}"
    more = f" and {len(positions) - _LISTED} more" if len(positions) > _LISTED else ""
    return f"examples {', '.join(map(str, positions[:_LISTED]))}{more}"


class Search:
    """Looks at every layer of every batch until it knows where something that is not finite comes from.

    Args:
        sweep: its name.
        layers: names of the tracked layers.
        sums: a collector's.
    """

    def __init__(self, sweep: str, layers: Collection[str], sums: Mapping[str, Tensor]) -> None:
        self._sweep, self._layers, self._sums = sweep, layers, sums
        self.forget()

    def forget(self) -> None:
        """Begin a batch again, of which there may have been too much for the memory."""
        self._activations: list[tuple[str, Tensor]] = []
        self._gradients: list[tuple[str, Tensor]] = []
        self._overflow: str | None = None

    def wanted(self, layer: str, captured: Captured) -> bool:
        """Look at a layer's tensors, in the order of the backward pass; whether they are worth collecting."""
        for found, tensor in ((self._activations, captured.activations), (self._gradients, captured.gradients)):
            if not is_finite(tensor):
                found.append((layer, tensor))
        return not (self._activations or self._gradients or self._overflow)

    def collected(self, layer: str, captured: Captured) -> None:
        """Look at the sums that a layer has part in."""
        sums = (total for name, total in self._sums.items() if self._owner(name) in {layer, None})
        if not all(map(is_finite, sums)):
            reach = ", ".join(
                f"{what} reach {float(tensor.abs().max()):.3g}"
                for what, tensor in (("activations", captured.activations), ("output gradients", captured.gradients))
            )
            self._overflow = f"layer {layer!r} are finite ({reach}), but sums of their products overflow"

    def finish(self, positions: Sequence[int], loss: Tensor) -> None:
        """Raise LossError if something of a batch was not finite.

        Args:
            positions: of its examples in the dataset.
        """
        examples = named_examples(positions)
        where = self._where(positions)
        if not bool(loss.isfinite()):
            raise LossError(
                f"{self._sweep}: the loss of {examples} is {loss.item()}. {where or 'All layers are finite.'} Look at "
                "these examples and at the model's output for them; nothing of this batch was stored."
            )
        if where:
            raise LossError(
                f"{self._sweep}: the loss of {examples} is finite, and its gradients are not. {where} Look at these "
                f"examples, and {_NARROW}; nothing of this batch was stored."
            )
        if self._overflow:
            raise LossError(
                f"{self._sweep}: the activations and output gradients of {self._overflow} with {examples}. "
                f"Nothing of this batch was stored; {_NARROW}."
            )

    def _where(self, positions: Sequence[int]) -> str:
        """The layer that comes first: in the forward pass if an activation is not finite, else in the backward pass."""
        if self._activations:
            (layer, tensor), what = self._activations[-1], "Activations"
        elif self._gradients:
            (layer, tensor), what = self._gradients[0], "Output gradients"
        else:
            return ""
        examples = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        wrong = tensor[~tensor.isfinite()][0].item()
        return f"{what} of layer {layer!r} are {wrong} for {named_examples([positions[each] for each in examples])}."

    def _owner(self, name: str) -> str | None:
        """The layer that a sum belongs to; None when all layers have part in it."""
        return next((each for each in (name, name.rpartition(".")[0]) if each in self._layers), None)
