"""Tiny random models of real families, saved as the hub would have them; dimensions are multiples of 16.

`zoo` is a fixture: `zoo("mixtral")` is a directory, built once a test module. Every linear has rows with
large outliers, so that block scales, global scales and clipping all matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 160
HIDDEN = 64
EXPERTS = 8
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _qwen3_moe() -> PreTrainedConfig:
    head: dict[str, Any] = {"head_dim": 16}
    return Qwen3MoeConfig(
        **_COMMON, **head, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=32
    )


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_COMMON, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=2)


def _deepseek_v3() -> PreTrainedConfig:
    prediction: dict[str, Any] = {"num_nextn_predict_layers": 1}
    return DeepseekV3Config(
        **{**_COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        **prediction,
    )


def _llama(tied: bool) -> PreTrainedConfig:
    return LlamaConfig(**_COMMON, tie_word_embeddings=tied)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "llama": lambda: _llama(False),
    "llama_tied": lambda: _llama(True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "phi3": lambda: Phi3Config(**_COMMON),
}
MOE = ("qwen3_moe", "mixtral", "deepseek_v3")
DENSE = tuple(name for name in FAMILIES if name not in MOE)
MOE_LAYERS = {"qwen3_moe": 2, "mixtral": 2, "deepseek_v3": 2}

Zoo = Callable[[str], Path]


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A bf16 model in eval mode: small normal weights with outliers in linears, norms near 1."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.1 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_((0.2 if "lm_head" in name or config.tie_word_embeddings else 0.6) * noise)
            else:
                parameter.copy_(0.4 * with_outliers(noise, generator))
        for name, buffer in list(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                # float32, as the hub stores it and transformers loads it
                bias = 0.1 * torch.randn(buffer.shape, generator=generator)
                model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    return model.eval()


def with_outliers(noise: Tensor, generator: torch.Generator) -> Tensor:
    """Noise [..., rows, K] times K**-0.5; a row in 16 is 8 times larger, an element in 1000 20 times."""
    w = noise / noise.shape[-1] ** 0.5
    w[..., torch.randperm(w.shape[-2], generator=generator)[: max(1, w.shape[-2] // 16)], :] *= 8
    return torch.where(torch.rand(w.shape, generator=generator) < 1e-3, 20 * w, w)


def save(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    """`save_pretrained`, and for DeepSeek-V3 a multi-token-prediction layer, unknown to transformers."""
    model.save_pretrained(path, **options)
    if model.config.model_type == "deepseek_v3":
        add_tensors(path, _mtp_layer(model.config))
    return path


def add_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors into a checkpoint of one file, replacing those of the same name."""
    file = path / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def drop_tensors(path: Path, *names: str) -> None:
    """Take tensors out of a checkpoint of one file."""
    file = path / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if k not in names}, file, metadata={"format": "pt"})


def _mtp_layer(config: PreTrainedConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {
        "eh_proj": (hidden, 2 * hidden),
        "embed_tokens": (config.vocab_size, hidden),
        "mlp.gate": (EXPERTS, hidden),
    }
    for expert in range(EXPERTS):
        for projection, shape in (
            ("gate", (inner, hidden)),
            ("up", (inner, hidden)),
            ("down", (hidden, inner)),
        ):
            shapes[f"mlp.experts.{expert}.{projection}_proj"] = shape
    layer = f"model.layers.{config.num_hidden_layers}"
    tensors = {
        f"{layer}.{k}.weight": torch.randn(s, generator=generator).bfloat16() for k, s in shapes.items()
    }
    return tensors | {f"{layer}.{norm}.weight": torch.ones(hidden).bfloat16() for norm in ("enorm", "hnorm")}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Family name -> its checkpoint directory, which tests must not change (copy it first)."""
    root, made = tmp_path_factory.mktemp("zoo"), dict[str, Path]()

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save(random_model(FAMILIES[name]()), root / name)
        return made[name]

    return directory


def load(path: Path, **options: Any) -> PreTrainedModel:
    """The model of a directory in bf16, as users load it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
    return model.eval()


def samples(count: int, length: int = 24, seed: int = 0) -> list[list[int]]:
    """Random token id lists, every third one shorter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length - 7 * (i % 3 == 2) for i in range(count)]
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """An output's files by relative path, less what its report measured: that differs between equal runs."""
    kept = {name: content for name, content in files.items() if not name.endswith("fxq-report/report.html")}
    for name, content in kept.items():
        if name.endswith("fxq-report/report.json"):
            report = json.loads(content)
            del report["measured"]
            kept[name] = json.dumps(report).encode()
    return kept


def write_lines(path: Path, items: Sequence[Any]) -> Path:
    """A calibration file: one JSON value a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path
