"""Hooks: one forward and backward pass in, activations and output gradients of every tracked layer out.

Weights are frozen while capturing, so autograd forms no weight gradient, and the graph starts at the output of the
first tracked layer. The model is handed back as it was found, also after an exception. Where a model computes parts of
its forward pass again while going back (gradient checkpointing, non-reentrant), the hooks do the same again and nothing
is captured twice. This module knows layers; it knows nothing of datasets, tasks or curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wherefrom.engine.modules.functions import watched_functions
from wherefrom.engine.modules.layer_types import NO_COLUMN, distinct_one_hot
from wherefrom.engine.modules.layers import TrackedLayer, Use, owners
from wherefrom.engine.modules.linear_map import LinearMap
from wherefrom.engine.modules.written_out import through_maps
from wherefrom.engine.passes import Call, Padding, Pass, calls_answered, frozen, leaves_of, not_by_example
from wherefrom.engine.routing import Packing
from wherefrom.runtime.errors import LayerError, LossError, first_line
from wherefrom.runtime.memory import out_of_memory
from wherefrom.runtime.precision import widened, widened_dtype


class Positions(NamedTuple):
    """Which tokens the vectors of a layer are that sees only some.

    Attributes:
        tokens: int64 [batch, vectors]; of vectors that are zero, any.
        length: how many tokens an example has, with padding; 0 when that differs between calls.
    """

    tokens: Tensor
    length: int


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
        positions: of the vectors that are here, when these are only some of an example's tokens.
    """

    activations: Tensor
    gradients: Tensor
    tokens: int
    calls: int = 1
    columns: Tensor | None = None
    positions: Positions | None = None

    def selected(self, matrix: Tensor) -> Tensor:
        """The numbers of a matrix [out, width], one for each weight of the layer, for the columns that are held.

        Returns:
            What can be multiplied with gradients [batch, out, columns], on their device.
        """
        matrix = matrix.to(self.gradients.device, non_blocking=True)
        return matrix if self.columns is None else matrix[:, self.columns].transpose(0, 1)

    def examples(self, chosen: Tensor) -> Captured:
        """Some examples of the batch; `tokens` stays the whole batch's."""
        positions = self.positions and self.positions._replace(tokens=self.positions.tokens[chosen])
        columns = None if self.columns is None else self.columns[chosen]
        activations, gradients = self.activations[chosen], self.gradients[chosen]
        return self._replace(activations=activations, gradients=gradients, columns=columns, positions=positions)

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
        return self._replace(activations=activations, gradients=gradients, positions=None)


class Receiver(Protocol):
    """What is done with a layer's tensors as soon as a backward pass has them."""

    def __call__(self, layer: str, captured: Captured) -> None: ...


