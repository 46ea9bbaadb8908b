"""torch.compile for activation functions, which a library's model computes in many passes over memory.

Only modules without weights and without parts are compiled: whatever holds a tracked layer must keep its hooks, and
products and normalisations are fast as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
    parts = (module.children(), module.parameters(), module.buffers())
    plain = not any(any(True for _ in each) for each in parts) and "forward" not in vars(module)
    return plain and not isinstance(module, nn.Dropout | nn.Identity) and not getattr(module, "inplace", False)
