"""torch.compile where a library's code makes many passes over memory: activation functions, and work on logits.

Of a model, only modules without weights and without parts are compiled: whatever holds a tracked layer must keep its
hooks, and products and normalisations are fast as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import first_line
from wherefrom.runtime.memory import out_of_memory

logger = logging.getLogger("wherefrom")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

# A dozen passes over fewer numbers take a GPU half a millisecond, and compiling takes seconds.
_WORTH_COMPILING = 2**24


class CompiledOnGPU(Generic[_Parameters, _Result]):
    """Decorates a function of tensors [n, ...]: compiled where the first is a large one on a GPU, as it is elsewhere.

    If compiling fails, the function runs as it is from then on.
    """

    def __init__(self, function: Callable[_Parameters, _Result]) -> None:
        self.function = function
        self._failed = False

    def __call__(self, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if not self._failed and _worth_compiling(args[0]):
            try:
                return self.compiled(*args, **kwargs)
            except Exception as error:
                if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
                    raise
                self._failed = True
                reason = first_line(error) or type(error).__name__
                logger.warning("%s runs without torch.compile, which failed: %s", self.function.__qualname__, reason)
        return self.function(*args, **kwargs)

    def compiled(self, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        """The result by compiled code, of which there is one piece for every n."""
        for each in args:
            if isinstance(each, Tensor):
                torch._dynamo.mark_dynamic(each, 0)
        return self._compiled(*args, **kwargs)

    @cached_property
    def _compiled(self) -> Callable[_Parameters, _Result]:
        return torch.compile(self.function, dynamic=False)  # all sizes but n are of the code


def _worth_compiling(tensor: object) -> bool:
    # Tensors without values, such as those of a plan, are of another type; a size of 1 would be compiled for anew.
    return type(tensor) is Tensor and tensor.is_cuda and len(tensor) > 1 and tensor.numel() >= _WORTH_COMPILING


@contextmanager
def compiled_activations(model: nn.Module) -> Iterator[None]:
    """Within it, activation functions run compiled; the model is handed back as it was found."""
    chosen = [module for module in model.modules() if _is_activation(module)]
    try:
        for module in chosen:
            # One piece of code for every size of batch.
            module.forward = torch.compile(module.forward, dynamic=True)
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)


def _is_activation(module: nn.Module) -> bool:
    parts = [*module.children(), *module.parameters(), *module.buffers()]
    plain = not parts and "forward" not in vars(module)
    return plain and not isinstance(module, nn.Dropout | nn.Identity) and not getattr(module, "inplace", False)
