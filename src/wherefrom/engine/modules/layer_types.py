"""The kinds of layers: how each one's hook tensors become activations and output gradients.

One row of `LAYER_TYPES` per kind. It says how the layer's input and output gradient are laid out as `[batch, tokens,
features]`, so that the gradient of its weights is `gradients^T activations` summed over tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.engine.modules.linear_map import LinearMap, Lookup, Map, Scaling
from wherefrom.runtime.precision import widened
from wherefrom.tasks.adapters.quantized import stored_as

Entry = TypeVar("Entry")

NO_COLUMN = -1
"""The id of a token that touches no column of a one-hot layer: padding."""


@dataclass(frozen=True)
class LayerType:
    """How one kind of layer is read.

    Attributes:
        inputs: the layer's input as [batch, tokens, inputs]; of a `one_hot` kind the ids [batch, tokens] instead.
        outputs: the gradient of the layer's output as [batch, tokens, outputs].
        plain: whether `inputs` looks at the input alone, so that layers that read one tensor share what it makes.
        by_default: tracked without being named.
        transposed: whether the weight as a matrix [outputs, inputs] is transposed.
        one_hot: whether its inputs are one-hot vectors.
        elementwise: whether the layer is w * f(x) + b with one weight for each feature: `inputs` gives f(x), and
            `elementwise_tensors` does the rest.
        copies: how many tokens come from each position; those of equal number lie one after the other.
        refused: why a module of this kind cannot be tracked; None when it can.
    """

    inputs: Callable[[nn.Module, Tensor], Tensor]
    outputs: Callable[[nn.Module, Tensor], Tensor]
    plain: bool = False
    by_default: bool = True
    transposed: bool = False
    one_hot: bool = False
    elementwise: bool = False
    copies: Callable[[nn.Module], int] = lambda module: 1
    refused: Callable[[nn.Module], str | None] = lambda module: None

    @property
    def tokenwise(self) -> bool:
        """Whether one token's output is of its own input alone, so that a model may flatten [batch, tokens, ...]."""
        return self.plain or self.elementwise or self.one_hot

    def size(self, module: nn.Module) -> tuple[int, int]:
        """(outputs, inputs) of the weight as a matrix, without a bias that is its last column."""
        shape = module.parts[0].shape if isinstance(module, Map) else _weight(module).shape
        if self.elementwise:
            return 1, math.prod(shape) * (1 + int(getattr(module, "bias", None) is not None))
        rows, columns = shape[0], math.prod(shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _as_tokens(module: nn.Module, tensor: Tensor) -> Tensor:
    """[batch, ..., features] -> [batch, tokens, features]; a plain [batch, features] has one token."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


# Convolutions: a token is an output position, its activations are the patch that the kernel sees there.


def _groups(module: nn.Module) -> int:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return module.groups


def _patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """[batch, in, *positions] -> [batch, groups * output positions, in / groups * kernel].

    Each (group, output position) is a token, group by group.
    """
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(inputs, _paddings(module), mode)
    for dimension, (size, stride, step) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dimension, step * (size - 1) + 1, stride)[..., ::step]
    dimensions = len(module.kernel_size)  # windows: [batch, in, *output positions, *kernel]
    grouped = windows.unflatten(1, (module.groups, -1)).movedim(2, 2 + dimensions)
    patches: Tensor = grouped.flatten(-dimensions - 1).flatten(1, -2)
    return patches


def _paddings(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """What `functional.pad` takes: (before, after) of every dimension, the last one first."""
    if not isinstance(module.padding, str):
        return [size for size in reversed(module.padding) for _ in range(2)]
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    # "same": an odd one goes to the end.
    totals = [step * (size - 1) for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    return [each for total in reversed(totals) for each in (total // 2, total - total // 2)]


def _convolution_outputs(module: nn.Module, gradient: Tensor) -> Tensor:
    """[batch, out, *positions] -> [batch, groups * positions, out]: a group's tokens are zero in other groups' outputs.

    With many groups that is mostly zeros, `groups` times the memory of the output.
    """
    groups, gradient = _groups(module), gradient[..., : gradient.shape[-1] - _cut_off(module, gradient)]
    tokens = gradient.flatten(2).transpose(1, 2)  # [batch, positions, out]
    if groups == 1:
        return tokens
    batch, positions, outputs = tokens.shape
    spread = tokens.new_zeros(batch, groups, positions, groups, outputs // groups)
    spread.diagonal(dim1=1, dim2=3).copy_(tokens.unflatten(2, (groups, -1)).movedim(2, -1))
    return spread.flatten(3).flatten(1, 2)


def _cut_off(module: nn.Module, gradient: Tensor) -> int:
    """How many of the last positions have no part in the loss, because a model cuts the output to the input's length.

    That makes a convolution causal which is padded at both ends; what is cut off is no token of an example.
    """
    if not isinstance(module, nn.Conv1d) or module.stride != (1,) or isinstance(module.padding, str):
        return 0
    (padding,), wide = module.padding, module.dilation[0] * (module.kernel_size[0] - 1)
    return padding if padding == wide > 0 and not gradient[..., -padding:].any() else 0


# Normalisations: y = w * f(x) + b, feature by feature.


def _normalized(module: nn.Module, inputs: Tensor) -> Tensor:
    """f(x) [batch, tokens, features]: the output with a weight of ones less that with zeros.

    So it does not matter whether a layer multiplies by w or by 1 + w. No hooks run, and the weights are not looked at.
    """
    wide, weight = widened(inputs), _weight(module)

    def output(value: float) -> Tensor:
        twin = copy.copy(module)
        twin._parameters = {
            name: None if each is None else _filled(each, value * (name == "weight"), wide)
            for name, each in module._parameters.items()
        }
        result: Tensor = type(module).forward(twin, wide)
        return result

    return (output(1.0) - output(0.0)).reshape(len(inputs), -1, weight.numel())


def _filled(weight: Tensor, value: float, like: Tensor) -> nn.Parameter:
    """A weight of the same shape and one value, where `like` is."""
    filled = torch.full(weight.shape, value, dtype=like.dtype, device=like.device)
    return nn.Parameter(filled, requires_grad=False)


def _scaled(module: nn.Module, inputs: Tensor) -> Tensor:
    return widened(inputs).reshape(len(inputs), -1, inputs.shape[-1])


def _features(module: nn.Module, gradient: Tensor) -> Tensor:
    return widened(gradient).reshape(len(gradient), -1, _weight(module).numel())


def elementwise_tensors(normalized: Tensor, gradient: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Activations [batch, tokens, width] and gradients [batch, tokens, 1] of a layer y = w * f(x) + b.

    A token's gradient is (s * f(x), s). With that as activations and ones as gradients, the Kronecker-factored
    curvature is the mean over tokens of its outer product, exactly.

    Args:
        normalized: f(x) [batch, tokens, features].
        gradient: s, of the same shape.
        width: features, or twice as many with a bias.
    """
    scaled = gradient * normalized
    activations = scaled if scaled.shape[-1] == width else torch.cat([scaled, gradient], -1)
    return activations, torch.ones_like(activations[..., :1])


def _without_weight(module: nn.Module) -> str | None:
    return None if isinstance(getattr(module, "weight", None), nn.Parameter) else "it has no weight that is trained"


# Embeddings: a token is an id, its activations are a one-hot vector.


def _ids(module: nn.Module, inputs: Tensor) -> Tensor:
    """[batch, ...] -> [batch, tokens], `NO_COLUMN` where the layer learns nothing."""
    ids = inputs.reshape(len(inputs), -1).long()
    padding = getattr(module, "padding_idx", None)
    return ids if padding is None else ids.masked_fill(ids == padding, NO_COLUMN)


def _changed_embedding(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weights in every pass"
    if getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq makes its gradient depend on the other examples of a batch"
    return None


def one_hot(ids: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[batch, tokens] -> [batch, tokens, size]; `NO_COLUMN` is zero everywhere."""
    vectors = torch.zeros(*ids.shape, size, dtype=dtype, device=ids.device)
    return vectors.scatter_(2, ids.clamp_min(0).unsqueeze(2), (ids >= 0).unsqueeze(2).to(dtype))


def distinct_one_hot(ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One-hot vectors over each example's distinct ids alone.

    Args:
        ids: [batch, tokens].

    Returns:
        The vectors [batch, tokens, tokens], and the id that each of their columns stands for, int64 [batch, tokens].
        Columns that an example has no use for are zero and stand for some id.
    """
    ascending, order = ids.sort(dim=1)
    positions = functional.pad(ascending.diff(dim=1) != 0, (1, 0)).cumsum(1)  # of each id among the distinct ones
    columns = torch.zeros_like(ids).scatter_(1, positions, ascending)
    own = torch.zeros_like(ids).scatter_(1, order, positions).where(ids >= 0, NO_COLUMN)
    return one_hot(own, ids.shape[1], dtype), columns.clamp_min_(0)


def map_type(module: Map) -> LayerType:
    """The kind of a map."""
    if isinstance(module, LinearMap):
        return TRANSPOSED_LINEAR if module.transposed else LINEAR
    return _MAP_TYPES[type(module)]


# By qualified name or pattern, so that the engine does not import the libraries that define the layers. None marks a
# class that derives from a supported one and is used in another way.
LINEAR = LayerType(_as_tokens, _as_tokens, plain=True)
TRANSPOSED_LINEAR = replace(LINEAR, transposed=True)
_CONVOLUTION = LayerType(_patches, _convolution_outputs, copies=_groups)
_ELEMENTWISE = LayerType(_normalized, _features, by_default=False, elementwise=True, refused=_without_weight)
_MAP_TYPES = {
    Scaling: LayerType(_scaled, _scaled, elementwise=True),
    Lookup: LayerType(_ids, _as_tokens, one_hot=True),
}
LAYER_TYPES: dict[str, LayerType | None] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.models.falcon.modeling_falcon.FalconLinear": LINEAR,
    # The output projection inside nn.MultiheadAttention, which never calls it.
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": None,
    "transformers.pytorch_utils.Conv1D": TRANSPOSED_LINEAR,
    "torch.nn.modules.conv.Conv1d": _CONVOLUTION,
    "torch.nn.modules.conv.Conv2d": _CONVOLUTION,
    "torch.nn.modules.conv.Conv3d": _CONVOLUTION,
    "torch.nn.modules.normalization.LayerNorm": _ELEMENTWISE,
    "torch.nn.modules.normalization.RMSNorm": _ELEMENTWISE,
    "transformers.models.*RMSNorm": _ELEMENTWISE,
    "torch.nn.modules.sparse.Embedding": LayerType(
        _ids, _as_tokens, by_default=False, transposed=True, one_hot=True, refused=_changed_embedding
    ),
}


def trackable(module: nn.Module) -> LayerType | None:
    """The kind of a module that can be tracked; None of one that cannot."""
    kind = layer_type(module)
    return None if kind is None or why_quantized(module) or kind.refused(module) else kind


def why_quantized(module: nn.Module) -> str | None:
    """Why a module whose weight is quantized cannot be tracked, whatever its kind; None of another."""
    stored = stored_as(module)
    return None if stored is None else f"its weight is quantized ({stored}), and training leaves it alone"


def layer_type(module: nn.Module) -> LayerType | None:
    """The kind of a module; None when it is not supported."""
    return entry_of(module, LAYER_TYPES)


def entry_of(module: nn.Module, entries: Mapping[str, Entry | None]) -> Entry | None:
    """The entry for a module or the nearest class it derives from; None without one, or with a `forward` of its own.

    Args:
        entries: by qualified name or pattern.
    """
    for base in type(module).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        for pattern, entry in entries.items():
            if fnmatchcase(name, pattern):
                inherited = type(module).forward is getattr(base, "forward", None)
                # One that computes in a way of its own may scale, pad, make its ids itself, or not be w * f(x) + b.
                return entry if inherited else None
    return None


def kind_names() -> str:
    """The supported kinds, for messages."""
    shown = (pattern for pattern, kind in LAYER_TYPES.items() if kind and not pattern.startswith("transformers.models"))
    names = (pattern.rpartition(".")[2] for pattern in shown)
    return ", ".join(dict.fromkeys(names))
