"""NVFP4, FP8 and bfloat16 in one model: what is written, what is simulated, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxq
from fxq.audit import verify_checkpoint
from fxq.numbers import fp8
from tests import reader, reference
from tests.families import EXPERTS, LAYERS, Zoo, samples, zoo

__all__ = ["zoo"]

EXPERTS_FP8_REST = "nvfp4_experts_fp8_rest_mse-fp8_kv"
SPEC = """
passes:
  - quantize-linears: {weights: fp8, inputs: fp8, only: [FIRST]}
  - quantize-linears: {weights: nvfp4, inputs: nvfp4, skip: ["*layers.1.mlp*"]}
  - sync-groups
  - calibrate-max
  - calibrate-bootstrap
  - lower
"""


def _spec(path: Path, first: str) -> Path:
    path.write_text(SPEC.replace("FIRST", f'"{first}"'))
    return path


def _json(path: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(path.read_text())
    return found


def test_experts_in_nvfp4_beside_fp8_are_declared_module_by_module(zoo: Zoo, tmp_path: Path) -> None:
    compiled = fxq.compile(zoo("qwen3_moe"), EXPERTS_FP8_REST, calib=samples(6), out=tmp_path / "out")
    out, source = reader.read_checkpoint(tmp_path / "out"), reader.read_checkpoint(zoo("qwen3_moe"))
    assert not verify_checkpoint(out.path, source.path).errors
    experts, linears = out.quantized_linears(), out.fp8_linears()
    assert len(experts) == 3 * EXPERTS * LAYERS
    assert linears == sorted(f"model.layers.{i}.self_attn.{p}_proj" for i in range(LAYERS) for p in "qkvo")
    layers: dict[str, object] = {name: {"quant_algo": "FP8"} for name in linears}
    layers |= {name: {"quant_algo": "NVFP4", "group_size": 16} for name in experts}
    for declared in (
        _json(out.path / "config.json")["quantization_config"],
        _json(out.path / "hf_quant_config.json")["quantization"],
    ):
        assert declared["quant_algo"] == "MIXED_PRECISION"
        assert declared["quantized_layers"] == layers
    for layer in range(LAYERS):
        names = [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"]
        amax = max(float(np.abs(source.array(f"{name}.weight")).max()) for name in names)
        for name in names:
            scale = np.float32(amax) / np.float32(448)
            assert out.array(f"{name}.weight_scale") == scale
            decoded = reference.e4m3_decode(out.array(f"{name}.weight")) * scale
            w = source.array(f"{name}.weight")
            assert (np.abs(decoded - w) <= np.maximum(np.abs(w) / 16, scale * 2.0**-10) * (1 + 1e-6)).all()
    report = compiled.report
    assert (report.linear_nodes, report.kv_nodes) == (4 * LAYERS, 2 * LAYERS)
    before, after = compiled.perplexity(samples(4, seed=3))
    assert before != after
    assert abs(np.log(after / before)) < 0.3


def test_globs_give_each_linear_its_format(zoo: Zoo, tmp_path: Path) -> None:
    spec = _spec(tmp_path / "mine.yaml", "*attn*")
    fxq.compile(zoo("llama"), spec, calib=samples(4), out=tmp_path / "out")
    out = reader.read_checkpoint(tmp_path / "out")
    assert not verify_checkpoint(out.path, zoo("llama")).errors
    assert {name.rsplit(".", 2)[1] for name in out.fp8_linears()} == {"self_attn"}
    assert out.quantized_linears() == [f"model.layers.0.mlp.{p}_proj" for p in ("down", "gate", "up")]
    excluded = _json(out.path / "config.json")["quantization_config"]["ignore"]
    assert isinstance(excluded, list)
    assert {f"model.layers.1.mlp.{p}_proj" for p in ("down", "gate", "up")} <= set(excluded)


def test_a_glob_that_splits_q_k_and_v_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(fxq.VerifyError, match="engines fuse q/k/v, so all or none must be quantized"):
        fxq.compile(zoo("llama"), _spec(tmp_path / "mine.yaml", "*q_proj"), calib=samples(2))


def test_compressed_tensors_refuses_a_mixture_with_the_reason(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(fxq.CheckpointError, match="fxq writes FP8 weights as ModelOpt does"):
        fxq.compile(
            zoo("qwen3_moe"),
            EXPERTS_FP8_REST,
            calib=samples(2),
            out=tmp_path / "out",
            format="compressed-tensors",
        )


def test_fp8_codes_are_the_nearest_values() -> None:
    w = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    w[1], w[2, 0, 0] = 0, -500
    packed = fp8.quantize_measured(w, w.abs().amax((1, 2)))
    assert (packed.scale > 0).all()
    finite = reference.E4M3[np.isfinite(reference.E4M3)]
    for one, codes, scale in zip(w.numpy(), packed.weight.view(torch.uint8), packed.scale, strict=True):
        targets = (one / float(scale)).astype(np.float64)
        best = np.abs(targets[..., None] - finite).min(-1)
        assert np.abs(np.abs(targets - reference.e4m3_decode(codes.numpy())) - best).max() <= 1e-4
    difference = (fp8.dequantize(packed).double() - w.double()).square().sum((-2, -1))
    assert torch.allclose(packed.error, difference)


@pytest.mark.parametrize("where", ["weight", "amax"])
def test_fp8_of_what_is_not_finite_is_refused(where: str) -> None:
    w, amax = torch.ones(1, 4, 4), torch.ones(1)
    (w if where == "weight" else amax).view(-1)[0] = float("inf")
    with pytest.raises(fxq.SourceError, match="expected finite"):
        fp8.quantize_weight(w, amax)


def test_a_head_that_shares_the_table_of_the_embedding_gets_a_tensor_of_its_own(
    zoo: Zoo, tmp_path: Path
) -> None:
    spec, source = "nvfp4_all_lm_head_mse-fp8_cast_kv", reader.read_checkpoint(zoo("llama_tied"))
    compiled = fxq.compile(source.path, spec, calib=samples(6), out=tmp_path / "out")
    out, table = reader.read_checkpoint(tmp_path / "out"), "model.embed_tokens.weight"
    assert np.array_equal(out.raw(table), source.raw(table))
    assert "lm_head" in out.quantized_linears()
    lost = out.dequantize("lm_head") - source.array(table)
    assert np.linalg.norm(lost) < 0.13 * np.linalg.norm(source.array(table))
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    assert compiled.report.untied == ["lm_head"]
    assert not verify_checkpoint(tmp_path / "out", source.path).errors
    text = samples(3, seed=5)
    assert fxq.evaluate(tmp_path / "out", text).perplexity == compiled.perplexity(text)[1]


@pytest.mark.parametrize(
    ("spec", "algorithms"),
    [
        (
            "nvfp4_experts_weight_only_fp8_attention-fp8_cast_kv",
            {"mlp.experts.0.up_proj": "W4A16_NVFP4", "self_attn.q_proj": "FP8"},
        ),
        ("nvfp4_all_lm_head_mse-fp8_cast_kv", None),
    ],
)
def test_what_people_deploy_is_good(
    spec: str, algorithms: dict[str, str] | None, zoo: Zoo, tmp_path: Path
) -> None:
    compiled = fxq.compile(zoo("qwen3_moe"), spec, calib=samples(6), out=tmp_path / "out")
    findings = verify_checkpoint(tmp_path / "out", zoo("qwen3_moe"))
    assert not findings.errors, findings.groups()
    assert findings.summary["worst_sqnr_db"] > 18
    stated: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if algorithms is None:
        assert reader.check(tmp_path / "out") == []
        assert "lm_head" not in stated["ignore"]
        assert "lm_head" in reader.read_checkpoint(tmp_path / "out").quantized_linears()
    else:
        layers = stated["quantized_layers"]
        assert {name: layers[f"model.layers.0.{name}"]["quant_algo"] for name in algorithms} == algorithms
    text = samples(3, seed=5)
    assert fxq.evaluate(tmp_path / "out", text).perplexity == compiled.perplexity(text)[1]
