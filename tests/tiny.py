"""Tiny random models of every family that the installed transformers can build.

A family's default config is shrunk field by field, by what the fields mean: rules first, a small table of
exceptions last. Every dimension is a multiple of 16, every kind of layer stays, experts are 8 of which 2
are used, windows and chunks are shorter than the texts they are run on. Special tokens get ids from
`SPECIAL` up, so ids below it are text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.families import with_outliers

HIDDEN, INTERMEDIATE, EXPERT_INTERMEDIATE, HEAD = 64, 96, 32, 16
HEADS, KV_HEADS, EXPERTS, VOCABULARY, SPECIAL = 4, 2, 8, 160, 128
WINDOW = 8

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model type and the class that its checkpoints are loaded with."""

    model_type: str
    architecture: str
    causal: bool

    @property
    def name(self) -> str:
        """The model type; for a multimodal class of its own, with the class."""
        return self.model_type if self.causal else f"{self.model_type}/{self.architecture}"


def families() -> list[Family]:
    """Every causal language model of the installed transformers, then every multimodal class around one."""
    causal = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multimodal = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found = [Family(kind, name, True) for kind, name in causal.items()]
    found += [Family(k, name, False) for k, name in multimodal.items() if causal.get(k) != name]
    return found


def tiny_config(family: Family, repeat: int = 1) -> PreTrainedConfig:
    """The family's default config, shrunk; `repeat` layers of each kind that it keeps."""
    kind: Any = CONFIG_MAPPING[family.model_type]
    parts = {name: CONFIG_MAPPING[part]() for name, part in PARTS.get(family.model_type, {}).items()}
    plain = _shrink(kind(**parts), repeat)
    for path, value in EXCEPTIONS.get(family.model_type, {}).items():
        *parents, leaf = path.split(".")
        inner = plain
        for parent in parents:
            inner = inner[parent]
        inner[leaf] = value
    if family.causal and plain.get("is_decoder") is False:
        plain["is_decoder"] = True
    config: PreTrainedConfig = kind(**plain)
    return config


