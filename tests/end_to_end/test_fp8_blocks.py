"""FP8 in blocks: what the source holds so stays so, byte for byte; what does not can become so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import fxq
from fxq.audit import verify_checkpoint
from tests import tiny
from tests.families import samples
from tests.sources.test_encodings_fp8 import fp8_copy

SPEC = "nvfp4_experts_only_fp8_blocks_kept"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose linears are whole blocks wide, and one of them not whole blocks tall."""
    folder = tmp_path_factory.mktemp("blocks")
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=128,
        moe_intermediate_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=160,
        decoder_sparse_step=1,
        dtype="bfloat16",
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tiny.fill(made, torch.Generator().manual_seed(0))
    made.save_pretrained(folder / "plain")
    return fp8_copy(folder / "plain", folder / "fp8", (128, 128))


def test_what_the_source_holds_in_blocks_stays_byte_for_byte(model: Path, tmp_path: Path) -> None:
    compiled = fxq.compile(model, SPEC, calib=samples(4), out=tmp_path / "out")
    source, out = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [key for key in source if "self_attn" in key and key.endswith("_proj.weight")]
    assert len(kept) == 2 * 4
    for key in kept:
        assert torch.equal(out[key].view(torch.uint8), source[key].view(torch.uint8)), key
        scales, theirs = out[f"{key}_scale"], source[f"{key}_scale_inv"]
        assert scales.shape == (theirs.shape[0], 1, theirs.shape[1], 1)
        assert torch.equal(scales[:, 0, :, 0], theirs), key
        assert f"{key.removesuffix('.weight')}.input_scale" not in out
    for file, field in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        stated = json.loads((tmp_path / "out" / file).read_text())[field]
        assert stated["quantized_layers"]["model.layers.0.self_attn.q_proj"] == {
            "quant_algo": "FP8_PB_WO",
            "group_size": 128,
        }
        assert stated.get("group_size", 16) == 16
    findings = verify_checkpoint(tmp_path / "out", model)
    assert not findings.errors, findings.groups()
    assert findings.summary["linears"] == {"NVFP4": 24, "FP8 in blocks": 8}
    before = compiled.report.output_bytes
    fxq.compile(model, "nvfp4_experts_only-fp8_cast_kv", calib=samples(4), out=tmp_path / "grown")
    grown = sum(t.nbytes for t in load_file(tmp_path / "grown" / "model.safetensors").values())
    attention = sum(source[key].numel() for key in kept)
    assert before is not None
    assert 0.95 * attention < grown - before < attention


def test_what_is_simulated_is_what_is_served(model: Path, tmp_path: Path) -> None:
    compiled = fxq.compile(model, SPEC, calib=samples(4), out=tmp_path / "out")
    _, after = compiled.perplexity(samples(3, seed=5))
    assert fxq.evaluate(tmp_path / "out", samples(3, seed=5)).perplexity == after


def test_plain_weights_become_blocks_of_least_maxima(model: Path, tmp_path: Path) -> None:
    spec = tmp_path / "blocks.yaml"
    linears = "{weights: fp8_blocks, inputs: fp8_blocks}"
    spec.write_text(f"passes: [quantize-linears: {linears}, sync-groups, calibrate-bootstrap, lower]")
    fxq.compile(model.parent / "plain", spec, out=tmp_path / "out", allow_partial=True)
    findings = verify_checkpoint(tmp_path / "out", model.parent / "plain")
    assert not findings.errors, findings.groups()
    assert findings.summary["worst_sqnr_db"] > 25
