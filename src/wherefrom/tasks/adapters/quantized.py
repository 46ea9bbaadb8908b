"""Weights of few bits, which training leaves alone: what they stand for, and how layers multiply with them here.

This module knows how weights are stored; it knows nothing of adapters or of which layers are tracked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.runtime.placement import computes_by

Weight = Callable[[torch.dtype], Tensor]

_LIBRARIES = {"bitsandbytes", "torchao"}
# What libraries call the integers that they make weights of.
_NAMES = ("weight", "qweight", "W_q")


def stored_as(module: nn.Module) -> str | None:
    """The type of a module's numbers where they are a quantized weight; None of other modules."""
    for name in _NAMES:
        weight = getattr(module, name, None)
        if isinstance(weight, Tensor) and (
            not weight.is_floating_point() or weight.dtype.itemsize == 1 or _is_of("torchao", weight)
        ):
            kind = type(weight).__name__
            return kind if kind not in {"Tensor", "Parameter"} else str(weight.dtype).removeprefix("torch.")
    return None


def _is_of(library: str, weight: Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == library


@contextmanager
def multiplying_dequantized(model: nn.Module) -> Iterator[None]:
    """Within it, layers of bitsandbytes and torchao multiply with the numbers that their weights stand for.

    Their own products would not do. In evaluation, some CPUs have 4-bit layers rewrite their weights, whose products
    then have no gradient; 8-bit layers also round what they read, but for columns that the whole batch decides on, or
    without a gradient; and few can be differentiated forwards.
    """
    with ExitStack() as stack:
        # Without these libraries no weight is theirs, and no module need be looked at.
        for module in model.modules() if _LIBRARIES & sys.modules.keys() else ():
            weight = _weight_of(module) if isinstance(module, nn.Linear) else None
            if weight is not None:
                stack.enter_context(computes_by(module, partial(_multiplied, module, weight)))
        yield


def _weight_of(module: Any) -> Callable[[], Weight] | None:
    """What makes the weight [outputs, inputs] of a layer; None of one that is not quantized, or multiplies as it is."""
    if _is_of("bitsandbytes", module.weight):
        if getattr(module.weight, "quant_state", None) is not None:
            return partial(_of_4_bits, module)
        return partial(_of_8_bits, module) if module.weight.dtype == torch.int8 else None
    return partial(_of_torchao, module) if type(module) is nn.Linear and _is_of("torchao", module.weight) else None


def _of_4_bits(module: Any) -> Weight:
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        module.state_dict()  # which undoes what an evaluation has rewritten
    stored, state = module.weight.data, module.weight.quant_state
    dequantize = sys.modules["bitsandbytes"].functional.dequantize_4bit
    return lambda dtype: dequantize(stored, state).to(dtype)


def _of_8_bits(module: Any) -> Weight:
    stored, largest = module.weight.data, module.weight.SCB if module.state.SCB is None else module.state.SCB
    return lambda dtype: stored.to(dtype) * (largest / 127).to(dtype).unsqueeze(1)


def _of_torchao(module: Any) -> Weight:
    stored = module.weight.detach()
    return lambda dtype: stored.dequantize().to(dtype)


def _multiplied(module: Any, weight: Callable[[], Weight], inputs: Tensor) -> Tensor:
    output: Tensor = _Product.apply(inputs, weight())  # type: ignore[no-untyped-call]
    return output if module.bias is None else output + module.bias.to(output.dtype)


class _Product(torch.autograd.Function):
    """x W^T, whose W is made anew wherever it is needed, and never kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, weight: Weight) -> Tensor:
        output: Tensor = inputs @ weight(inputs.dtype).T
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Weight], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight(gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, weight: None) -> Tensor:
        moved: Tensor = tangent @ ctx.weight(tangent.dtype).T
        return moved
