"""`fxq verify` of every format that engines take beside NVFP4: good ones are good, damage is found as what it
is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxq.audit import Findings, verify_checkpoint
from tests.families import add_tensors, drop_tensors

E4M3 = torch.float8_e4m3fn
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
N = K = 256
ALGORITHMS = {
    f"{ATTENTION}.q_proj": "FP8_PB_WO",
    f"{ATTENTION}.k_proj": "FP8_PB_WO",
    f"{ATTENTION}.v_proj": "FP8_PB_WO",
    f"{ATTENTION}.o_proj": "MXFP8",
    f"{MLP}.gate_proj": "FP8_PER_CHANNEL_PER_TOKEN",
    f"{MLP}.up_proj": "FP8_PER_CHANNEL_PER_TOKEN",
    f"{MLP}.down_proj": "NVFP4",
    "lm_head": "W4A16_NVFP4",
}
Damage = Callable[[Path], Any]
Json = dict[str, Any]


def _tensors(module: str, algorithm: str, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """(what a checkpoint holds of a linear, its weight before) in bfloat16 values."""
    w = torch.randn(N, K, generator=generator).bfloat16().float()
    made: dict[str, Tensor] = {}
    if algorithm.endswith("NVFP4"):
        made["weight_scale_2"] = w.abs().max() / 2688
        scale = (w.unflatten(1, (-1, 16)).abs().amax(-1) / 6 / made["weight_scale_2"]).to(E4M3)
        made["weight_scale"] = scale
        step = (scale.float() * made["weight_scale_2"]).repeat_interleave(16, 1)
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = ((w.abs() / step)[..., None] - grid).abs().argmin(-1).to(torch.uint8) | (w < 0).to(
            torch.uint8
        ) << 3
        made["weight"] = codes[:, 0::2] | codes[:, 1::2] << 4
        if algorithm == "NVFP4":
            made["input_scale"] = torch.tensor(0.01)
    else:
        tall, wide = {"FP8_PB_WO": (128, 128), "MXFP8": (1, 32), "FP8_PER_CHANNEL_PER_TOKEN": (1, K)}[
            algorithm
        ]
        scale = w.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).abs().amax((1, 3)) / 448
        if algorithm == "MXFP8":
            scale = scale.log2().ceil().exp2()
        spread = scale.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        made["weight"] = (w / spread).to(E4M3)
        exponent = (scale.log2() + 127).to(torch.uint8)
        shapes = {
            "FP8_PB_WO": scale[:, None, :, None],
            "MXFP8": exponent,
            "FP8_PER_CHANNEL_PER_TOKEN": scale[:, 0],
        }
        made["weight_scale"] = shapes[algorithm]
    return {f"{module}.{name}": tensor for name, tensor in made.items()}, w


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A mixed checkpoint by hand, and beside it the model that it was made from."""
    path, base = tmp_path / "model", tmp_path / "base"
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.ones(8, K).bfloat16()}
    plain = dict(tensors)
    for module, algorithm in ALGORITHMS.items():
        made, w = _tensors(module, algorithm, generator)
        tensors |= made
        plain[f"{module}.weight"] = w.bfloat16()
    layers = {
        m: {"quant_algo": a, **({"group_size": 16} if "NVFP4" in a else {})} for m, a in ALGORITHMS.items()
    }
    kv: Json = {"num_bits": 8, "type": "float", "dynamic": False}
    common: Json = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    nested = {**common, "kv_cache_quant_algo": "FP8", "exclude_modules": ["model.embed_tokens"]}
    flat = {**common, "quant_method": "modelopt", "ignore": ["model.embed_tokens"], "kv_cache_scheme": kv}
    for directory, held in ((path, tensors), (base, plain)):
        directory.mkdir()
        save_file(
            {k: t.contiguous() for k, t in held.items()}, directory / "model.safetensors", {"format": "pt"}
        )
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
        (directory / "tokenizer.json").write_text("{}")
        (directory / "generation_config.json").write_text("{}")
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": flat}
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": nested}))
    return path


def _rules(findings: Findings) -> set[str]:
    return {item.rule for item in (*findings.errors, *findings.warnings)}


def test_a_mix_of_all_formats_is_good_and_compared_with_its_base(model: Path) -> None:
    findings = verify_checkpoint(model, model.parent / "base")
    assert not _rules(findings), findings.groups()
    assert findings.summary["linears"] == {"NVFP4": 2, "FP8 by rows": 2, "FP8 in blocks": 3, "MXFP8": 1}
    assert findings.summary["compared"] == len(ALGORITHMS)
    assert findings.summary["worst_sqnr_db"] > 18


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda path: add_tensors(
        path, {name: change(load_file(path / "model.safetensors")[name]).contiguous()}
    )


def _listed(module: str, **changes: Any) -> Damage:
    def damage(path: Path) -> None:
        for file, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
            whole = json.loads((path / file).read_text())
            whole[key]["quantized_layers"][module].update(changes)
            (path / file).write_text(json.dumps(whole))

    return damage


def _cache(flat: Any, nested: Any) -> Damage:
    def damage(path: Path) -> None:
        for file, key, name, value in (
            ("config.json", "quantization_config", "kv_cache_scheme", flat),
            ("hf_quant_config.json", "quantization", "kv_cache_quant_algo", nested),
        ):
            whole = json.loads((path / file).read_text())
            whole[key][name] = value
            (path / file).write_text(json.dumps(whole))

    return damage


