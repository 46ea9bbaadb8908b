"""Hooks: one forward and backward pass in, activations and output gradients of every tracked layer out.

Weights are frozen while capturing, so autograd forms no weight gradient, and the graph starts at the output of the
first tracked layer. The model is handed back as it was found, also after an exception. Where a model computes parts of
its forward pass again while going back (gradient checkpointing, non-reentrant), the hooks do the same again and nothing
is captured twice. This module knows layers; it knows nothing of datasets, tasks or curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wherefrom.engine.layer_types import NO_COLUMN, distinct_one_hot
from wherefrom.engine.layers import TrackedLayer, Use
from wherefrom.runtime.errors import LayerError, LossError
from wherefrom.runtime.precision import widened, widened_dtype
from wherefrom.tasks.task import evaluating


class Captured(NamedTuple):
    """What one batch says about one layer; vectors of padding are zero in both tensors.

    Attributes:
        activations: [batch, tokens, columns]: the layer's input and, when it has a bias, a column of ones, then zeros
            for alignment. Layers that read one tensor one after another share this one.
        gradients: of the summed loss with respect to the layer's output, [batch, tokens, out].
        tokens: how many of the batch's tokens are not padding.
        calls: how many uses of the layer, of equally many tokens each, are concatenated along the token axis; 0 when
            they differ.
        columns: int64 [batch, columns]: which columns of the layer's gradient matrix the activations of each example
            are, when they are only those that it touches; columns that are zero may stand for any. None is all of them.
    """

    activations: Tensor
    gradients: Tensor
    tokens: int
    calls: int = 1
    columns: Tensor | None = None

    def selected(self, matrix: Tensor) -> Tensor:
        """The numbers of a matrix [out, width], one for each weight of the layer, for the columns that are held.

        Returns:
            What can be multiplied with gradients [batch, out, columns], on their device.
        """
        matrix = matrix.to(self.gradients.device, non_blocking=True)
        return matrix if self.columns is None else matrix[:, self.columns].transpose(0, 1)

    def examples(self, chosen: Tensor) -> Captured:
        """Some examples of the batch; `tokens` stays the whole batch's."""
        columns = None if self.columns is None else self.columns[chosen]
        return self._replace(activations=self.activations[chosen], gradients=self.gradients[chosen], columns=columns)

    @property
    def bytes_each(self) -> int:
        """What an example's weight gradient takes, or its rotated activations or gradients if that is more.

        Products of operands in half precision are float32.
        """
        (_, tokens, width), outputs = self.activations.shape, self.gradients.shape[2]
        return max(outputs * width, tokens * width, tokens * outputs) * widened_dtype(self.gradients.dtype).itemsize

    def as_one_example(self) -> Captured:
        """All tokens as one example's, whose gradient is the sum of the batch's; only where `columns` is None."""
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
    """One run of a module that uses a layer's weight, in the model's call of that number, from 0."""

    use: Use
    inputs: Tensor
    version: int
    model_call: int
    gradient: Tensor | None = None


@dataclass
class _Pass:
    """What one forward and backward pass has seen so far.

    Attributes:
        model_calls: how often the loss has called the model, but for calls without gradients.
        latest: the layer, its use and the input that activations were last made for, and the activations.
        without_graph: layers that ran while gradients were switched off.
    """

    examples: int
    padding: Sequence[Padding]
    model_calls: int = 0
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    backward: bool = False
    latest: tuple[TrackedLayer, Use, Tensor, Tensor] | None = None
    without_graph: set[str] = field(default_factory=set)

    def padding_of(self, tokens: int, call: _Call) -> Padding | None:
        """The padding of a call that sees `tokens` an example; None when there is none of that many."""
        found = [each for each in self.padding if each.mask.shape[1] == tokens]
        if len(found) > 1 and len(self.padding) != self.model_calls:
            raise LayerError(
                f"{len(found)} masks of {tokens} tokens, and {self.model_calls} call(s) of the model, by which layers "
                "cannot be told apart. Pad one of the sequences by one token more, or return a mask for each call."
            )
        return self.padding[call.model_call] if len(found) > 1 else found[0] if found else None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; every module and parameter is put back as it was."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with evaluating(model):
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            for name, parameter in model.named_parameters():  # by name: offloading makes new parameters in every pass
                parameter.requires_grad_(required[name])


