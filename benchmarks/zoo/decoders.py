"""Causal language models of transformers."""

from __future__ import annotations

from typing import Any

import wherefrom as wf
from zoo.examples import texts
from zoo.family import EXPERTS, GROUPED, SIZES, Family, OfTransformers, Settings


def causal(name: str, kind: str, base: Settings = GROUPED, large: Settings | None = None, **settings: Any) -> Family:
    """A causal language model.

    Args:
        large: settings of its usual size that transformers does not have by default.
        settings: of the tiny one, besides the base.
    """
    usual = OfTransformers(kind, large or {})
    return Family(name, OfTransformers(kind, {**base, **settings}), wf.CausalLM, texts, usual)


_FOUR_BILLION = {"head_dim": 128}
_LATENT: Settings = {
    **SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2, "q_lora_rank": 4, "kv_lora_rank": 4,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "experts_implementation": "eager",
}  # fmt: skip
_DELTA: Settings = {
    **EXPERTS, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
_STATES: Settings = {
    **GROUPED, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}  # fmt: skip

_DBRX: Settings = {
    "d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 32, "vocab_size": 24, "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}, "experts_implementation": "eager",
    "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
}  # fmt: skip
_LARGE_DBRX: Settings = {
    "d_model": 6144, "n_heads": 48, "n_layers": 40, "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip

DENSE = (
    causal("Llama", "LlamaForCausalLM"),
    causal("Mistral", "MistralForCausalLM"),
    causal("Ministral", "MinistralForCausalLM", large=_FOUR_BILLION),
    causal("Ministral 3", "Ministral3ForCausalLM"),
    causal("Qwen2, Qwen2.5", "Qwen2ForCausalLM"),
    causal("Qwen3", "Qwen3ForCausalLM"),
    causal("Gemma", "GemmaForCausalLM"),
    causal("Gemma 2", "Gemma2ForCausalLM"),
    causal("Gemma 3", "Gemma3ForCausalLM"),
    causal("Gemma 3n", "Gemma3nForCausalLM", num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"],
           num_kv_shared_layers=0, hidden_size_per_layer_input=4, vocab_size_per_layer_input=24, laurel_rank=4,
           activation_sparsity_pattern=[0.5, 0.0], altup_num_inputs=2),
    causal("Gemma 4", "Gemma4ForCausalLM", layer_types=["full_attention"], global_head_dim=4,
           hidden_size_per_layer_input=4, vocab_size_per_layer_input=24, num_kv_shared_layers=0),
    causal("Phi", "PhiForCausalLM"),
    causal("Phi-3, Phi-4", "Phi3ForCausalLM"),
    causal("OLMo", "OlmoForCausalLM"),
    causal("OLMo 2", "Olmo2ForCausalLM"),
    causal("OLMo 3", "Olmo3ForCausalLM"),
    causal("GPT-2", "GPT2LMHeadModel"),
    causal("GPT-NeoX, Pythia", "GPTNeoXForCausalLM"),
    causal("GPT-J", "GPTJForCausalLM", SIZES, rotary_dim=4),
    causal("GPT-Neo", "GPTNeoForCausalLM", SIZES, num_hidden_layers=2, attention_types=[[["global", "local"], 1]]),
    causal("GPT-BigCode, StarCoder", "GPTBigCodeForCausalLM", SIZES),
    causal("CodeGen", "CodeGenForCausalLM", SIZES, num_attention_heads=4, rotary_dim=2),
    causal("Falcon", "FalconForCausalLM", SIZES),
    causal("BLOOM", "BloomForCausalLM", SIZES, {"hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    causal("MPT", "MptForCausalLM", SIZES),
    causal("OPT", "OPTForCausalLM", SIZES, ffn_dim=12, word_embed_proj_dim=8),
    causal("BioGPT", "BioGptForCausalLM", SIZES),
    causal("CTRL", "CTRLLMHeadModel", SIZES, dff=12),
    causal("Granite", "GraniteForCausalLM"),
    causal("SmolLM3", "SmolLM3ForCausalLM"),
    causal("StableLM", "StableLmForCausalLM"),
    causal("StarCoder2", "Starcoder2ForCausalLM"),
    causal("Command R (Cohere)", "CohereForCausalLM"),
    causal("Command R7B (Cohere2)", "Cohere2ForCausalLM"),
    causal("Nemotron", "NemotronForCausalLM", large={"num_key_value_heads": 8}),
    causal("GLM-4", "Glm4ForCausalLM"),
    causal("Exaone 4", "Exaone4ForCausalLM"),
    causal("Hunyuan", "HunYuanDenseV1ForCausalLM", large=_FOUR_BILLION),
    causal("ERNIE 4.5", "Ernie4_5ForCausalLM"),
    causal("Seed-OSS", "SeedOssForCausalLM"),
    causal("Apertus", "ApertusForCausalLM"),
    causal("Persimmon", "PersimmonForCausalLM", SIZES),
    causal("BitNet", "BitNetForCausalLM"),
)  # fmt: skip

MIXTURES = (
    causal("Mixtral", "MixtralForCausalLM", EXPERTS),
    causal("Llama 4", "Llama4ForCausalLM", EXPERTS, intermediate_size_mlp=12, num_experts_per_tok=1),
    causal("Qwen2-MoE", "Qwen2MoeForCausalLM", EXPERTS, shared_expert_intermediate_size=6),
    causal("Qwen3-MoE", "Qwen3MoeForCausalLM", EXPERTS),
    causal("OLMoE", "OlmoeForCausalLM", EXPERTS),
    causal("gpt-oss", "GptOssForCausalLM", EXPERTS),
    causal("DeepSeek-V2", "DeepseekV2ForCausalLM", _LATENT),
    causal("DeepSeek-V3, R1", "DeepseekV3ForCausalLM", _LATENT, n_group=2, topk_group=1),
    causal("GLM-4.5", "Glm4MoeForCausalLM", EXPERTS, num_hidden_layers=2, n_routed_experts=4, first_k_dense_replace=1,
           n_group=1, topk_group=1),
    causal("GraniteMoE", "GraniteMoeForCausalLM", EXPERTS),
    causal("Phi-3.5-MoE", "PhimoeForCausalLM", EXPERTS),
    causal("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    causal("MiniMax", "MiniMaxForCausalLM", EXPERTS, layer_types=["linear_attention"], block_size=4),
    causal("DBRX", "DbrxForCausalLM", _DBRX, _LARGE_DBRX),
    causal("JetMoE", "JetMoeForCausalLM", SIZES, kv_channels=4, num_key_value_heads=1, num_local_experts=4,
           num_experts_per_tok=2),
)  # fmt: skip

RECURRENT = (
    causal("Mamba", "MambaForCausalLM", SIZES, state_size=4),
    causal("Falcon Mamba", "FalconMambaForCausalLM", SIZES, state_size=4),
    causal("Mamba-2", "Mamba2ForCausalLM", SIZES, head_dim=4, num_heads=4, state_size=4, n_groups=1, chunk_size=4),
    causal("Jamba", "JambaForCausalLM", EXPERTS, num_hidden_layers=2, attn_layer_offset=1, attn_layer_period=2,
           expert_layer_period=2, mamba_d_state=4, use_mamba_kernels=False, mamba_dt_rank=2),
    causal("Zamba2", "Zamba2ForCausalLM", SIZES, num_hidden_layers=2, layers_block_type=["mamba", "hybrid"],
           num_mem_blocks=1, mamba_d_state=4, n_mamba_heads=4, mamba_headdim=4, mamba_ngroups=1, chunk_size=4,
           num_key_value_heads=2, attention_head_dim=8, adapter_rank=2),
    causal("Bamba", "BambaForCausalLM", _STATES, attn_layer_indices=[1]),
    causal("Falcon-H1", "FalconH1ForCausalLM", _STATES, num_hidden_layers=1, mamba_d_ssm=8, mamba_n_heads=2),
    causal("Nemotron-H", "NemotronHForCausalLM", EXPERTS, num_hidden_layers=2, layers_block_type=["mamba", "attention"],
           mamba_num_heads=2, mamba_head_dim=4, ssm_state_size=4, n_groups=1, chunk_size=4),
    causal("LFM2", "Lfm2ForCausalLM", num_hidden_layers=2, layer_types=["conv", "full_attention"], block_ff_dim=12,
           block_auto_adjust_ff_dim=False),
    causal("Qwen3-Next", "Qwen3NextForCausalLM", _DELTA, shared_expert_intermediate_size=6),
    causal("Qwen3.5", "Qwen3_5ForCausalLM", _DELTA),
    causal("RecurrentGemma", "RecurrentGemmaForCausalLM", num_hidden_layers=2, block_types=["recurrent", "attention"],
           lru_width=8, attention_window_size=4),
    causal("RWKV", "RwkvForCausalLM", SIZES, num_hidden_layers=2, attention_hidden_size=8),
    causal("xLSTM", "xLSTMForCausalLM", SIZES, num_heads=2, qk_dim_factor=1.0, v_dim_factor=1.0,
           chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native",
           step_kernel="native", mode="train", chunk_size=1, autocast_kernel_dtype="float32",
           mlstm_round_up_to_multiple_of=1, ffn_round_up_to_multiple_of=1),
)  # fmt: skip
