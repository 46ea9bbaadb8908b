"""A linear map whose weight is a part of another module's parameter, such as one expert's of all experts' weights.

It is a module, so that hooks see what it reads and gives; but it has no parameters, and is no part of a model.
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


class LinearMap(nn.Module):
    """y = x W^T + b, or x W + b of a weight that is stored transposed.

    Attributes:
        parts: of parameters: W and, if there is one, b.
        transposed: whether W is [inputs, outputs].
    """

    def __init__(self, weight: Part, bias: Part | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.parts = (weight,) if bias is None else (weight, bias)
        self.transposed = transposed

    @property
    def weight(self) -> Tensor:
        """W, a view of the parameter as it is now."""
        return self.parts[0].of(self.parts[0].parameter)

    @property
    def bias(self) -> Tensor | None:
        """b, likewise."""
        return self.parts[1].of(self.parts[1].parameter) if len(self.parts) > 1 else None

    def forward(self, inputs: Tensor, routing: Routing | None = None, expert: int = 0) -> Tensor:
        """x [..., inputs] to y [..., outputs], in the type of x.

        Args:
            routing: says, of an expert's vectors [vectors, inputs], whose they are; otherwise their first dimension is
                the batch, as any layer's.
        """
        bias, weight = self.bias, self.weight.to(inputs.dtype)
        bias = None if bias is None else bias.to(inputs.dtype)
        return functional.linear(inputs, weight.T if self.transposed else weight, bias)