def tiny_model(family: Family, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode: small normal weights with outliers, norms near 1, corrections near 0."""
    config = tiny_config(family)
    if family.causal:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = getattr(transformers, family.architecture)._from_config(config, dtype=dtype)
    fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random values for each parameter, and for the persistent biases among the buffers."""
    outputs = model.get_output_embeddings()
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if outputs is not None and parameter is outputs.weight:
            parameter.copy_(0.2 * noise)
        elif id(parameter) in embeddings:
            parameter.copy_(0.6 * noise)
        elif parameter.dim() < 2:
            parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
        else:
            parameter.copy_(0.4 * with_outliers(noise, generator))
    for name in _persistent_biases(model):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # float32, as the hub stores router corrections
        module._buffers[leaf] = 0.1 * torch.randn(module.get_buffer(leaf).shape, generator=generator)


def text_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids int64 [batch, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SPECIAL, (batch, length), generator=generator)


def _persistent_biases(model: PreTrainedModel) -> list[str]:
    stored = model.state_dict()
    return [
        name
        for name, buffer in model.named_buffers()
        if name in stored and buffer.is_floating_point() and name.endswith("bias")
    ]


def _shrink(config: PreTrainedConfig, repeat: int = 1) -> Json:
    """One (sub-)config as plain data: lists by layer cut to the layers kept, then each field by its rule."""
    plain = {k: v for k, v in config.to_dict().items() if k not in _COMMON or k == "model_type"}
    depth = next((v for n, v in plain.items() if DEPTH.fullmatch(n) and isinstance(v, int)), 0)
    kept = sorted(_layers_kept(plain, depth) * repeat)
    made: Json = {}
    for name, value in plain.items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            made[name] = _shrink(inner, repeat)
        elif value is None:
            made[name] = MISSING.get(name)
        elif name.startswith("rope_") and isinstance(value, dict):
            sections = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
            made[name] = _rope(value, sections)
        elif FIRST_DENSE.fullmatch(name):
            made[name] = 1
        elif SHARED_KV.fullmatch(name):
            made[name] = sum(i >= depth - value for i in kept)
        elif DEPTH.fullmatch(name) and isinstance(value, int):
            made[name] = len(kept) if value == depth else min(value, 2)
        elif _is_indices(value, depth):
            made[name] = type(value)([n for n, i in enumerate(kept) if i in value] or [len(kept) - 1])
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            made[name] = [_size(name, value[i], plain) for i in kept]
        elif name == "per_layer_config":
            layers = {int(i): {k: _size(k, v, plain) for k, v in own.items()} for i, own in value.items()}
            made[name] = {n: layers[i] for n, i in enumerate(kept) if i in layers}
        elif isinstance(value, (list, tuple)):
            made[name] = type(value)(_size(name, v, plain) for v in value)
        elif isinstance(value, dict):
            made[name] = {k: _size(str(k), v, plain) for k, v in value.items()}
        else:
            made[name] = _size(name, value, plain)
    if "sliding" in str(made.get("layer_types")) and made.get("sliding_window", 0) is None:
        made["sliding_window"] = WINDOW
    _number_tokens(made)
    return made


# Bookkeeping that every config has.
_COMMON = frozenset(PreTrainedConfig().to_dict())
DEPTH = re.compile(
    r"(num|n|encoder|decoder|conf_num|num_decoder|num_encoder|resampler)?_?"
    r"(hidden_layers|layers?|depth|blocks|layers_per_stack)"
)
FIRST_DENSE = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")
SHARED_KV = re.compile(r"num_kv_shared_layers")
# Fields that a default config may leave empty although the model reads them.
MISSING: Mapping[str, int] = {
    "head_dim": HEAD,
    "num_key_value_heads": KV_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}


def _is_indices(value: Any, depth: int) -> bool:
    """Whether a list holds numbers of layers: increasing integers below the depth."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(v) is int for v in value):
        return False
    return all(a < b for a, b in itertools.pairwise(value)) and value[0] >= 0 and value[-1] < depth


def _layers_kept(plain: Json, depth: int) -> list[int]:
    """The first layer of each kind, and one more where that leaves few.

    A kind is what lists by layer and lists of layers say of it, whether it is one of the first, dense ones,
    and whether it is one of the last, which reuse keys and values.
    """
    dense = next((plain[n] for n in plain if FIRST_DENSE.fullmatch(n)), None)
    shared = next((plain[n] for n in plain if SHARED_KV.fullmatch(n)), None) or 0
    lists = [v for v in plain.values() if isinstance(v, (list, tuple)) and v]
    indices = [v for v in lists if _is_indices(v, depth)]
    by_layer = [v for v in lists if len(v) == depth and v not in indices]
    kinds = [
        (
            dense is not None and i < max(dense, 1),
            i >= depth - shared,
            *(i in v for v in indices),
            *(str(v[i]) for v in by_layer),
        )
        for i in range(depth)
    ]
    kept = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    if 0 < len(kept) < 4:
        kept += [i for i, kind in enumerate(kinds) if i not in kept and kind == kinds[kept[-1]]][:1]
    return sorted(kept)


def _size(name: str, value: Any, plain: Json) -> Any:
    """A number shrunk by the first rule that knows its field; anything else as it is."""
    if type(value) is not int or value <= 0:
        return value
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value, plain) if callable(rule) else rule
    return value


def _rope(value: Json, sections: bool) -> Json:
    """Rotary settings: sections fill half of the rotary dimension, long contexts begin at 256."""
    if value and all(isinstance(v, dict) for v in value.values()):
        return {k: _rope(v, sections) for k, v in value.items()}
    made = dict(value)
    if made.get("partial_rotary_factor", 1) < 1:
        made["partial_rotary_factor"] = 0.5
    if "original_max_position_embeddings" in made:
        made["original_max_position_embeddings"] = 256
    if sections:
        half = int(HEAD * made.get("partial_rotary_factor", 1)) // 2
        made["mrope_section"] = [round(half / 3), round(half / 3), half - 2 * round(half / 3)]
    return made


def _kv_heads(value: int, plain: Json) -> int:
    heads = next((plain[n] for n in ("num_attention_heads", "n_head", "n_heads") if plain.get(n)), None)
    return HEADS if value == heads else min(value, KV_HEADS)


def _at_most(limit: int) -> Callable[[int, Json], int]:
    return lambda value, plain: min(value, limit)


Rule = int | Callable[[int, Json], int]
RULES: tuple[tuple[str, Rule], ...] = (
    # Vocabularies, positions and windows.
    (r"(\w+_)?vocab(_size)?(_\w+)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 512),
    (r"max_(source|target)_positions", 512),
    (
        r"sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size",
        WINDOW,
    ),
    (r"keep_window_size|index_topk", WINDOW),
    (r"(\w+_)?chunk_size|n_window", WINDOW),
    # Mixtures of experts.
    (r"num_experts|n_routed_experts|num_local_experts|(moe_)?num_experts|zero_expert_num", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k", _at_most(2)),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", 1),
    (r"o_groups", 2),
    (
        r"(moe|expert)_(intermediate|ffn_hidden)_size|shared_expert_\w+|moe_shared_expert_\w+",
        EXPERT_INTERMEDIATE,
    ),
    # Heads.
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", _kv_heads),
    (r"linear_num_key_heads", KV_HEADS),
    (r"linear_num_heads|linear_num_value_heads", HEADS),
    (r"mamba_(n|num)_heads|mamba_num_heads|ssm_num_heads", 2 * HEADS),
    (r"(\w+_)?(attention_heads|n_heads?|num_heads|heads)", _at_most(HEADS)),
    (r"qk_head_dim", 2 * HEAD),
    (r"index_head_dim", 2 * HEAD),
    (r"(\w+_)?(head_dim|d_head|dim_head|head_size|headdim|d_kv)|kv_channels", HEAD),
    (r"rotary_dim", HEAD // 2),
    (r"(\w+_)?lora_rank|(\w+_)?rank|time_step_rank|mamba_dt_rank", _at_most(32)),
    # State space.
    (r"(\w+_)?(state_size|d_state)", _at_most(16)),
    (r"(mamba_)?n_?groups", _at_most(2)),
    (r"mamba_d_ssm", 2 * HIDDEN),
    # Images and sound.
    (r"num_filters", 8),
    (r"image_size|crop_size|resolution", lambda value, plain: 2 * _patch(plain)),
    (
        r"patch_size|temporal_patch_size|spatial_merge_size|num_channels|in_channels|kernel_size",
        lambda v, p: v,
    ),
    # Widths.
    (r"(\w+_)?(intermediate_size(_\w+)?|ffn_dim|n_inner|d_ff|dff|dim_ff|feed_forward_size)", INTERMEDIATE),
    (r"(\w+_)?(ffn_hidden_size|mlp_dim|d_inner|expert_dim)", INTERMEDIATE),
    (r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim)(_\w+)?", HIDDEN),
    (r"(\w+_)?(_size|_dim|_width|_channels)", _at_most(HIDDEN)),
    (r"\w+_(size|dim|width|channels)", _at_most(HIDDEN)),
)


def _patch(plain: Json) -> int:
    patch = plain.get("patch_size", 16)
    return patch if isinstance(patch, int) else 16


def _number_tokens(plain: Json) -> None:
    """Special tokens get the ids from SPECIAL up, in the order of their fields."""
    following = iter(range(SPECIAL, VOCABULARY))
    for name in [n for n in plain if re.fullmatch(r"\w+_(token_id|token_index|token_ids)", n)]:
        value = plain[name]
        if isinstance(value, int) and value >= SPECIAL:
            plain[name] = next(following)
        elif isinstance(value, (list, tuple)):
            plain[name] = type(value)(next(following) if v >= SPECIAL else v for v in value)


# Parts that a default config lacks, or has of a kind that does not fit.
PARTS: Mapping[str, Mapping[str, str]] = {
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "musicgen_melody": {
        "text_encoder": "t5",
        "audio_encoder": "encodec",
        "decoder": "musicgen_melody_decoder",
    },
    "granite4_vision": {"text_config": "granite", "vision_config": "siglip_vision_model"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "gpt2"},
    "gemma3n": {"vision_config": "siglip_vision_model"},
    "fast_vlm": {"vision_config": "siglip_vision_model"},
    "perception_lm": {"vision_config": "siglip_vision_model"},
}
_ROPE: Json = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
_COMPASS: Json = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    "num_hidden_layers": 2,
}
_INDEXER: Json = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 2 * HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}


def _inside(field: str, values: Json) -> Json:
    return {f"{field}.{name}": value for name, value in values.items()}


# What the rules cannot know: fields that must agree with one another, by dotted path.
EXCEPTIONS: Mapping[str, Json] = {
    "cohere_compass_text": _COMPASS,
    "cohere_compass": _inside("text_config", _COMPASS),
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 2 * HEADS},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": _inside("text_config", _INDEXER),
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD, "n_mamba_heads": 8},
    "chameleon": {"vocabulary_map": {"<image>": SPECIAL + 20}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": SPECIAL + 20, "<|extra_200|>": SPECIAL + 21}},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": HIDDEN},
    "mistral4": {"head_dim": 2 * HEAD},
    "paddleocr_vl": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "step3p7": {"text_config.sliding_window": WINDOW},
    "diffusion_gemma": {
        "text_config.num_experts": EXPERTS,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": EXPERT_INTERMEDIATE,
    },
    "glm5_next": {"text_config.index_kpool": 4},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
}
