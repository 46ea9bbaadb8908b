"""Which layers are tracked, and how a layer's hook tensors become activations and output gradients.

One row of `LAYER_TYPES` per kind of layer: it says how the layer's input and output gradient are laid out as
`[batch, tokens, features]`, so that the gradient of its weights is `gradients^T activations` summed over tokens. This
module knows nothing of hooks, sweeps or curvature.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from wherefrom.errors import LayerError


@dataclass(frozen=True)
class LayerType:
    """How one kind of layer is read.

    Attributes:
        size: (outputs, inputs) of the weight as a matrix, without the bias.
        inputs: the layer's input as [batch, tokens, inputs].
        outputs: the gradient of the layer's output as [batch, tokens, outputs].
    """

    size: Callable[[nn.Module], tuple[int, int]]
    inputs: Callable[[nn.Module, Tensor], Tensor]
    outputs: Callable[[nn.Module, Tensor], Tensor]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _linear_size(module: nn.Module) -> tuple[int, int]:
    outputs, inputs = _weight(module).shape
    return outputs, inputs


def _conv1d_size(module: nn.Module) -> tuple[int, int]:
    inputs, outputs = _weight(module).shape  # transformers' Conv1D stores the transposed matrix
    return outputs, inputs


def _as_tokens(module: nn.Module, tensor: Tensor) -> Tensor:
    """[batch, ..., features] -> [batch, tokens, features]; a plain [batch, features] has one token."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


# By qualified name, so that the engine does not import the libraries that define the layers.
LAYER_TYPES: dict[str, LayerType] = {
    "torch.nn.modules.linear.Linear": LayerType(_linear_size, _as_tokens, _as_tokens),
    "transformers.pytorch_utils.Conv1D": LayerType(_conv1d_size, _as_tokens, _as_tokens),
}


def layer_type(module: nn.Module) -> LayerType | None:
    """The entry for a module or the nearest class it derives from; None when it is not supported."""
    for base in type(module).__mro__:
        found = LAYER_TYPES.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None


# Matrix units want rows of a multiple of 16 bytes: a product with 769 columns takes up to twice as long as with 776.
_ALIGNMENT = 8


class TrackedLayer:
    """One layer whose gradients are captured.

    Attributes:
        name: the module's name in the model.
        shape: (outputs, inputs + 1 with a bias) of the gradient matrix; the bias is its last column.
        width: how many columns activations have: those of `shape`, and with a bias some of zeros for alignment.
    """

    def __init__(self, name: str, module: nn.Module, kind: LayerType) -> None:
        self.name = name
        self.module = module
        self._kind = kind
        outputs, inputs = kind.size(module)
        self._biased = getattr(module, "bias", None) is not None
        self.shape = (outputs, inputs + int(self._biased))
        self.width = -(-self.shape[1] // _ALIGNMENT) * _ALIGNMENT if self._biased else inputs

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(outputs, width): of a gradient matrix made of aligned activations; past `shape`, it is zero."""
        return self.shape[0], self.width

    def activations(self, inputs: Tensor) -> Tensor:
        """The layer's input as [batch, tokens, width]: with a bias, a column of ones and the rest zeros."""
        tokens = self._kind.inputs(self.module, inputs)
        if not self._biased:
            return tokens
        features = tokens.shape[-1]
        aligned = tokens.new_zeros(*tokens.shape[:-1], self.width)
        aligned[..., :features] = tokens
        aligned[..., features] = 1
        return aligned

    def gradients(self, output_gradient: Tensor) -> Tensor:
        """The gradient of the loss with respect to the layer's output as [batch, tokens, outputs]."""
        return self._kind.outputs(self.module, output_gradient)

    def reads_as(self, other: TrackedLayer) -> bool:
        """Whether both would make the same activations of the same input."""
        return self._kind.inputs is other._kind.inputs and self.width == other.width


def select_layers(
    model: nn.Module, patterns: Sequence[str] | None = None, head: nn.Module | None = None
) -> dict[str, TrackedLayer]:
    """Find the layers to track, in the model's order.

    Args:
        patterns: names or glob patterns; None means every supported layer except `head`.
        head: the output head.

    Raises:
        LayerError: nothing matches a pattern (close names are listed), a named layer is of an unsupported kind, or
            a tracked weight is shared with another module.
    """
    names = [name for name, _ in model.named_modules() if name]
    supported = dict(_supported(model))
    if patterns is None:
        chosen = [name for name, layer in supported.items() if layer.module is not head]
    else:
        matched = {name for pattern in patterns for name in _matches(pattern, names, supported)}
        chosen = [name for name in supported if name in matched]
    if not chosen:
        kinds = ", ".join(name.rpartition(".")[2] for name in LAYER_TYPES)
        raise LayerError(f"{type(model).__name__} has no layer to track: supported kinds are {kinds}.")
    layers = {name: supported[name] for name in chosen}
    _refuse_shared_weights(model, layers)
    return layers


def _supported(model: nn.Module) -> Iterator[tuple[str, TrackedLayer]]:
    for name, module in model.named_modules():
        kind = layer_type(module)
        if kind is not None:
            yield name, TrackedLayer(name, module, kind)


def _matches(pattern: str, names: Sequence[str], supported: dict[str, TrackedLayer]) -> list[str]:
    """The supported layers that a pattern names; a pattern that reaches none is an error that says why."""
    every = [name for name in names if fnmatchcase(name, pattern)]
    found = [name for name in every if name in supported]
    if found:
        return found
    if every:
        raise LayerError(
            f"layers: {pattern!r} names {every[0]!r}, which is not a layer of a supported kind "
            f"({', '.join(name.rpartition('.')[2] for name in LAYER_TYPES)}); name the layers inside it "
            f"with {pattern + '.*'!r}."
        )
    close = difflib.get_close_matches(pattern, list(supported), n=4, cutoff=0.3)
    raise LayerError(f"layers: {pattern!r} matches no layer. Close names: {', '.join(close) or 'none'}.")


def _refuse_shared_weights(model: nn.Module, layers: dict[str, TrackedLayer]) -> None:
    """A weight used by two modules has one gradient, the sum of both; half of it would be a wrong answer."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first = owner.setdefault(id(parameter), name)
            if first != name and (first in layers or name in layers):
                raise LayerError(
                    f"layers: {first!r} and {name!r} share one weight, so the gradient of either is only a part. "
                    "Leave both out with `layers=[...]` patterns, or untie them before training."
                )
