"""Adapters of peft that are parameters, which it multiplies with itself: written out in maps that hooks can see.

Each `..._forward` computes what the module's own does with the adapters that are active, unmerged and not switched off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wherefrom.engine.modules.linear_map import LinearMap, Lookup, Map, Part, Scaling

Maps = Mapping[str, Map]


def without_own_products(module: Any) -> str | None:
    """Why adapters cannot be written out."""
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return "its adapters are merged or switched off"
    variants = getattr(module, "lora_variant", {})
    return f"its adapters are of the variant {next(iter(variants.values()))}" if variants else None


def _unless_off(module: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The module without adapters where a loss has switched them off, such as for its reference."""

    def either(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (module.base_layer if module.disable_adapters else forward)(inputs, *args, **kwargs)

    return either


def _active(module: Any, parameters: str) -> list[str]:
    return [name for name in module.active_adapters if name in getattr(module, parameters)]


def ia3_maps(module: Any) -> dict[str, Map]:
    """(IA)^3: one number for each input or output (Liu et al. 2022)."""
    return {f"ia3_l.{name}": Scaling(Part(module.ia3_l, name)) for name in _active(module, "ia3_l")}


def ia3_forward(module: Any, maps: Maps) -> Callable[..., Tensor]:
    """W (l * x) of a feedforward layer, and l * (W x) of others."""

    def scaled(vectors: Tensor) -> Tensor:
        for each in maps.values():
            vectors = each(vectors).to(vectors.dtype)
        return vectors

    def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = scaled(inputs) if module.is_feedforward else inputs
        output: Tensor = module.base_layer(inputs, *args, **kwargs)
        return output if module.is_feedforward else scaled(output)

    return _unless_off(module, forward)


def adalora_maps(module: Any) -> dict[str, Map]:
    """AdaLoRA: three factors, like those of a singular value decomposition (Zhang et al. 2023)."""
    kinds = {"lora_A": LinearMap, "lora_E": Scaling, "lora_B": LinearMap}
    return {
        f"{factor}.{name}": kind(Part(getattr(module, factor), name))
        for name in _active(module, "lora_A")
        for factor, kind in kinds.items()
    }


def adalora_forward(module: Any, maps: Maps) -> Callable[..., Tensor]:
    """W x + scaling / rank * B (E * (A x))."""

    def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = module.base_layer(inputs, *args, **kwargs)
        for name in _active(module, "lora_A"):
            vectors = inputs.to(module.lora_A[name].dtype)
            for factor in ("lora_A", "lora_E", "lora_B"):
                vectors = maps[f"{factor}.{name}"](vectors)
            output = output + vectors * (module.scaling[name] / (module.ranknum[name] + 1e-5)).to(output.dtype)
        return output

    return _unless_off(module, forward)


def embedding_maps(module: Any) -> dict[str, Map]:
    """LoRA of an embedding: a table of few features, and a linear map."""
    padding = module.get_base_layer().padding_idx
    maps: dict[str, Map] = {}
    for name in _active(module, "lora_embedding_A"):
        maps[f"lora_embedding_A.{name}"] = Lookup(Part(module.lora_embedding_A, name), padding)
        maps[f"lora_embedding_B.{name}"] = LinearMap(Part(module.lora_embedding_B, name))
    return maps


def embedding_forward(module: Any, maps: Maps) -> Callable[..., Tensor]:
    """W[x] + scaling * B A[x]."""

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = module.base_layer(ids, *args, **kwargs)
        factor = getattr(module.get_base_layer(), "embed_scale", None)  # of embeddings that scale what they give
        for name in _active(module, "lora_embedding_A"):
            added = maps[f"lora_embedding_B.{name}"](maps[f"lora_embedding_A.{name}"](ids)) * module.scaling[name]
            output = output + (added if factor is None else added * factor).to(output.dtype)
        return output

    return _unless_off(module, forward)


def magnitude_maps(module: Any) -> dict[str, Map]:
    """DoRA: the length of each row of the adapted matrix (Liu et al. 2024)."""
    return {"": Scaling(Part(module, "weight"))}


def magnitude_forward(module: Any, maps: Maps) -> Callable[..., Tensor]:
    """m * (W x + scaling * B A x) / |W + scaling * B A| - W x, with a length that is taken as a constant."""

    def forward(inputs: Tensor, **given: Any) -> Tensor:
        first, second, base_layer, output = (given[name] for name in ("lora_A", "lora_B", "base_layer", "base_result"))
        with torch.no_grad():
            weight = sys.modules["peft.utils.integrations"].dequantize_module_weight(base_layer).to(inputs.dtype)
            length = module.get_weight_norm(weight, (second.weight @ first.weight).to(inputs.dtype), given["scaling"])
        if output is None:
            output = inputs @ (weight if module.fan_in_fan_out else weight.T)
        elif base_layer.bias is not None:
            output = output - base_layer.bias
        result: Tensor = maps[""]((output + second(first(inputs)) * given["scaling"]) / length) - output
        return result

    return forward
