"""Mixtures of experts of a few weights, and gpt-oss's written the long way, of linear layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 16, "intermediate_size": 6,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_SMALL: dict[str, Any] = {"moe_intermediate_size": 6, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "qwen3": ("Qwen3MoeConfig", {"num_experts": 5, "moe_intermediate_size": 6, "norm_topk_prob": True}),
    "qwen2": ("Qwen2MoeConfig", {"num_experts": 5, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 6}),
    "olmoe": ("OlmoeConfig", {"num_experts": 5}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 5, "sliding_window": 8}),
    "deepseek": (
        "DeepseekV3Config",
        {
            **_SMALL, "first_k_dense_replace": 0, "n_shared_experts": 1, "q_lora_rank": 4, "kv_lora_rank": 4,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 6, "interleave_moe_layer_step": 1},
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 16,
            "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 6, "hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "nemotron": (
        "NemotronHConfig",
        {**_SMALL, "layers_block_type": ["moe"], "moe_shared_expert_intermediate_size": 6, "n_group": 1},
    ),
}  # fmt: skip
"""Configurations of transformers by name: gated or not, with biases, transposed, shared experts, biased choices."""


def mixture(family: str, dtype: torch.dtype = torch.float64, **changed: Any) -> Any:
    """A model with one layer, which computes as transformers' eager implementation does."""
    import transformers  # slow to import, and not every test needs it

    torch.manual_seed(0)
    kind, own = FAMILIES[family]
    config = getattr(transformers, kind)(**{**_COMMON, **own, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.dim() > 1 or "bias" in name:
                each.normal_(0, 0.4)
    nn.Module.to(model, dtype)
    return model.eval()


class LongMixture(nn.Module):
    """gpt-oss's mixture as linear layers, under the names that experts and router have as layers.

    Args:
        masked: every expert reads every token, and what it was not chosen for counts nothing; otherwise it reads those
            tokens that have chosen it.
    """

    def __init__(self, block: Any, masked: bool) -> None:
        super().__init__()
        self.router = _linear(block.router.weight, block.router.bias)
        own, self.masked, self.k = block.experts, masked, block.router.top_k
        self.alpha, self.limit = own.alpha, own.limit
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: _linear(getattr(own, name)[expert].T, getattr(own, f"{name}_bias")[expert])
                    for name in ("gate_up_proj", "down_proj")
                }
            )
            for expert in range(own.num_experts)
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        flat = hidden.flatten(0, 1)
        highest, chosen = self.router(flat).topk(self.k, -1)
        weights, total = highest.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine: Any = expert
            rows = torch.arange(len(flat)) if self.masked else (chosen == number).any(-1).nonzero().squeeze(1)
            gate, up = mine["gate_up_proj"](flat[rows]).unflatten(-1, (-1, 2)).unbind(-1)
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            output = mine["down_proj"]((up + 1) * gate * torch.sigmoid(self.alpha * gate))
            share = (weights * (chosen == number)).sum(-1)[rows]
            total = total.index_add(0, rows, output * share.unsqueeze(-1))
        return total.view_as(hidden), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    made.weight, made.bias = (nn.Parameter(each.detach().clone()) for each in (weight, bias))
    return made


def written_long(model: Any, masked: bool = False) -> Any:
    """A copy of a gpt-oss model with mixtures that are written the long way."""
    found = copy.deepcopy(model)
    for layer in found.model.layers:
        layer.mlp = LongMixture(layer.mlp, masked)
    return found
