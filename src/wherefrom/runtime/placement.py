"""Where a model's weights are: on one device, on several, or brought by accelerate only while a module computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from wherefrom.runtime.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def execution_device(module: nn.Module) -> torch.device:
    """Where a module, or the first part of it, computes; its weights may be elsewhere between calls."""
    for each in module.modules():
        hook = getattr(each, "_hf_hook", None)
        for inner in getattr(hook, "hooks", (hook,)):
            device = getattr(inner, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def is_sharded_tensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether a tensor's numbers are spread over processes.

    Importing what PyTorch shards with takes a second, and no tensor is sharded before somebody has imported it.
    """
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def is_sharded_module(module: nn.Module) -> bool:
    """Whether `fully_shard` has spread a module's weights over processes."""
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def read_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model's `state_dict`, brought from where accelerate keeps it; refuses one that has no values."""
    if not tensor.is_meta:
        return tensor
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    with ExitStack() as stack:
        if hasattr(module, "_hf_hook"):
            from accelerate.utils import align_module_device  # noqa: PLC0415  (an optional package)

            stack.enter_context(align_module_device(module))
        found = getattr(module, attribute)
        assert isinstance(found, Tensor)
        if found.is_meta:
            raise InputError(f"model: {name!r} is on the meta device and has no values. Load the weights first.")
        return found.detach().clone()


def computed_by(module: nn.Module) -> str:
    """The attribute that computes: accelerate's hooks, which bring a module's weights, call another than `forward`."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


@contextmanager
def computes_by(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, a module computes by another `forward`; it is put back as it was."""
    name, own = computed_by(module), vars(module)  # past PyTorch's setattr, to which a module would be a part
    before = own.get(name)
    own[name] = forward
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of weights that are another one, as transformers knows them: offloading makes two tensors of one."""
    found = {}
    for prefix, module in model.named_modules():
        names = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(names, dict):
            names = _tied_to_embeddings(module)
        start = f"{prefix}." if prefix else ""
        found.update({start + name: start + other for name, other in names.items()})
    return found


def _tied_to_embeddings(model: Any) -> dict[str, str]:
    """Names of weights that are the input embeddings', as transformers 4 has it: a list, which also names other ties.

    Those others, of biases, have other shapes.
    """
    names = getattr(model, "_tied_weights_keys", None)
    if not names or not getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", True):
        return {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    shared = getattr(model.get_input_embeddings(), "weight", None)
    own = next((name for name, weight in weights.items() if weight is shared), None)
    if own is None:
        return {}
    tied = (name for name in names if name in weights and weights[name].shape == weights[own].shape)
    return {name: own for name in tied if name != own}
