"""Experts of transformers, each of whose projections is a linear map: a slice of a parameter of all experts.

Classes with the decorator `use_experts_implementation` compute by one formula, whatever implementation a model is set
to; it is here, and so are those of DBRX and Llama 4, which are written by hand. An expert multiplies with the vectors
that are routed to it, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.engine.modules.linear_map import LinearMap, Map, Part
from wherefrom.engine.routing import Routing

Maps = Mapping[str, Map]
_SETTINGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def of_another_form(module: nn.Module) -> str | None:
    """Why experts cannot be written out."""
    if not all(hasattr(module, name) for name in _SETTINGS):
        return "its experts are not those of transformers' `use_experts_implementation`"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    return None


def expert_maps(module: Any) -> dict[str, LinearMap]:
    """Both projections of every expert, such as `3.gate_up_proj`."""
    maps = {}
    for expert in range(len(module.down_proj)):
        for name in (_first(module), "down_proj"):
            bias = Part(module, f"{name}_bias", expert) if module.has_bias else None
            maps[f"{expert}.{name}"] = LinearMap(Part(module, name, expert), bias, transposed=module.is_transposed)
    return maps


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def expert_forward(module: Any, maps: Maps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The sum over a token's experts of weight * down(activation(up(x)))."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, features], with the experts int64 [tokens, k] of every token and their weights [tokens, k]."""
        routing, slots = _routed(top_k_index, len(maps) // 2)
        projected = _through(maps, _first(module), hidden_states[routing.tokens], routing)  # [vectors, ...]
        activated = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
        output = _placed(_through(maps, "down_proj", activated, routing), slots, top_k_index.numel())
        if module.has_post_expert_norm:  # which finds tokens where they were
            output = module.post_expert_norm(output)
        return _summed(output, top_k_weights).to(hidden_states.dtype)

    return forward


def dbrx_maps(module: Any) -> dict[str, LinearMap]:
    """The three projections of every expert of a `DbrxExperts`, such as `3.w1`."""
    width = module.ffn_hidden_size
    return {
        f"{expert}.{name}": LinearMap(
            Part(module.mlp, name, slice(expert * width, (expert + 1) * width)), transposed=name == "w2"
        )
        for expert in range(module.num_experts)
        for name in ("w1", "v1", "w2")
    }


def dbrx_forward(module: Any, maps: Maps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The sum over a token's experts of weight * w2(activation(w1(x)) * v1(x))."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing, slots = _routed(top_k_index, module.num_experts)
        vectors = hidden_states.reshape(-1, module.hidden_size)[routing.tokens]
        gate, up = (_through(maps, name, vectors, routing) for name in ("w1", "v1"))
        output = _through(maps, "w2", module.mlp.activation_fn(gate) * up, routing)
        return _summed(_placed(output, slots, top_k_index.numel()), top_k_weights).view_as(hidden_states)

    return forward


def llama4_maps(module: Any) -> dict[str, LinearMap]:
    """Both projections of every expert of a `Llama4TextExperts`, such as `3.gate_up_proj`."""
    return {
        f"{expert}.{name}": LinearMap(Part(module, name, expert), transposed=True)
        for expert in range(module.num_experts)
        for name in ("gate_up_proj", "down_proj")
    }


def llama4_forward(module: Any, maps: Maps) -> Callable[[Tensor], Tensor]:
    """down(up * activation(gate)) of every token for every expert, which are zeros where it was not chosen."""

    def forward(hidden_states: Tensor) -> Tensor:
        """[experts * tokens, features] to the same."""
        tokens = len(hidden_states) // module.num_experts
        slots, sizes = torch.arange(len(hidden_states), device=hidden_states.device), [tokens] * module.num_experts
        if not hidden_states.is_meta:
            slots = hidden_states.detach().any(1).nonzero().squeeze(1)
            sizes = torch.bincount(slots // tokens, minlength=module.num_experts).tolist()
        routing = Routing(slots % tokens, sizes, tokens)
        gate, up = _through(maps, "gate_up_proj", hidden_states[slots], routing).chunk(2, dim=-1)
        output = _through(maps, "down_proj", up * module.act_fn(gate), routing)
        return _placed(output, slots, len(hidden_states))

    return forward


def _routed(chosen: Tensor, experts: int) -> tuple[Routing, Tensor]:
    """Who gets what, and the place in [tokens * k] of each vector; numbers past the last expert stand for none."""
    ascending, slots = chosen.flatten().sort(stable=True)
    if chosen.is_meta:  # nobody knows; as many for each expert
        sizes = [len(part) for part in slots.tensor_split(experts)]
    else:
        sizes = torch.bincount(ascending, minlength=experts)[:experts].tolist()
    slots = slots[: sum(sizes)]
    return Routing(slots // chosen.shape[1], sizes, len(chosen)), slots


def _through(maps: Maps, name: str, vectors: Tensor, routing: Routing) -> Tensor:
    """A projection of every vector by its expert, [vectors, ...], expert after expert."""
    shares = enumerate(vectors.split(routing.sizes))
    return torch.cat([maps[f"{expert}.{name}"](share, routing, expert) for expert, share in shares if len(share)])


def _placed(vectors: Tensor, slots: Tensor, count: int) -> Tensor:
    """Vectors back at their places in [count, ...], and zeros elsewhere."""
    return vectors.new_zeros(count, *vectors.shape[1:]).index_copy(0, slots, vectors)


def _summed(vectors: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over k of [tokens * k, features], with weights [tokens, k]."""
    return (vectors * weights.reshape(-1, 1)).view(*weights.shape, -1).sum(1)