class Capture(AbstractContextManager["Capture"]):
    """Hands `(layer, activations, gradients)` to a receiver during each backward pass.

    A layer that is called several times in a pass, or through several modules, is received once, its calls concatenated
    along the token axis: the gradient of its weight is the sum over calls, as it is over tokens.

    Args:
        operand: what becomes of every captured tensor; a wider type, unless one asks for something else.
        flattened: layers whose flattened inputs are known to be example by example; others are looked at when there are
            several examples, and are among them then. None looks at none.
        watched: whether tracked weights that functions use outside of their modules are looked for, which takes time.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, TrackedLayer],
        receive: Receiver,
        operand: Callable[[Tensor], Tensor] = widened,
        flattened: set[str] | None = None,
        watched: bool = False,
    ) -> None:
        self._flattened = flattened
        self._watched = watched
        self._model = model
        self._layers = layers
        self._receive = receive
        self._operand = operand
        self._pass: Pass | None = None

    def __enter__(self) -> Capture:
        with ExitStack() as stack:
            stack.enter_context(frozen(self._model))
            stack.callback(self._model.register_forward_pre_hook(self._model_hook).remove)
            written = owners(self._layers)
            stack.enter_context(through_maps(written))
            for owner in written:
                stack.callback(owner.module.register_forward_hook(self._note_owner).remove)
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

    def run(
        self,
        loss: Callable[[], Tensor],
        examples: int,
        padding: Sequence[Padding] = (),
        lengths: Set[int] = frozenset(),
        others: Sequence[Callable[[], Tensor]] = (),
    ) -> Tensor:
        """One forward and backward pass, and a backward pass for each other loss of what the model has returned.

        Args:
            loss: computes the summed loss of the batch.
            examples: how many the batch has.
            padding: which tokens are real, by how many a layer sees; nothing when all are.
            lengths: how many tokens an example may have, padding included: what a model may have flattened.
            others: computes others, of the same calls of the model.

        Returns:
            The loss, all of them added up, detached, still on its device.

        Raises:
            LossError: the loss is not a scalar, or no tracked layer has part in it.
            LayerError: a layer never ran, its tensors are not batch-first, its input was overwritten in place, or
                functions use its weight.
        """
        self._pass = current = Pass(examples, padding, lengths)
        answered = calls_answered(self._model) if others else nullcontext(lambda: None)
        try:
            looked_at = self._layers.values() if self._watched else ()
            with answered as again:
                with watched_functions(self._model, looked_at) as refuse:
                    value = self._forward(loss, current)
                self._check(value, current)
                current.backward, calls, total = True, dict(current.calls), value.detach()
                with leaves_of(value) as leaves:
                    refuse(leaves)
                    current.check_flattened(leaves)
                    expected = list[Call]()
                    for number, other in enumerate((None, *others)):
                        if other is not None:
                            again()
                            value = other()
                            expected, total = current.repeat(calls), total + value.detach()
                        # Not by `autograd.grad`, with which PyTorch's counters of operations refuse modules that read a
                        # leaf.
                        torch.autograd.backward(value, inputs=leaves, retain_graph=number < len(others))
                        self._receive_rest(current)
                        current.check_repeated(expected)
            if self._flattened is not None:
                self._flattened.update(current.first)
        finally:
            self._pass = None
        return total

    def _receive_rest(self, current: Pass) -> None:
        """Layers of which only some calls have part in the loss."""
        for name in list(current.calls):
            captured = self._concatenated(name, current)
            if captured is not None:
                self._receive(name, captured)

    def ran(self, loss: Callable[[], Tensor]) -> Set[str]:
        """Which layers run in a forward pass over one example, or could have, such as experts without a token."""
        self._pass = current = Pass(1, (), frozenset())
        try:
            with torch.no_grad():
                loss()
        finally:
            self._pass = None
        found = current.without_graph | set(current.calls)
        return found | {name for name, layer in self._layers.items() if current.idle(layer)}

    @staticmethod
    def _forward(loss: Callable[[], Tensor], current: Pass) -> Tensor:
        """The loss, of a model that can take the outputs of its layers for each example."""
        try:
            with torch.enable_grad():
                return loss()
        except RuntimeError as error:
            expanded = [name for name, (call, *_) in current.calls.items() if call.inputs.stride(0) == 0]
            if not expanded or out_of_memory(error):
                raise
            raise LayerError(
                f"{len(expanded)} tracked layer(s) read one input for all {current.examples} examples: "
                f"{', '.join(expanded[:5])}. The model was given their output once for each example, as broadcasting "
                f"would, and cannot compute with that ({first_line(error)}). Give batch sizes of 1, or leave them out "
                "with `layers=[...]`."
            ) from error

    def held(self) -> list[Tensor]:
        """The inputs of layers that wait for their gradients; autograd has no need of them where weights are frozen."""
        return [call.inputs for calls in self._pass.calls.values() for call in calls] if self._pass else []

    def _check(self, value: Tensor, current: Pass) -> None:
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
        # An example may have no image.
        expected = {name: each for name, each in self._layers.items() if not any(use.beside_text for use in each.uses)}
        missing = [name for name, each in expected.items() if name not in current.calls and not current.idle(each)]
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

    def _note_owner(self, module: nn.Module, *_: object) -> None:
        if self._pass is not None:
            self._pass.owners.add(module)

    def _forward_hook(
        self,
        name: str,
        use: Use,
        module: nn.Module,
        arguments: tuple[Any, ...],
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
        routing = arguments[1:] if isinstance(module, LinearMap) else ()
        # Such as positions, which are the same for all examples.
        replaced = len(inputs) == 1 != current.examples and not routing
        if replaced:
            inputs, output = (each.expand(current.examples, *each.shape[1:]) for each in (inputs, output))
        if not output.requires_grad:
            # The graph begins here; a leaf itself would forbid later in-place operations.
            output, replaced = output.detach().requires_grad_().clone(), True
        # What gradient checkpointing computes again must come out alike, but what counts is the first time.
        if not current.backward:
            flat = None if routing else current.flat(use, inputs)
            whole = use.beside_text and current.examples == 1 != len(inputs)
            seen = inputs.detach() if flat is None else inputs.detach().unflatten(0, (-1, flat))
            call = Call(use, seen, inputs._version, current.model_calls - 1, flat, whole, routing)
            unknown = self._flattened is not None and name not in self._flattened and current.examples > 1
            if flat is not None and unknown and inputs.requires_grad:
                current.first.setdefault(name, inputs[:flat])
            current.calls.setdefault(name, []).append(call)
            output.register_hook(partial(self._gradient_hook, name, call))
        return output if replaced else None

    def _gradient_hook(self, name: str, call: Call, gradient: Tensor) -> None:
        current = self._pass
        assert current is not None
        if current.looking:
            return
        call.gradient = gradient if call.flat is None else gradient.unflatten(0, (-1, call.flat))
        if all(each.gradient is not None for each in current.calls[name]):
            captured = self._concatenated(name, current)
            if captured is not None:
                self._receive(name, captured)

    def _concatenated(self, name: str, current: Pass) -> Captured | None:
        """What a layer's calls of a pass make together; None where no call has part in the loss."""
        layer = self._layers[name]
        parts = [
            self._captured(layer, call, call.gradient, current)
            for call in current.calls.pop(name)
            if call.gradient is not None
        ]
        parts = [each for each in parts if each.gradients.shape[1]]  # an expert may have got nothing but padding
        if not parts:
            return None
        found = parts[0]
        if len(parts) > 1:
            activations, gradients, tokens, calls, _, positions = zip(*parts, strict=True)
            lengths = {part.gradients.shape[1] / part.calls for part in parts}
            together = sum(calls) if len(lengths) == 1 else 0
            found = Captured(current.joined(activations), torch.cat(gradients, 1), sum(tokens), together)
            told = [each for each in positions if each is not None]
            if told:
                same = len({each.length for each in told}) == 1
                each_token = torch.cat([each.tokens for each in told], 1)
                found = found._replace(positions=Positions(each_token, told[0].length if same else 0))
        if layer.one_hot:
            vectors, columns = distinct_one_hot(found.activations, found.gradients.dtype)
            found = found._replace(activations=vectors, columns=columns)
        return found

    def _captured(self, layer: TrackedLayer, call: Call, gradient: Tensor, current: Pass) -> Captured:
        """One call's tensors; of a one-hot layer, ids [batch, tokens] stand for activations."""
        self._check_call(layer.name, call, gradient, current)
        if call.routing:
            return self._packed(layer, call, gradient, current.packing(layer.name, call, *call.routing))
        copies = call.use.kind.copies(call.use.module)
        shared = self._shared_activations(layer, call, current) if layer.shares_activations(call.use) else None
        # Operands that are no wider are made before tensors are padded and masked, so that fewer bytes are moved.
        kind = call.use.kind
        early = not (kind.elementwise or self._widens(gradient) or (self._widens(call.inputs) and not kind.one_hot))
        inputs = self._operand(call.inputs) if early and shared is None and not kind.one_hot else call.inputs
        gradient = self._operand(gradient) if early else gradient
        read = layer.read(call.use, inputs) if shared is None else shared
        activations, gradients = layer.tensors(call.use, read, gradient)
        if call.whole:
            activations, gradients = (each.flatten(0, 1).unsqueeze(0) for each in (activations, gradients))
        batch, tokens = gradients.shape[:2]
        padding, real = current.padding_for(layer.name, tokens // copies, call), batch * tokens
        if padding is not None:
            mask = padding.mask.to(gradients.device).repeat(1, copies, 1)
            real, gradients = copies * padding.tokens, gradients.where(mask, 0)  # padding may hold NaN
            activations = activations if shared is not None else _masked(activations, mask)
        if not early:
            gradients = self._operand(gradients)
            activations = activations if shared is not None or layer.one_hot else self._operand(activations)
        return Captured(activations, gradients, real, copies)

    def _packed(self, layer: TrackedLayer, call: Call, gradient: Tensor, packing: Packing) -> Captured:
        """The tensors of a call with one expert's vectors, [batch, most of an example, width]."""
        read = layer.read(call.use, call.inputs)  # [vectors, 1, width]
        activations, gradients = (
            packing.pack(self._operand(each.squeeze(1))) for each in layer.tensors(call.use, read, gradient)
        )
        positions = Positions(packing.pack(packing.positions), packing.length)
        return Captured(activations, gradients, packing.real, positions=positions)

    def _widens(self, tensor: Tensor) -> bool:
        """Whether a tensor takes more memory as an operand."""
        return self._operand(tensor.new_empty(0)).element_size() > tensor.element_size()

    @staticmethod
    def _check_call(name: str, call: Call, gradient: Tensor, current: Pass) -> None:
        """Refuse a call whose tensors are not each example's own, as the layer has seen them."""
        if call.inputs._version != call.version:
            raise LayerError(
                f"The input of layer {name!r} was overwritten in place after the layer had read it. "
                "Make the operation that follows out of place (x = x + y, not x += y)."
            )
        if call.routing:
            return
        if len(call.inputs) != current.examples and not call.whole:
            raise not_by_example(name, len(call.inputs), current.examples, call.use.beside_text)
        if current.examples > 1 and call.inputs.stride(0) == 0 and not bool(gradient[1:].any()):
            raise LayerError(
                f"Layer {name!r} reads one input for all {current.examples} examples, and the model takes the "
                "first of them from its output (output[0]) instead of broadcasting it, so the examples' parts of its "
                "gradient cannot be told apart. Give batch sizes of 1, or leave the layer out with `layers=[...]`."
            )

    def _shared_activations(self, layer: TrackedLayer, call: Call, current: Pass) -> Tensor:
        """A layer's activations, masked; those of the layer before if both have read the same tensor."""
        if call.model_call in current.latest:
            before, use, source, activations = current.latest[call.model_call]
            if layer.reads_as(call.use, before, use) and _same_memory(source, call.inputs):
                return activations
        early = not self._widens(call.inputs)
        activations = layer.read(call.use, self._operand(call.inputs) if early else call.inputs)
        padding = current.padding_of(activations.shape[1], call)
        if padding is not None and len(activations) == len(padding.mask):
            activations = activations.where(padding.mask.to(activations.device), 0)
        activations = activations if early else self._operand(activations)
        current.latest[call.model_call] = (layer, call.use, call.inputs, activations)
        return activations


def _masked(activations: Tensor, mask: Tensor) -> Tensor:
    """Vectors [batch, tokens, width] or ids [batch, tokens] without those of padding."""
    return activations.where(mask, 0) if activations.dim() == 3 else activations.where(mask.squeeze(2), NO_COLUMN)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same memory."""
    alike = one.shape == other.shape and one.stride() == other.stride() and one.device == other.device
    return alike and one.data_ptr() == other.data_ptr()
