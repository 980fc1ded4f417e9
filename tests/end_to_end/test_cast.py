"""MXFP4 checkpoints become NVFP4 ones of the same values: as code that shares nothing with fxq decodes them,
and as the model that is served computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

import fxq
from fxq.audit import verify_checkpoint
from tests import reader, tiny
from tests.families import Zoo, samples, zoo

__all__ = ["zoo"]

SPEC = "nvfp4_cast_mxfp4"
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _mxfp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bytes of codes [..., K / 2], exponents uint8 [..., K / 32], the values) of weights [..., K]."""
    blocks = w.float().unflatten(-1, (-1, 32))
    power = (blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100).log2().floor() - 2).clamp(-120, 120)
    index = ((blocks.abs() / power.exp2())[..., None] - GRID).abs().argmin(-1)
    codes = (index + 8 * (blocks < 0)).to(torch.uint8).flatten(-2)
    values = (torch.copysign(GRID[index], blocks) * power.exp2()).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (power[..., 0] + 127).to(torch.uint8), values


def _stored(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-OSS as transformers keeps it: its experts in MXFP4."""
    path = tmp_path_factory.mktemp("gpt_oss") / "model"
    tiny.tiny_model(next(f for f in tiny.families() if f.name == "gpt_oss")).save_pretrained(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            codes, tensors[f"{name}_scales"], _ = _mxfp4(tensor.mT)
            tensors[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        else:
            tensors[name] = tensor
    _stored(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return path


def test_gpt_oss_is_cast_without_a_value_changed(gpt_oss: Path, tmp_path: Path) -> None:
    compiled = fxq.compile(gpt_oss, SPEC, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
    out = reader.read_checkpoint(tmp_path / "out")
    experts = {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    assert set(out.quantized_linears()) == set(experts)
    for name, parameter in experts.items():
        assert torch.equal(torch.from_numpy(out.dequantize(name)), parameter.detach().float()), name
    blocks = sum(p.numel() for p in experts.values()) // 16
    assert (compiled.report.cast_blocks, compiled.report.inexact_blocks) == (blocks, 0)
    assert f"{blocks} blocks of 16, all exact" in str(compiled.report)
    findings = verify_checkpoint(tmp_path / "out")
    assert not findings.errors, findings.errors


def test_what_is_served_is_the_source(gpt_oss: Path, tmp_path: Path) -> None:
    fxq.compile(gpt_oss, SPEC, out=tmp_path / "out")
    found = fxq.evaluate(tmp_path / "out", samples(3), base=gpt_oss)
    assert found.against is not None
    assert set(found.against.kl.values()) == {0.0}


def test_inputs_may_have_a_fixed_scale_and_nothing_is_calibrated(gpt_oss: Path, tmp_path: Path) -> None:
    compiled = fxq.compile(gpt_oss, f"{SPEC}_input_scale_1", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {float(t) for name, t in tensors.items() if name.endswith("input_scale")} == {1.0}
    assert compiled.report.inexact_blocks == 0
    found = fxq.evaluate(tmp_path / "out", samples(3), base=gpt_oss)
    assert found.perplexity == compiled.perplexity(samples(3))[1]
    assert found.against is not None
    assert 0 < found.against.kl["mean"] < 0.5


def test_experts_and_linears_of_compressed_tensors_are_cast_alike(zoo: Zoo, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in zoo("qwen3_moe").glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    tensors, values = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(zoo("qwen3_moe") / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight") and "layers.0.self_attn" not in name:
            codes, scales, values[module] = _mxfp4(tensor)
            tensors |= {f"{module}.weight_packed": codes, f"{module}.weight_scale": scales}
        else:
            tensors[name] = tensor
    weights = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    stated = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    _stored(path, tensors, {**stated, "config_groups": groups})
    compiled = fxq.compile(path, SPEC, out=tmp_path / "out")
    out = reader.read_checkpoint(tmp_path / "out")
    assert set(out.quantized_linears()) == set(values)
    for module, expected in values.items():
        assert torch.equal(torch.from_numpy(out.dequantize(module)), expected), module
    assert compiled.report.inexact_blocks == 0
    assert reader.check(tmp_path / "out") == []