class Capture(AbstractContextManager["Capture"]):
    """Hands `(layer, activations, gradients)` to a receiver during each backward pass.

    A layer that is called several times in a pass, or through several modules, is received once, its calls concatenated
    along the token axis: the gradient of its weight is the sum over calls, as it is over tokens.

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
            stack.callback(self._model.register_forward_pre_hook(self._model_hook).remove)
            for name, layer in self._layers.items():
                for use in layer.uses:
                    hook = partial(self._forward_hook, name, use)
                    handle = use.module.register_forward_hook(hook, with_kwargs=True)
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
            examples: how many the batch has.
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
            leaves = _leaves(value)
            with _gradients_dropped(leaves):
                # Not by `autograd.grad`, with which PyTorch's counters of operations refuse modules that read a leaf.
                torch.autograd.backward(value, inputs=leaves)
            for name in list(current.calls):  # layers of which only some calls have part in the loss
                captured = self._concatenated(name, current)
                if captured is not None:
                    self._receive(name, captured)
        finally:
            self._pass = None
        return value.detach()

    def held(self) -> list[Tensor]:
        """The inputs of layers that wait for their gradients; autograd has no need of them where weights are frozen."""
        return [call.inputs for calls in self._pass.calls.values() for call in calls] if self._pass else []

    def _check(self, value: Tensor, current: _Pass) -> None:
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"The task's loss must be a scalar tensor, summed over the batch; it returned {found}. "
                "Use reduction='sum' or call .sum()."
            )
        # A model without weights is run on that device to see what it would take.
        lost = value.is_meta and not any(call.inputs.is_meta for calls in current.calls.values() for call in calls)
        if not value.is_floating_point() or lost:
            kind = "on the meta device, without a value" if lost else f"of type {value.dtype}"
            raise LossError(
                f"The task's loss is {kind}: expected a real number, such as float32. Return the loss itself."
            )
        missing = [name for name in self._layers if name not in current.calls]
        if missing and current.without_graph.issuperset(missing):
            raise LayerError(
                f"{len(missing)} tracked layer(s) ran with gradients switched off: {', '.join(missing[:5])}. With "
                "gradient checkpointing, pass use_reentrant=False; under torch.no_grad, leave them out with "
                "`layers=[...]`."
            )
        if missing:
            raise LayerError(
                f"{len(missing)} tracked layer(s) never ran in a forward pass: {', '.join(missing[:5])}. "
                "Leave them out with `layers=[...]`."
            )
        if not value.requires_grad or value.grad_fn is None:
            raise LossError(
                "The task's loss does not depend on any tracked layer: it was detached, or computed under "
                "torch.no_grad or inference_mode. Return the loss with its graph."
            )

    def _model_hook(self, model: nn.Module, arguments: tuple[object, ...]) -> None:
        if self._pass is not None and torch.is_grad_enabled():
            self._pass.model_calls += 1

    def _forward_hook(
        self,
        name: str,
        use: Use,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        keywords: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor | None:
        current = self._pass
        if current is None:
            return None
        if not torch.is_grad_enabled():
            current.without_graph.add(name)
            return None
        inputs = arguments[0] if arguments else next(iter(keywords.values()))
        replaced = len(inputs) == 1 != current.examples  # such as positions, which are the same for all examples
        if replaced:
            inputs, output = (each.expand(current.examples, *each.shape[1:]) for each in (inputs, output))
        if not output.requires_grad:
            # The graph begins here; a leaf itself would forbid later in-place operations.
            output, replaced = output.detach().requires_grad_().clone(), True
        # What gradient checkpointing computes again must come out alike, but what counts is the first time.
        if not current.backward:
            call = _Call(use, inputs.detach(), inputs._version, current.model_calls - 1)
            current.calls.setdefault(name, []).append(call)
            output.register_hook(partial(self._gradient_hook, name, call))
        return output if replaced else None

    def _gradient_hook(self, name: str, call: _Call, gradient: Tensor) -> None:
        current = self._pass
        assert current is not None
        call.gradient = gradient
        if all(each.gradient is not None for each in current.calls[name]):
            captured = self._concatenated(name, current)
            if captured is not None:
                self._receive(name, captured)

    def _concatenated(self, name: str, current: _Pass) -> Captured | None:
        """What a layer's calls of a pass make together; None where no call has part in the loss."""
        layer = self._layers[name]
        parts = [
            self._captured(layer, call, call.gradient, current)
            for call in current.calls.pop(name)
            if call.gradient is not None
        ]
        if not parts:
            return None
        found = parts[0]
        if len(parts) > 1:
            activations, gradients, tokens, calls, _ = zip(*parts, strict=True)
            lengths = {part.gradients.shape[1] / part.calls for part in parts}
            together = sum(calls) if len(lengths) == 1 else 0
            found = Captured(torch.cat(activations, 1), torch.cat(gradients, 1), sum(tokens), together)
        if layer.one_hot:
            vectors, columns = distinct_one_hot(found.activations, found.gradients.dtype)
            found = found._replace(activations=vectors, columns=columns)
        return found

    def _captured(self, layer: TrackedLayer, call: _Call, gradient: Tensor, current: _Pass) -> Captured:
        """One call's tensors; of a one-hot layer, ids [batch, tokens] stand for activations."""
        self._check_call(layer.name, call, gradient, current)
        copies = call.use.kind.copies(call.use.module)
        shared = self._shared_activations(layer, call, current) if layer.shares_activations(call.use) else None
        # Operands that are no wider are made before tensors are padded and masked, so that fewer bytes are moved.
        kind = call.use.kind
        early = not (kind.elementwise or self._widens(gradient) or (self._widens(call.inputs) and not kind.one_hot))
        inputs = self._operand(call.inputs) if early and shared is None and not kind.one_hot else call.inputs
        gradient = self._operand(gradient) if early else gradient
        read = layer.read(call.use, inputs) if shared is None else shared
        activations, gradients = layer.tensors(call.use, read, gradient)
        batch, tokens = gradients.shape[:2]
        padding, real = self._padding(layer.name, tokens // copies, call, current), batch * tokens
        if padding is not None:
            mask = padding.mask.to(gradients.device).repeat(1, copies, 1)
            real, gradients = copies * padding.tokens, gradients.where(mask, 0)  # padding may hold NaN
            activations = activations if shared is not None else _masked(activations, mask)
        if not early:
            gradients = self._operand(gradients)
            activations = activations if shared is not None or layer.one_hot else self._operand(activations)
        return Captured(activations, gradients, real, copies)

    def _widens(self, tensor: Tensor) -> bool:
        """Whether a tensor takes more memory as an operand."""
        return self._operand(tensor.new_empty(0)).element_size() > tensor.element_size()

    @staticmethod
    def _check_call(name: str, call: _Call, gradient: Tensor, current: _Pass) -> None:
        """Refuse a call whose tensors are not each example's own, as the layer has seen them."""
        if call.inputs._version != call.version:
            raise LayerError(
                f"The input of layer {name!r} was overwritten in place after the layer had read it. "
                "Make the operation that follows out of place (x = x + y, not x += y)."
            )
        if len(call.inputs) != current.examples:
            raise LayerError(
                f"Layer {name!r} saw a batch of {len(call.inputs)} for {current.examples} examples: its input must "
                "keep the batch as first dimension. Leave the layer out with `layers=[...]`."
            )
        if current.examples > 1 and call.inputs.stride(0) == 0 and not bool(gradient[1:].any()):
            raise LayerError(
                f"Layer {name!r} reads one input for all {current.examples} examples, and the model takes the "
                "first of them from its output (output[0]) instead of broadcasting it, so the examples' parts of its "
                "gradient cannot be told apart. Leave the layer out with `layers=[...]`."
            )

    @staticmethod
    def _padding(name: str, positions: int, call: _Call, current: _Pass) -> Padding | None:
        """Which of a layer's positions are real in a call; None when all are."""
        found = current.padding_of(positions, call)
        # A layer that sees one vector for each example has no padding left.
        if found is None and current.padding and positions != 1:
            counts = " and ".join(str(each.mask.shape[1]) for each in current.padding)
            raise LayerError(
                f"Layer {name!r} has {positions} tokens per example and the task's mask {counts}. "
                "Leave the layer out with `layers=[...]`, or return None from Task.mask."
            )
        return found

    def _shared_activations(self, layer: TrackedLayer, call: _Call, current: _Pass) -> Tensor:
        """A layer's activations, masked; those of the layer before if both have read the same tensor."""
        if current.latest is not None:
            before, use, source, activations = current.latest
            if layer.reads_as(call.use, before, use) and _same_memory(source, call.inputs):
                return activations
        early = not self._widens(call.inputs)
        activations = layer.read(call.use, self._operand(call.inputs) if early else call.inputs)
        padding = current.padding_of(activations.shape[1], call)
        if padding is not None and len(activations) == len(padding.mask):
            activations = activations.where(padding.mask.to(activations.device), 0)
        activations = activations if early else self._operand(activations)
        current.latest = (layer, call.use, call.inputs, activations)
        return activations


@contextmanager
def _gradients_dropped(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Put gradients of these back in the end: what counts arrives at hooks on the way."""
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def _leaves(value: Tensor) -> list[Tensor]:
    """Every tensor that the graph of `value` begins at: an output of a tracked layer, or what else requires gradients,
    such as embeddings that are made to for checkpointing."""
    found, seen, pending = [], set(), [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [each for each, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.append(node.variable)
    return found


def _masked(activations: Tensor, mask: Tensor) -> Tensor:
    """Vectors [batch, tokens, width] or ids [batch, tokens] without those of padding."""
    return activations.where(mask, 0) if activations.dim() == 3 else activations.where(mask.squeeze(2), NO_COLUMN)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same memory."""
    alike = one.shape == other.shape and one.stride() == other.stride() and one.device == other.device
    return alike and one.data_ptr() == other.data_ptr()
