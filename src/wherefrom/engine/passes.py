"""One forward and backward pass: what it runs under, and what it has seen so far.

This module knows layers and tensors; it does not know what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wherefrom.engine.modules.layers import TrackedLayer, Use
from wherefrom.engine.routing import Packing, Routing
from wherefrom.runtime.errors import LayerError, LossError
from wherefrom.tasks.task import evaluating

_ADVICE = "Several draws share a forward pass: the loss has to be a function of what `model(...)` returns."


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch are real.

    Attributes:
        mask: boolean [batch, tokens, 1], on the model's device.
        tokens: how many are true; counted on the host, so that no layer waits for the device.
    """

    mask: Tensor
    tokens: int

    def repeated(self, axis: int, sizes: Sequence[int]) -> Padding:
        """The same of [batch, *sizes], flattened to as many tokens, of which one dimension is the mask's."""
        along = [size if each == axis else 1 for each, size in enumerate(sizes)]
        mask = self.mask.view(-1, *along).expand(-1, *sizes).reshape(len(self.mask), -1, 1)
        return Padding(mask, self.tokens * math.prod(sizes) // sizes[axis])


@dataclass
class Call:
    """One run of a module that uses a layer's weight in a forward pass.

    Attributes:
        model_call: the number of the model's call that it is in, from 0.
        flat: how many tokens an example has, if the module reads all examples' one after the other, [batch * tokens,
            ...]; here they are [batch, tokens, ...].
        whole: whether all that the module reads is of the one example that the batch has.
        routing: whose vectors were read, and which expert read them; nothing for other layers.
    """

    use: Use
    inputs: Tensor
    version: int
    model_call: int
    flat: int | None = None
    whole: bool = False
    routing: tuple[Routing, int] | tuple[()] = ()
    gradient: Tensor | None = None


@dataclass
class Pass:
    """What one forward and backward pass has seen so far.

    Attributes:
        lengths: how many tokens an example may have.
        model_calls: how often the loss has called the model, but for calls without gradients.
        latest: by the model's call, the layer, its use and the input that activations were last made for, and these.
        latest_joined: activations of several calls, and what they were last joined to.
        without_graph: layers that ran while gradients were switched off.
        owners: modules that ran through their linear maps.
        first: what is taken for the first example's part of flattened inputs, by layer, while nobody has looked whether
            it is; looking: somebody does, and hooks do nothing.
    """

    examples: int
    padding: Sequence[Padding]
    lengths: Set[int]
    model_calls: int = 0
    calls: dict[str, list[Call]] = field(default_factory=dict)
    backward: bool = False
    latest: dict[int, tuple[TrackedLayer, Use, Tensor, Tensor]] = field(default_factory=dict)
    latest_joined: tuple[Sequence[Tensor], Tensor] | None = None
    without_graph: set[str] = field(default_factory=set)
    owners: set[nn.Module] = field(default_factory=set)
    first: dict[str, Tensor] = field(default_factory=dict)
    looking: bool = False

    def flat(self, use: Use, inputs: Tensor) -> int | None:
        """How many tokens an example has in an input [batch * tokens, ...]; None of one that is no such input.

        Only as many as the batch has: those of one example must not be taken for another's.
        """
        tokens, rest = divmod(len(inputs), self.examples)
        plain = inputs.dim() == (1 if use.kind.one_hot else 2) and use.kind.tokenwise and not use.beside_text
        return tokens if plain and not rest and tokens != 1 and tokens in self.lengths else None

    def check_flattened(self, leaves: Sequence[Tensor]) -> None:
        """Refuse flattened inputs of which what is taken for the first example's depends on another example.

        Of [tokens, batch, ...], what is flattened is in another order than of [batch, tokens, ...].

        Args:
            leaves: what the graph begins at.
        """
        leaves = [leaf for leaf in leaves if len(leaf) == self.examples]
        self.looking = True
        try:
            if leaves and self.first and _depends(list(self.first.values()), leaves):
                mixed = next(name for name, each in self.first.items() if _depends([each], leaves))
                raise LayerError(
                    f"Layer {mixed!r} reads all tokens flattened, and not example by example, as [tokens, batch, ...] "
                    "is flattened: whose they are cannot be told. Flatten [batch, tokens, ...], or leave the layer out "
                    "with `layers=[...]`."
                )
        finally:
            self.looking = False

    def repeat(self, calls: Mapping[str, list[Call]]) -> list[Call]:
        """Wait once more for gradients of the same calls: those that had one."""
        self.calls = dict(calls)
        found = [call for call in chain.from_iterable(calls.values()) if call.gradient is not None]
        for call in found:
            call.gradient = None
        return found

    @staticmethod
    def check_repeated(calls: Sequence[Call]) -> None:
        """Refuse a loss that does not depend on calls as the first one did."""
        if any(call.gradient is None for call in calls):
            raise LossError(f"Drawn losses of a batch depend on different calls of its layers. {_ADVICE}")

    def packing(self, layer: str, call: Call, routing: Routing, expert: int) -> Packing:
        """How an expert's vectors are laid out by example.

        Raises:
            LayerError: it is not known whose they are.
        """
        length, rest = divmod(routing.total, self.examples)
        if rest or length not in self.lengths | {1}:
            raise not_by_example(layer, routing.total, self.examples)
        padding = self.padding_for(layer, length, call)
        mask = None if padding is None else padding.mask.to(routing.tokens.device)
        return routing.packing(expert, self.examples, mask)

    def idle(self, layer: TrackedLayer) -> bool:
        """Whether a layer got nothing from a module that ran, such as an expert that no token was routed to."""
        owners = [use.owner for use in layer.uses if use.owner is not None and use.owner.kind.sparse]
        return any(owner.module in self.owners for owner in owners)

    def joined(self, activations: Sequence[Tensor]) -> Tensor:
        """Activations of several calls along the token axis; one tensor for layers that share those of each call."""
        if self.latest_joined is None or list(map(id, self.latest_joined[0])) != list(map(id, activations)):
            self.latest_joined = activations, torch.cat(list(activations), 1)
        return self.latest_joined[1]

    def padding_of(self, tokens: int, call: Call) -> Padding | None:
        """The padding of a call that sees `tokens` an example; None when there is none of that many.

        What is real of [batch, tokens, heads, width] or [batch, heads, tokens, width] is so for each head. With as many
        heads as tokens, it is read so that padding has no gradient.
        """
        if call.use.beside_text:
            return None
        sizes = call.inputs.shape[1:-1]
        if not (call.use.kind.tokenwise and len(sizes) > 1 and math.prod(sizes) == tokens):
            return self._of_length(tokens, call)
        found = [(axis, each) for axis, size in enumerate(sizes) if (each := self._of_length(size, call)) is not None]
        if len({id(each) for _, each in found}) > 1:
            raise _not_told_apart(f"Masks of {' and '.join(str(sizes[axis]) for axis, _ in found)} tokens")
        readings = [each.repeated(axis, sizes) for axis, each in found]
        if len(readings) > 1:
            assert call.gradient is not None
            gradient = call.gradient.reshape(self.examples, tokens, -1)
            readings.sort(key=lambda each: bool(gradient.masked_fill(each.mask, 0).any()))
        return readings[0] if readings else self._of_length(tokens, call)

    def _of_length(self, tokens: int, call: Call) -> Padding | None:
        found = [each for each in self.padding if each.mask.shape[1] == tokens]
        if len(found) > 1 and len(self.padding) != self.model_calls:
            raise _not_told_apart(f"{len(found)} masks of {tokens} tokens, and {self.model_calls} call(s) of the model")
        return self.padding[call.model_call] if len(found) > 1 else found[0] if found else None

    def padding_for(self, layer: str, tokens: int, call: Call) -> Padding | None:
        """The same of a layer that sees as many as one of the masks has, or else a single one; None when all are real.

        Raises:
            LayerError: it sees another number.
        """
        found = self.padding_of(tokens, call)
        # A layer that sees one vector for each example has no padding left.
        if found is None and self.padding and tokens != 1 and not call.use.beside_text:
            counts = " and ".join(str(each.mask.shape[1]) for each in self.padding)
            raise LayerError(
                f"Layer {layer!r} has {tokens} tokens per example and the task's mask {counts}. "
                "Leave the layer out with `layers=[...]`, or return None from Task.mask."
            )
        return found


def _depends(first: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether what is the first example's has a gradient by another example's part of the leaves."""
    ones = [torch.ones_like(each) for each in first]
    found = torch.autograd.grad(first, leaves, ones, retain_graph=True, allow_unused=True)
    return any(bool(each[1:].any()) for each in found if each is not None)


def _not_told_apart(what: str) -> LayerError:
    return LayerError(
        f"{what}, by which layers cannot be told apart. Pad one of the sequences by one token more, or return a mask "
        "for each call."
    )


def not_by_example(layer: str, vectors: int, examples: int, beside_text: bool = False) -> LayerError:
    """What is said of a layer that sees vectors of which nobody knows whose they are."""
    if beside_text:
        return LayerError(
            f"Layer {layer!r} saw a batch of {vectors} for {examples} examples: the images of all examples at once, "
            "and not one of each. Give batch sizes of 1, Execution(query_batch_size=1, train_batch_size=1), or leave "
            "the layer out with `layers=[...]`."
        )
    return LayerError(
        f"Layer {layer!r} saw a batch of {vectors} for {examples} examples: its input must keep the batch as first "
        "dimension, or flatten all of the batch's tokens, as many as its masks have, or else its tensors [batch, "
        "tokens, ...]. Leave the layer out with `layers=[...]`."
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; every module and parameter is put back as it was.

    Where nothing is trained, PyTorch's transformer layers compute by one function and call none of their parts, unless
    they are told not to.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for name, parameter in model.named_parameters():  # by name: offloading makes new parameters in every pass
                parameter.requires_grad_(required[name])


@contextmanager
def calls_answered(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Within it, after a call of what it yields, the model returns once more, call by call, what it has returned.

    Raises:
        LossError: it is called with other inputs than the first time.
    """
    forward, patched = model.forward, "forward" in vars(model)
    inputs, outputs, finals = list[list[object]](), list[object](), list[object]()
    turn: int | None = None

    def answer(*arguments: object, **keywords: object) -> object:
        given = tree_leaves((arguments, keywords))
        if turn is None:
            inputs.append(given)
            outputs.append(forward(*arguments, **keywords))
            return outputs[-1]
        before = inputs[turn] if turn < len(inputs) else []
        if len(before) != len(given) or not all(map(_alike, before, given)):
            raise LossError(f"The task gives the model other inputs for other targets. {_ADVICE}")
        return outputs[turn]

    def returned(_: nn.Module, __: object, output: object) -> object:
        """What other hooks have made of it, where the model itself is a tracked layer."""
        nonlocal turn
        if turn is None:
            finals.append(output)
            return output
        turn += 1
        return finals[turn - 1]

    def again() -> None:
        nonlocal turn
        turn = 0

    model.forward = answer
    hook = model.register_forward_hook(returned)
    try:
        yield again
    finally:
        hook.remove()
        del model.forward
        if patched:
            model.forward = forward


def _alike(one: object, other: object) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or (torch.equal(one, other) if both else type(one) is type(other) and bool(one == other))  # type: ignore[arg-type]


@contextmanager
def leaves_of(value: Tensor) -> Iterator[list[Tensor]]:
    """What the graph of a loss begins at, whose gradients are put back in the end: what counts arrives at hooks."""
    leaves = _leaves(value)
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield leaves
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
