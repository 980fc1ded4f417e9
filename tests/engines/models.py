"""Tiny random models whose sizes vLLM's CPU attention accepts: heads of 32 and more, hidden sizes of 128."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

EXPERTS = 8
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _glm4_moe() -> PreTrainedConfig:
    return Glm4MoeConfig(
        **_COMMON,
        **_EXPERTS,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )


def _qwen3_next() -> PreTrainedConfig:
    return Qwen3NextConfig(
        **_COMMON,
        **_EXPERTS,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )


def _deepseek_v3() -> PreTrainedConfig:
    # What hub configs say and transformers' class does not know, but vLLM needs.
    unknown: dict[str, Any] = {"topk_method": "noaux_tc", "num_nextn_predict_layers": 1}
    sizes = {k: v for k, v in _COMMON.items() if k != "head_dim"}
    return DeepseekV3Config(
        **{**sizes, "num_key_value_heads": 4},
        **_EXPERTS,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        **unknown,
    )


MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, num_experts=EXPERTS),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "glm4_moe": _glm4_moe,
    "qwen3_next": _qwen3_next,
    "deepseek_v3": _deepseek_v3,
    "qwen3": lambda: Qwen3Config(**_COMMON),
    "llama": lambda: LlamaConfig(**_COMMON),
}
DENSE = ("qwen3", "llama")
