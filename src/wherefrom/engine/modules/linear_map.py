"""Maps whose weight is a part of another module's parameter, such as one expert's of all experts' weights.

They are modules, so that hooks see what they read and give; but have no parameters, and are no part of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from wherefrom.engine.routing import Routing


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of a module, or a part of it along its first dimension.

    Attributes:
        index: which part; all of it by default.
    """

    owner: nn.Module
    name: str
    index: int | slice = field(default_factory=lambda: slice(None))

    @property
    def parameter(self) -> Tensor:
        """The whole parameter as it is now: offloading, sharding and `functional_call` exchange it."""
        found = getattr(self.owner, self.name)
        assert isinstance(found, Tensor)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's, without a look at its numbers, which may be in other processes."""
        first, *rest = self.parameter.shape
        return tuple(rest) if isinstance(self.index, int) else (len(range(*self.index.indices(first))), *rest)

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def of(self, numbers: Tensor, before: int = 0) -> Tensor:
        """The same part of numbers that have the parameter's shape, after so many other dimensions: a view."""
        return numbers[(slice(None),) * before + (self.index,)]

    def is_same(self, other: Part) -> bool:
        """Whether both are the same numbers."""
        named = self.owner is other.owner and self.name == other.name
        return self.index == other.index and (named or self.parameter is other.parameter)


class Map(nn.Module):
    """What multiplies with parameters of another module.

    Attributes:
        parts: of parameters: the weight and, if there is one, the bias.
    """

    def __init__(self, weight: Part, bias: Part | None = None) -> None:
        super().__init__()
        self.parts = (weight,) if bias is None else (weight, bias)

    @property
    def weight(self) -> Tensor:
        """A view of the parameter as it is now."""
        return self.parts[0].of(self.parts[0].parameter)

    @property
    def bias(self) -> Tensor | None:
        """Likewise."""
        return self.parts[1].of(self.parts[1].parameter) if len(self.parts) > 1 else None


class LinearMap(Map):
    """y = x W^T + b, or x W + b of a weight that is stored transposed.

    Attributes:
        transposed: whether W is [inputs, outputs].
    """

    def __init__(self, weight: Part, bias: Part | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight, bias)
        self.transposed = transposed

    def forward(self, inputs: Tensor, routing: Routing | None = None, expert: int = 0) -> Tensor:
        """x [..., inputs] to y [..., outputs], in the type of x.

        Args:
            routing: says, of an expert's vectors [vectors, inputs], whose they are; otherwise their first dimension is
                the batch, as any layer's.
        """
        bias, weight = self.bias, self.weight.to(inputs.dtype)
        bias = None if bias is None else bias.to(inputs.dtype)
        return functional.linear(inputs, weight.T if self.transposed else weight, bias)


class Scaling(Map):
    """y = w * x, of a weight [features], in any shape."""

    def forward(self, inputs: Tensor) -> Tensor:
        """x [..., features] to y of the same shape."""
        return inputs * self.weight.flatten()


class Lookup(Map):
    """y = W[:, id], of a weight [outputs, ids].

    Args:
        padding: an id that learns nothing.
    """

    def __init__(self, weight: Part, padding: int | None) -> None:
        super().__init__(weight)
        self.padding_idx = padding

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] to y [..., outputs]."""
        return functional.embedding(ids, self.weight.T, self.padding_idx)
