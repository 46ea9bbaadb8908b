"""Hooks: one forward and backward pass in, activations and output gradients of every tracked layer out.

Weights are frozen while capturing, so autograd forms no weight gradient, and the graph starts at the output of the
first tracked layer. The model is handed back as it was found, also after an exception. This module knows layers; it
knows nothing of datasets, tasks or curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wherefrom.errors import LayerError, LossError
from wherefrom.layers import TrackedLayer
from wherefrom.precision import widened


class Captured(NamedTuple):
    """What one batch says about one layer; rows of padding are zero in both tensors.

    Attributes:
        activations: [batch, tokens, width]: the layer's input and, when it has a bias, a column of ones, then zeros
            for alignment. Layers that read one tensor one after another share this one.
        gradients: of the summed loss with respect to the layer's output, [batch, tokens, out].
        tokens: how many of the batch's tokens are not padding.
        calls: how many uses of the layer, of equally many tokens each, are joined along the token axis; 0 when they
            differ.
        columns: int64 [width of activations]: which columns of the layer's gradient matrix the activations are, when
            they are only those that the batch touches; None is all of them.
    """

    activations: Tensor
    gradients: Tensor
    tokens: int
    calls: int = 1
    columns: Tensor | None = None

    def selected(self, matrix: Tensor) -> Tensor:
        """The batch's columns of a matrix [..., out, width] that has one number for each weight of the layer."""
        return matrix if self.columns is None else matrix[..., self.columns]

    def as_one_example(self) -> Captured:
        """The batch's tokens in one row, whose gradient is the sum of the examples'; only where `columns` is None."""
        activations, gradients = (each.flatten(0, 1).unsqueeze(0) for each in (self.activations, self.gradients))
        return self._replace(activations=activations, gradients=gradients)


class Receiver(Protocol):
    """What is done with a layer's tensors as soon as a backward pass has them."""

    def __call__(self, layer: str, captured: Captured) -> None: ...


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch are real.

    Attributes:
        mask: boolean [batch, tokens, 1], on the model's device.
        tokens: how many are true; counted on the host, so that no layer waits for the device.
    """

    mask: Tensor
    tokens: int


@dataclass
class _Call:
    """One use of a layer in a forward pass."""

    inputs: Tensor
    version: int
    gradient: Tensor | None = None


@dataclass
class _Pass:
    """What one forward and backward pass has seen so far.

    Attributes:
        latest: the layer and the input that activations were last made for, and the activations.
    """

    examples: int
    padding: Sequence[Padding]
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    starts: list[Tensor] = field(default_factory=list)
    backward: bool = False
    latest: tuple[TrackedLayer, Tensor, Tensor] | None = None

    def padding_of(self, tokens: int) -> Padding | None:
        """The padding of layers that see `tokens` an example; None when there is none of that many."""
        return next((each for each in self.padding if each.mask.shape[1] == tokens), None)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; every module and parameter is put back as it was."""
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


