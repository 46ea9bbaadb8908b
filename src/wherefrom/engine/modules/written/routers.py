"""Routers of mixtures of experts, and whatever else multiplies with a weight of its own in the midst of its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from wherefrom.engine.modules.linear_map import LinearMap, Map, Part

# What a weight is the same weight after.
_CASTS = (Tensor.type, Tensor.to, Tensor.float, Tensor.double)


def without_linear_weight(module: nn.Module) -> str | None:
    """Why a module multiplies with no weight of its own."""
    weight = module._parameters.get("weight")
    return None if weight is not None and weight.dim() == 2 else "it has no weight [outputs, inputs] of its own"


def router_maps(module: nn.Module) -> dict[str, LinearMap]:
    """The module as a linear map, under its own name."""
    bias = Part(module, "bias") if module._parameters.get("bias") is not None else None
    return {"": LinearMap(Part(module, "weight"), bias)}


def router_forward(module: nn.Module, maps: Mapping[str, Map]) -> Callable[..., Any]:
    """The module's own forward, in which `functional.linear` with its weight is the map."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _LinearThroughMap(module, maps[""]):
            return type(module).forward(module, *args, **kwargs)

    return forward


class _LinearThroughMap(TorchFunctionMode):
    """Calls a map wherever its weight, which may have been cast to another type, is multiplied with.

    What is called inside of the map is not looked at again.
    """

    def __init__(self, module: nn.Module, linear_map: Map) -> None:
        super().__init__()
        self._map, self._weights = linear_map, [module.weight]

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _CASTS and self._is_weight(args[0]):
            self._weights.append(func(*args, **options))
            return self._weights[-1]
        if func is functional.linear and self._is_weight(args[1]):
            return self._map(args[0])
        return func(*args, **options)

    def _is_weight(self, tensor: object) -> bool:
        return any(tensor is each for each in self._weights)
