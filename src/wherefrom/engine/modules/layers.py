"""Which layers are tracked, and what a tracked layer's weight is as a matrix.

A tracked layer is one weight with every module that uses it: usually one, several where weights are tied. Its gradient
is `gradients^T activations` summed over the tokens of all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.engine.modules.layer_types import (
    LayerType,
    elementwise_tensors,
    kind_names,
    layer_type,
    map_type,
    one_hot,
    trackable,
    why_quantized,
)
from wherefrom.engine.modules.linear_map import Map, Part
from wherefrom.engine.modules.written_out import WrittenOut, written_out, written_out_kind
from wherefrom.runtime.errors import InputError, LayerError
from wherefrom.runtime.placement import tied_names
from wherefrom.tasks.adapters.composition import adapters_of, beside_text
from wherefrom.tasks.adapters.quantized import stored_as

# Matrix units want rows of a multiple of 16 bytes: a product with 769 columns takes up to twice as long as with 776.
_ALIGNMENT = 8

WIDEST = 16384
"""Features of the widest input or output that gets a covariance matrix: in float32 one of these takes 1 GiB, and its
eigenvectors another. Past that, as for one-hot inputs, only the matrix's diagonal is used."""


@dataclass(frozen=True)
class Use:
    """One module that a weight is used by, under its name in the model.

    Attributes:
        owner: the module that is written out, if this is one of its maps.
        beside_text: whether it sees something else than the text's tokens, of which none is padding.
    """

    name: str
    module: nn.Module
    kind: LayerType
    owner: WrittenOut | None = None
    beside_text: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of which parameters its weight and, if there is one, its bias are."""
        if isinstance(self.module, Map):
            return self.module.parts
        return tuple(
            Part(self.module, name) for name in ("weight", "bias") if getattr(self.module, name, None) is not None
        )

    @property
    def biased(self) -> bool:
        """Whether the module has a bias."""
        return len(self.parts) > 1


class TrackedLayer:
    """One weight whose gradients are captured.

    Args:
        uses: the modules that use it, in the model's order.

    Attributes:
        name: the first module's name in the model.
        shape: (outputs, inputs + 1 with a bias) of the gradient matrix; the bias is its last column. Of an
            element-wise layer (1, features), or (1, 2 * features) with a bias.
        width: how many columns activations have: those of `shape`, and with a bias some of zeros for alignment.
        one_hot: whether activations are one-hot vectors, of which only columns that an example touches are captured.
    """

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = tuple(uses)
        self.name = uses[0].name
        # Tied to another layer, an embedding is seen as that one, transposed: its one-hot vectors are gradients.
        self.main = next((use for use in uses if not use.kind.one_hot), uses[0])
        self.one_hot = self.main.kind.one_hot
        self._check_uses()
        outputs, inputs = self.main.kind.size(self.main.module)
        self._biased = not self.main.kind.elementwise and any(use.biased for use in uses)
        self.shape = (outputs, inputs + int(self._biased))
        self.width = -(-self.shape[1] // _ALIGNMENT) * _ALIGNMENT if self._biased else inputs

    def _check_uses(self) -> None:
        """Refuse uses whose gradients are not of one matrix."""
        outputs, inputs = self.main.kind.size(self.main.module)
        biased = [use for use in self.uses if use.biased]
        for use in self.uses:
            flipped = self._flipped(use)
            size = use.kind.size(use.module)
            if size != ((inputs, outputs) if flipped else (outputs, inputs)):
                raise _not_added_up(self.main, use, "they see it as matrices of different shapes")
            if use.biased and flipped:
                raise _not_added_up(self.main, use, "one has a bias and sees the weight transposed")
            if use.biased and not use.parts[1].is_same(biased[0].parts[1]):
                raise _not_added_up(biased[0], use, "they have biases of their own")

    def _flipped(self, use: Use) -> bool:
        return use.kind.transposed != self.main.kind.transposed

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(outputs, width): of a gradient matrix made of aligned activations; past `shape`, it is zero."""
        return self.shape[0], self.width

    @property
    def diagonal_factors(self) -> tuple[bool, bool]:
        """Whether only the diagonal of the gradient and of the activation factor's covariance is used.

        That of one-hot vectors is diagonal; of more than `WIDEST` features, it is an approximation.
        """
        return self.shape[0] > WIDEST, self.one_hot or self.shape[1] > WIDEST

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of which parameters the weight and, if there is one, the bias are."""
        return self.main.parts[0], *[use.parts[1] for use in self.uses if use.biased][:1]

    def to_matrices(self, weight: Tensor, *bias: Tensor) -> Tensor:
        """Numbers for each of the `parts`, [n, ...], laid out as gradient matrices [n, *shape]."""
        if self.main.kind.elementwise:
            return torch.cat([each.flatten(1) for each in (weight, *bias)], 1).unsqueeze(1)
        matrices = weight.transpose(1, 2) if self.main.kind.transposed else weight.flatten(2)
        return torch.cat([matrices, *(each.unsqueeze(2) for each in bias)], 2)

    def from_matrices(self, matrices: Tensor) -> list[Tensor]:
        """The inverse: what gradient matrices [n, *shape] have for each of the `parts`, [n, ...]."""
        weight, bias = matrices.tensor_split([self.parts[0].numel // self.shape[0]], 2)
        parts = (weight.transpose(1, 2) if self.main.kind.transposed else weight, bias)  # without a bias, it is empty
        return [part.reshape(len(part), *each.shape) for part, each in zip(parts, self.parts, strict=False)]

    def columns(self, tokens: int) -> int:
        """How many columns of the gradient matrix are captured for an example of that many tokens."""
        return tokens if self.one_hot else self.width

    def shares_activations(self, use: Use) -> bool:
        """Whether a use's activations depend on nothing but its input, and may be another layer's too."""
        return use.kind.plain and not self._flipped(use)

    def reads_as(self, use: Use, other: TrackedLayer, other_use: Use) -> bool:
        """Whether both uses, which share activations, would make the same of the same input."""
        same_kind = use.kind.inputs is other_use.kind.inputs
        return same_kind and self.width == other.width and use.biased == other_use.biased

    def read(self, use: Use, inputs: Tensor) -> Tensor:
        """What a use's input comes to, before its output gradient is known.

        Returns:
            Activations [batch, tokens, width], with a bias a column of ones and the rest zeros; of a one-hot kind the
            ids [batch, tokens], of an element-wise one f(x) [batch, tokens, features].
        """
        tokens = use.kind.inputs(use.module, inputs)
        if not self._biased or use.kind.one_hot:
            return tokens
        features = tokens.shape[-1]
        aligned = tokens.new_empty(*tokens.shape[:-1], self.width)
        aligned[..., :features] = tokens
        aligned[..., features:] = 0
        aligned[..., features] = use.biased
        return aligned

    def tensors(self, use: Use, read: Tensor, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and gradients of a use, [batch, tokens, width] and [batch, tokens, out].

        Args:
            read: what `read` made of its input; the activations of a `one_hot` layer stay ids [batch, tokens].
            output_gradient: of the loss with respect to the module's output.
        """
        gradients = use.kind.outputs(use.module, output_gradient)
        if read.shape[1] > gradients.shape[1]:  # without positions that a model cuts off
            copies = use.kind.copies(use.module)
            read = read.unflatten(1, (copies, -1))[:, :, : gradients.shape[1] // copies].flatten(1, 2)
        if use.kind.elementwise:
            return elementwise_tensors(read, gradients, self.width)
        if not self._flipped(use):
            return read, gradients
        flipped = functional.pad(gradients, (0, self.width - gradients.shape[-1]))
        return flipped, one_hot(read, self.shape[0], gradients.dtype) if use.kind.one_hot else read


def owners(layers: Mapping[str, TrackedLayer]) -> list[WrittenOut]:
    """The modules that layers are linear maps of."""
    found = (use.owner for layer in layers.values() for use in layer.uses if use.owner is not None)
    return list(dict.fromkeys(found))


def _not_added_up(one: Use, other: Use, reason: str) -> LayerError:
    return LayerError(
        f"layers: {one.name!r} and {other.name!r} share one weight, and {reason}, so their parts of its gradient "
        "cannot be added up. Leave both out with `layers=[...]` patterns, or untie them before training."
    )


_SCRIPTED = "a TorchScript module, which shows nothing of its layers: load the original nn.Module and its state_dict"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, of one in `DataParallel`.

    Raises:
        InputError: it is none, or its passes would be of another precision than it is in.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: expected a torch.nn.Module.")
    if hasattr(model, "_original_forward"):
        raise InputError(
            "model: accelerate has made its forward run in mixed precision, as a Trainer with bf16 or fp16 does, "
            "whatever half_precision says. Load what was saved, or give "
            "accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)."
        )
    return model


def select_layers(
    model: nn.Module, patterns: Sequence[str] | None = None, head: nn.Module | None = None
) -> dict[str, TrackedLayer]:
    """Find the layers to track, in the model's order.

    Args:
        patterns: names or glob patterns, which match layers of every supported kind. None means linear layers and
            convolutions except `head`; of a model with adapters of peft these, of every kind; and of a model with some
            frozen weights only layers that are not.
        head: the output head.

    Raises:
        LayerError: nothing matches a pattern (close names are listed), a named layer is of an unsupported kind, or
            a tracked weight is shared with a module whose part of the gradient cannot be added to its own.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerError(f"model is {_SCRIPTED}.")
    weights = list(weights_of(model))
    chosen = _by_default(model, weights, head) if patterns is None else _named(model, weights, patterns)
    layers = [TrackedLayer(uses) for uses in chosen]
    _refuse_unseen_uses(model, layers)
    return {layer.name: layer for layer in layers}


def weights_of(model: nn.Module) -> list[list[Use]]:
    """The modules of supported kinds, those that use one weight together."""
    identities = {(id(each.module), each.name): each.identity for each in parameters_of(model)}
    groups: dict[tuple[int | str, str], list[Use]] = {}
    beside = beside_text(model)
    for name, module in model.named_modules():
        for use in _uses(name, module, module in beside):
            part = use.parts[0]
            # A weight that is computed, as by weight normalisation, is no parameter, and another tensor at every look.
            identity = identities.get((id(part.owner), part.name), use.name)
            groups.setdefault((identity, str(part.index)), []).append(use)
    return list(groups.values())


def _uses(name: str, module: nn.Module, beside: bool) -> list[Use]:
    """A module as a layer, or its maps; nothing of a module that cannot be tracked."""
    kind = trackable(module)
    if kind is not None:
        return [Use(name, module, kind, beside_text=beside)]
    owner = written_out(module)
    if owner is None:
        return []
    return [
        Use(".".join(filter(None, (name, inside))), each, map_type(each), owner, beside)
        for inside, each in owner.maps.items()
    ]


class Parameter(NamedTuple):
    """A parameter that a module has itself; those of equal `identity` are one, even if offloading made two tensors."""

    owner: str
    module: nn.Module
    name: str
    value: nn.Parameter
    identity: int | str


def parameters_of(model: nn.Module) -> Iterator[Parameter]:
    """Every parameter of a model, where it is."""
    tied = tied_names(model)
    for owner, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            full = f"{owner}.{name}"
            yield Parameter(owner, module, name, value, tied.get(full, full) if value.is_meta else id(value))


def _by_default(model: nn.Module, weights: Sequence[list[Use]], head: nn.Module | None) -> list[list[Use]]:
    adapters = adapters_of(model)
    heads = set() if head is None else set(head.modules())  # peft's copies of it, too
    own = adapters.modules - adapters.copies if adapters else ()
    chosen = [
        uses
        for uses in weights
        if any((use.kind.by_default and use.module not in heads) or use.parts[0].owner in own for use in uses)
    ]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    if adapters is not None:
        chosen = [uses for uses in chosen if any(use.parts[0].owner in adapters.modules for use in uses)]
    elif any(trainable) and not all(trainable):
        chosen = [uses for uses in chosen if uses[0].parts[0].parameter.requires_grad]
    if not chosen and adapters is not None:
        raise LayerError(
            f"{type(model).__name__} has adapters ({', '.join(adapters.kinds)}), and none that is tracked: their "
            "weights are of no supported kind of layer. Track the model's own matrices with the adapters in them, as "
            "merge_and_unload() of peft gives them; or train adapters of another kind, such as LoRA."
        )
    quantized = [stored for stored in map(stored_as, model.modules()) if stored]
    if not chosen and quantized:
        raise LayerError(
            f"{type(model).__name__} has no layer that is tracked without being named: the weights of {len(quantized)} "
            f"are quantized ({', '.join(dict.fromkeys(quantized))}), and training leaves them alone. Give the model "
            "with the adapters that were trained beside them, or load it without quantization."
        )
    if not weights:
        raise LayerError(f"{type(model).__name__} has no layer to track: supported kinds are {kind_names()}.")
    if not chosen:
        raise LayerError(
            f"{type(model).__name__} has no layer that is tracked without being named: those are linear layers and "
            "convolutions, but not the output head, not frozen layers beside trainable weights, and of a model with "
            f"adapters these alone. Name some with `layers=[...]`, such as {weights[0][0].name!r}."
        )
    return chosen


def _named(model: nn.Module, weights: Sequence[list[Use]], patterns: Sequence[str]) -> list[list[Use]]:
    supported = [use.name for uses in weights for use in uses]
    matched = {name for pattern in patterns for name in _matches(model, pattern, supported)}
    return [uses for uses in weights if any(use.name in matched for use in uses)]


def _matches(model: nn.Module, pattern: str, supported: Sequence[str]) -> list[str]:
    """The supported layers that a pattern names; a pattern that reaches none is an error that says why."""
    found = [name for name in supported if fnmatchcase(name, pattern)]
    if found:
        return found
    every = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
    if every:
        raise LayerError(f"layers: {pattern!r} names {every[0]!r}, {_why_not(model.get_submodule(every[0]), pattern)}")
    close = difflib.get_close_matches(pattern, list(supported), n=4, cutoff=0.3)
    raise LayerError(f"layers: {pattern!r} matches no layer. Close names: {', '.join(close) or 'none'}.")


def _why_not(module: nn.Module, pattern: str) -> str:
    kind, own = layer_type(module) or written_out_kind(module), sum(each.numel() for each in module.parameters(False))
    if isinstance(module, torch.jit.ScriptModule):
        return f"{_SCRIPTED}, or leave it out."
    reason = why_quantized(module) or (kind and kind.refused(module))
    if reason:
        return f"a {type(module).__name__} that cannot be tracked: {reason}. Leave it out."
    if own and kind is None:
        return (
            f"a {type(module).__name__} with {own:,} weights of its own, which is not a layer of a supported kind "
            f"({kind_names()}). Leave it out, build it of supported layers, or add its kind to LAYER_TYPES or "
            "WRITTEN_OUT."
        )
    return (
        f"which is not a layer of a supported kind ({kind_names()}); name the layers inside it with {pattern + '.*'!r}."
    )


def _refuse_unseen_uses(model: nn.Module, layers: Sequence[TrackedLayer]) -> None:
    """A parameter used by other modules too has a gradient of which the layer's is only a part."""
    users: dict[tuple[int, str], set[str]] = {}
    for layer in layers:
        for part in (part for use in layer.uses for part in use.parts):
            users.setdefault((id(part.owner), part.name), set()).add(layer.name)
    firsts: dict[int | str, Parameter] = {}
    for each in parameters_of(model):
        first = firsts.setdefault(each.identity, each)
        if users.get((id(first.module), first.name)) != users.get((id(each.module), each.name)):
            raise LayerError(
                f"layers: {first.owner!r} and {each.owner!r} share one {each.name}, and the gradient of one of them is "
                "only a part of its gradient. Leave both out with `layers=[...]` patterns, or untie them before "
                "training."
            )