class Capture(AbstractContextManager["Capture"]):
    """Hands `(layer, activations, gradients)` to a receiver during each backward pass.

    A layer that is called several times in a pass is received once, its calls joined along the token axis: the
    gradient of its weight is the sum over calls, as it is over tokens.

    Args:
        operand: what becomes of every captured tensor; a wider type, unless one asks for something else.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, TrackedLayer],
        receive: Receiver,
        operand: Callable[[Tensor], Tensor] = widened,
    ) -> None:
        self._model = model
        self._layers = layers
        self._receive = receive
        self._operand = operand
        self._pass: _Pass | None = None

    def __enter__(self) -> Capture:
        with ExitStack() as stack:
            stack.enter_context(frozen(self._model))
            for name, layer in self._layers.items():
                hook = partial(self._forward_hook, name)
                handle = layer.module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pass = None
        self._undo.close()

    def run(self, loss: Callable[[], Tensor], examples: int, padding: Sequence[Padding] = ()) -> Tensor:
        """One forward and backward pass.

        Args:
            loss: computes the summed loss of the batch.
            examples: how many rows the batch has.
            padding: which tokens are real, by how many a layer sees; nothing when all are.

        Returns:
            The loss, detached, still on its device.

        Raises:
            LossError: the loss is not a scalar, or no tracked layer has part in it.
            LayerError: a layer never ran, its tensors are not batch-first, or its input was overwritten in place.
        """
        self._pass = current = _Pass(examples, padding)
        try:
            with torch.enable_grad():
                value = loss()
            self._check(value, current)
            current.backward = True
            # Gradients of the starts are asked for and dropped: what counts arrives at the hooks on the way there.
            torch.autograd.grad(value, current.starts, allow_unused=True)
            for name in list(current.calls):  # layers of which only some calls have part in the loss
                self._deliver(name, current)
        finally:
            self._pass = None
        return value.detach()

    def _check(self, value: Tensor, current: _Pass) -> None:
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"The task's loss must be a scalar tensor, summed over the batch; it returned {found}. "
                "Use reduction='sum' or call .sum()."
            )
        missing = [name for name in self._layers if name not in current.calls]
        if missing:
            raise LayerError(
                f"{len(missing)} tracked layer(s) never ran in a forward pass: {', '.join(missing[:5])}. "
                "Leave them out with `layers=[...]`."
            )
        if not value.requires_grad:
            raise LossError(
                "The task's loss does not depend on any tracked layer: it was detached, or computed under "
                "torch.no_grad or inference_mode. Return the loss with its graph."
            )

    def _forward_hook(
        self,
        name: str,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        keywords: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor | None:
        current = self._pass
        if current is None or current.backward or not torch.is_grad_enabled():
            return None
        inputs = arguments[0] if arguments else next(iter(keywords.values()))
        call = _Call(inputs.detach(), inputs._version)
        current.calls.setdefault(name, []).append(call)
        started = None
        if not output.requires_grad:
            start = output.detach().requires_grad_()
            current.starts.append(start)
            output = started = start.clone()  # a leaf itself would forbid later in-place operations
        output.register_hook(partial(self._gradient_hook, name, call))
        return started

    def _gradient_hook(self, name: str, call: _Call, gradient: Tensor) -> None:
        current = self._pass
        assert current is not None
        call.gradient = gradient
        if all(each.gradient is not None for each in current.calls[name]):
            self._deliver(name, current)

    def _deliver(self, name: str, current: _Pass) -> None:
        parts = [
            self._captured(name, call.inputs, call.gradient, current)
            for call in current.calls.pop(name)
            if call.gradient is not None and self._untouched(name, call)
        ]
        if len(parts) == 1:
            self._receive(name, parts[0])
        elif parts:
            activations, gradients, tokens, *_ = zip(*parts, strict=True)
            calls = len(parts) if len({each.shape[1] for each in activations}) == 1 else 0
            joined = Captured(torch.cat(activations, 1), torch.cat(gradients, 1), sum(tokens), calls)
            self._receive(name, joined)

    def _captured(self, name: str, inputs: Tensor, gradient: Tensor, current: _Pass) -> Captured:
        layer = self._layers[name]
        activations, gradients = self._activations(layer, inputs, current), layer.gradients(gradient)
        batch, tokens = activations.shape[:2]
        if batch != current.examples:
            raise LayerError(
                f"Layer {name!r} saw {batch} rows for {current.examples} examples: its input must keep the "
                "batch as first dimension. Leave the layer out with `layers=[...]`."
            )
        padding = current.padding_of(tokens)
        if padding is None:
            # A layer that sees one vector for each example has no padding left.
            if current.padding and tokens != 1:
                counts = " and ".join(str(each.mask.shape[1]) for each in current.padding)
                raise LayerError(
                    f"Layer {name!r} has {tokens} tokens per example and the task's mask {counts}. "
                    "Leave the layer out with `layers=[...]`, or return None from Task.mask."
                )
            return Captured(activations, self._operand(gradients), batch * tokens)
        return Captured(activations, self._operand(gradients * padding.mask), padding.tokens)

    def _activations(self, layer: TrackedLayer, inputs: Tensor, current: _Pass) -> Tensor:
        """A layer's activations, masked; those of the layer before if both have read the same tensor."""
        if current.latest is not None:
            before, source, activations = current.latest
            if layer.reads_as(before) and _same_memory(source, inputs):
                return activations
        activations = layer.activations(inputs)
        padding = current.padding_of(activations.shape[1])
        if padding is not None and len(activations) == len(padding.mask):
            activations = activations * padding.mask
        activations = self._operand(activations)
        current.latest = (layer, inputs, activations)
        return activations

    @staticmethod
    def _untouched(name: str, call: _Call) -> bool:
        if call.inputs._version != call.version:
            raise LayerError(
                f"The input of layer {name!r} was overwritten in place after the layer had read it. "
                "Make the operation that follows out of place (x = x + y, not x += y)."
            )
        return True


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same place."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
