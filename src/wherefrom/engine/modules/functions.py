"""Weights that functions use, outside of the modules that have them: no module sees that part of their gradient.

This module watches functions of torch; it does not know what is captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.runtime.errors import LayerError


@contextmanager
def watched_functions(model: nn.Module, layers: Iterable[TrackedLayer]) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Within it, functions are given another tensor for a tracked weight, outside of the modules that its layer knows.

    What is compiled by torch.compile is not looked into.

    Returns:
        What refuses a graph with one of these among its leaves. It raises a LayerError that names layer and function,
        such as `functional.linear(x, embedding.weight)`.
    """
    owned = dict[int, _Owned]()
    for layer in layers:
        for use in layer.uses:
            for part in use.parts:
                # One that is computed, as by weight normalisation, is another tensor at every look.
                if isinstance(part.parameter, nn.Parameter):
                    found = owned.setdefault(id(part.parameter), _Owned(part.parameter, layer.name))
                    found.modules.update([use.module] if use.owner is None else [use.module, use.owner.module])
    running, given = Counter[nn.Module](), list[_Given]()

    def refuse(leaves: Iterable[Tensor]) -> None:
        begun = set(map(id, leaves))
        for each in given:
            if id(each.leaf) in begun:
                raise LayerError(
                    f"The weight of layer {each.layer!r} is used by a function ({each.function}), outside of its "
                    "modules, and that part of its gradient is not seen. Leave the layer out with `layers=[...]`, or "
                    "have the model call a module that has this weight."
                )

    with ExitStack() as stack:
        if owned and not any(
            hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules()
        ):
            for module in {module for each in owned.values() for module in each.modules}:
                entering = module.register_forward_pre_hook(lambda one, _: running.update([one]))
                leaving = module.register_forward_hook(lambda one, *_: running.subtract([one]), always_call=True)
                stack.callback(entering.remove)
                stack.callback(leaving.remove)
            stack.enter_context(_Watched(owned, running, given))
        yield refuse


@dataclass
class _Owned:
    """Whose a weight is: a layer's name, and the modules that may use it. While it is here, no other has its id."""

    weight: Tensor
    layer: str
    modules: set[nn.Module] = field(default_factory=set)


class _Given(NamedTuple):
    """A tensor that a function was given for a layer's weight."""

    leaf: Tensor
    layer: str
    function: str


class _Watched(TorchFunctionMode):
    """Looks at every function that is called.

    Args:
        owned: by a weight's id.
        running: how many calls of a module have not returned.
        given: grows.
    """

    def __init__(self, owned: dict[int, _Owned], running: Counter[nn.Module], given: list[_Given]) -> None:
        super().__init__()
        self._owned, self._running, self._given = owned, running, given

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = args, kwargs or {}
        if torch.is_grad_enabled() and any(self._outside(each) for each in tree_leaves(arguments)):
            args, kwargs = tree_map(lambda each: self._for(each, func), arguments)
        return func(*args, **kwargs or {})

    def _outside(self, argument: object) -> bool:
        """Whether this is a tracked weight while none of its modules is running."""
        owned = self._owned.get(id(argument))
        return owned is not None and not any(self._running[module] for module in owned.modules)

    def _for(self, argument: Any, func: Callable[..., Any]) -> Any:
        if not self._outside(argument):
            return argument
        leaf = argument.detach().requires_grad_()
        self._given.append(_Given(leaf, self._owned[id(argument)].layer, resolve_name(func) or str(func)))
        return leaf