Q, OUT, GATE, DOWN = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj", f"{MLP}.gate_proj", f"{MLP}.down_proj"
DAMAGE: dict[str, tuple[Damage, set[str]]] = {
    "blocks without scales": (
        lambda p: drop_tensors(p, f"{Q}.weight_scale"),
        {"tensor-unknown", "config-layers"},
    ),
    "blocks in two dimensions": (_changed(f"{Q}.weight_scale", lambda t: t[:, 0, :, 0]), {"tensor-shape"}),
    "blocks of another size": (
        _changed(f"{Q}.weight_scale", lambda t: t.repeat_interleave(2, 0)),
        {"tensor-shape"},
    ),
    "blocks scaled in bfloat16": (_changed(f"{Q}.weight_scale", Tensor.bfloat16), {"tensor-dtype"}),
    "blocks with a scale of zero": (_changed(f"{Q}.weight_scale", lambda t: t * 0), {"scale-value"}),
    "blocks with a NaN among scales": (
        _changed(f"{Q}.weight_scale", lambda t: t.masked_fill(t == t.max(), float("nan"))),
        {"scale-value"},
    ),
    "blocks with a NaN among codes": (
        _changed(f"{Q}.weight", lambda t: (t.view(torch.uint8) | 0x7F).view(E4M3)),
        {"scale-value"},
    ),
    "blocks beside a sibling that is MXFP8": (
        _listed(Q, quant_algo="MXFP8"),
        {"config-layers", "group-partial"},
    ),
    "blocks declared of 64": (_listed(Q, group_size=64), {"config-layers"}),
    "blocks with an input scale": (
        lambda p: add_tensors(p, {f"{Q}.input_scale": torch.tensor(1.0)}),
        {"part-extra"},
    ),
    "blocks declared per tensor": (
        lambda p: [_listed(f"{ATTENTION}.{x}_proj", quant_algo="FP8")(p) for x in "qkv"],
        {"config-layers", "input-scale-missing"},
    ),
    "mxfp8 with scales of 16": (
        _changed(f"{OUT}.weight_scale", lambda t: t.repeat_interleave(2, 1)),
        {"tensor-shape"},
    ),
    "mxfp8 with NaN": (_changed(f"{OUT}.weight_scale", lambda t: t | 255), {"scale-value"}),
    "mxfp8 with float scales": (
        _changed(f"{OUT}.weight_scale", lambda t: (t.float() - 127).exp2()),
        {"config-layers", "tensor-shape"},
    ),
    "mxfp8 with an input scale": (
        lambda p: add_tensors(p, {f"{OUT}.input_scale": torch.tensor(1.0)}),
        {"part-extra"},
    ),
    "mxfp8 listed as FP8": (_listed(OUT, quant_algo="FP8"), {"config-layers", "input-scale-missing"}),
    "rows with a negative scale": (_changed(f"{GATE}.weight_scale", torch.neg), {"scale-value"}),
    "rows with half of their scales": (
        _changed(f"{GATE}.weight_scale", lambda t: t[::2]),
        {"tensor-shape", "config-layers", "group-partial"},
    ),
    "rows with an input scale": (
        lambda p: add_tensors(p, {f"{GATE}.input_scale": torch.tensor(1.0)}),
        {"part-extra"},
    ),
    "rows under one algorithm, its sibling under another": (
        _listed(GATE, quant_algo="FP8"),
        {"config-layers", "group-partial"},
    ),
    "a global scale of amax / 6": (
        lambda p: [
            _changed(f"{DOWN}.weight_scale_2", lambda t: t * 448)(p),
            _changed(f"{DOWN}.weight_scale", lambda t: (t.float() / 448).clamp_min(2.0**-9).to(E4M3))(p),
        ],
        {"scale-range"},
    ),
    "a head without its global scale": (
        lambda p: drop_tensors(p, "lm_head.weight_scale_2"),
        {"part-missing"},
    ),
    "a head with inputs where it is weight-only": (
        lambda p: add_tensors(p, {"lm_head.input_scale": torch.tensor(1.0)}),
        {"part-extra"},
    ),
    "a head listed as W4A4 without an input scale": (
        _listed("lm_head", quant_algo="NVFP4"),
        {"input-scale-missing"},
    ),
    "an algorithm that no engine knows": (_listed(OUT, quant_algo="MXFP6"), {"config-layers"}),
    "a cache in NVFP4": (
        _cache({"num_bits": 4, "type": "float", "group_size": 16}, "NVFP4"),
        {"kv-scheme"},
    ),
    "a cache in NVFP4 in one file": (_cache(None, "NVFP4"), {"config-disagree"}),
    "a cache in integers": (_cache({"num_bits": 8, "type": "int"}, "INT8"), {"kv-scheme"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_is_all_that_is_found(kind: str, model: Path) -> None:
    damage, expected = DAMAGE[kind]
    damage(model)
    findings = verify_checkpoint(model)
    assert _rules(findings) == expected, findings.groups()


def test_blocks_under_the_source_s_name_are_good_where_they_are_listed_and_leftovers_elsewhere(
    model: Path,
) -> None:
    tensors = load_file(model / "model.safetensors")
    name = f"{OUT}.weight_scale_inv"
    made = torch.ones(2, 2)
    add_tensors(model, {f"{OUT}.weight": tensors[f"{OUT}.weight"], name: made})
    drop_tensors(model, f"{OUT}.weight_scale")
    assert _rules(verify_checkpoint(model)) == {"fp8-leftover", "config-layers"}
    _listed(OUT, quant_algo="FP8_BLOCK_SCALES")(model)
    assert not _rules(verify_checkpoint(model))
