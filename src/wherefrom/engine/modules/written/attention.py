"""`nn.MultiheadAttention`, which multiplies with its weights by functions: three projections are one parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.engine.modules.linear_map import LinearMap, Map, Part

Output = tuple[Tensor, Tensor | None]


def attention_maps(module: nn.Module) -> dict[str, LinearMap]:
    """The projections of queries, keys and values, `in_proj.q` and so on, and `out_proj`."""
    assert isinstance(module, nn.MultiheadAttention)
    size, maps = module.embed_dim, {}
    for number, name in enumerate("qkv"):
        rows = slice(number * size, (number + 1) * size)
        packed = module.in_proj_weight is not None
        weight = Part(module, "in_proj_weight", rows) if packed else Part(module, f"{name}_proj_weight")
        bias = None if module.in_proj_bias is None else Part(module, "in_proj_bias", rows)
        maps[f"in_proj.{name}"] = LinearMap(weight, bias)
    output_bias = None if module.out_proj.bias is None else Part(module.out_proj, "bias")
    return {**maps, "out_proj": LinearMap(Part(module.out_proj, "weight"), output_bias)}


def attention_forward(module: nn.Module, maps: Mapping[str, Map]) -> Callable[..., Output]:
    """The module's forward in evaluation mode; maps read [batch, tokens, features], however the module reads."""
    assert isinstance(module, nn.MultiheadAttention)

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Output:
        alone, turned = query.dim() == 2, query.dim() == 3 and not module.batch_first
        inputs = [each[None] if alone else each.transpose(0, 1) if turned else each for each in (query, key, value)]
        q, k, v = (maps[f"in_proj.{name}"](each) for name, each in zip("qkv", inputs, strict=True))
        if module.bias_k is not None and module.bias_v is not None:
            pairs = ((k, module.bias_k), (v, module.bias_v))
            k, v = (torch.cat([each, bias.expand(len(each), 1, -1)], 1) for each, bias in pairs)
        if module.add_zero_attn:
            k, v = (functional.pad(each, (0, 0, 0, 1)) for each in (k, v))
        # q: [batch, heads, tokens, features of a head]; k, v: [batch, heads, keys, features of a head]
        q, k, v = (each.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights  # otherwise attn_mask says it
        mask = None if causal else _added(key_padding_mask, attn_mask, q, k)
        if need_weights:
            logits = q * math.sqrt(1 / q.shape[-1]) @ k.transpose(2, 3)
            weights = (logits if mask is None else logits + mask).softmax(-1)  # [batch, heads, tokens, keys]
            mixed, weights = weights @ v, weights.mean(1) if average_attn_weights else weights
        else:
            mixed, weights = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal), None
        output = maps["out_proj"](mixed.transpose(1, 2).flatten(2))
        if alone:
            return output[0], None if weights is None else weights[0]
        return output.transpose(0, 1) if turned else output, weights

    return forward


def _added(padding: Tensor | None, mask: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """What masks add to the logits: broadcasts to [batch, heads, tokens, keys]; None without masks.

    Args:
        padding: of keys, [batch, keys] or [keys], true where there is none, or numbers to add.
        mask: of pairs, [tokens, keys] or [batch * heads, tokens, keys], likewise.
    """
    found = [] if padding is None else [padding.reshape(-1, 1, 1, padding.shape[-1])]
    if mask is not None:
        found.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, queries.shape[1])))
    numbers = [
        queries.new_zeros(each.shape).masked_fill_(each, -math.inf) if each.dtype == torch.bool else each.to(queries)
        for each in found
    ]
    # Keys that the module adds itself, the last, are seen by all.
    wide = [functional.pad(each, (0, keys.shape[2] - each.shape[-1])) for each in numbers]
    return wide[0] if len(wide) == 1 else wide[0] + wide[1] if wide else None
