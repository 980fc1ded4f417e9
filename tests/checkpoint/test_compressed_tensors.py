"""compressed-tensors output: the bytes of ModelOpt's under other names, read by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CompressedTensorsConfig, GptOssConfig

import fxq
from fxq.audit import verify_checkpoint
from tests import reader
from tests.families import LAYERS, Zoo, load, random_model, samples, zoo

__all__ = ["zoo"]

DEFAULT, WEIGHT_ONLY = "nvfp4_default-fp8_kv", "nvfp4_weight_only_mse"
CAST = "nvfp4_default-fp8_cast_kv"


def _outputs(model: Path, spec: str, root: Path) -> tuple[reader.Checkpoint, reader.Checkpoint]:
    """(compressed-tensors, ModelOpt) of one model."""
    data = None if spec == WEIGHT_ONLY else samples(6)
    for format in ("compressed-tensors", "modelopt"):
        fxq.compile(model, spec, calib=data, out=root / format, format=format)
    return reader.read_checkpoint(root / "compressed-tensors"), reader.read_checkpoint(root / "modelopt")


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen3_moe", DEFAULT),
        pytest.param("llama_tied", WEIGHT_ONLY, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", DEFAULT, marks=pytest.mark.slow),
    ],
)
def test_it_holds_what_modelopts_format_holds(family: str, spec: str, zoo: Zoo, tmp_path: Path) -> None:
    ours, theirs = _outputs(zoo(family), spec, tmp_path)
    assert not verify_checkpoint(ours.path, zoo(family)).errors
    assert ours.quantized_linears() == theirs.quantized_linears() != []
    for name in ours.quantized_linears():
        for part in ("weight", "weight_scale"):
            assert ours.raw(ours.part(name, part)).tobytes() == theirs.raw(theirs.part(name, part)).tobytes()
        for part in ("weight_scale_2", "input_scale")[: 1 + (spec == DEFAULT)]:
            expected = theirs.multiplier(name, part)
            stored = ours.array(ours.part(name, part))
            assert stored.shape == (1,)
            assert stored[0] == np.float32(1) / expected
            assert abs(ours.multiplier(name, part) - expected) <= np.spacing(expected)
    scales = {n: n.replace("k_proj.", "").replace("v_proj.", "") for n in theirs.tensors if "_proj.k_s" in n}
    assert all(ours.array(mine) == theirs.array(name) for name, mine in scales.items())
    assert bool(scales) == (spec == DEFAULT and family != "deepseek_v3")
    assert not (ours.path / "hf_quant_config.json").exists()


def _decoded(path: Path) -> dict[str, torch.Tensor]:
    """The parameters that transformers makes of a checkpoint."""
    return dict(load(path, quantization_config=CompressedTensorsConfig(dequantize=True)).state_dict())


@pytest.mark.parametrize("spec", [DEFAULT, pytest.param(WEIGHT_ONLY, marks=pytest.mark.slow)])
def test_transformers_decodes_a_dense_model(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    ours, _ = _outputs(zoo("llama"), spec, tmp_path)
    found = _decoded(ours.path)
    for name in ours.quantized_linears():
        expected = torch.from_numpy(ours.dequantize(name).copy())
        torch.testing.assert_close(found[f"{name}.weight"].float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    "spec",
    [
        CAST,
        *(
            pytest.param(spec, marks=pytest.mark.slow)
            for spec in (
                DEFAULT,
                "nvfp4_mlp_only_mse-fp8_cast_kv",
                WEIGHT_ONLY,
                "nvfp4_default_gptq-fp8_cast_kv",
            )
        ),
    ],
)
@torch.no_grad()
def test_transformers_runs_a_dense_model(spec: str, zoo: Zoo, tmp_path: Path) -> None:
    data = None if spec == WEIGHT_ONLY else samples(6)
    fxq.compile(zoo("llama"), spec, calib=data, out=tmp_path / "out", format="compressed-tensors")
    ours, expected = reader.read_checkpoint(tmp_path / "out"), load(zoo("llama"))
    for name in ours.quantized_linears():
        expected.get_parameter(f"{name}.weight").copy_(torch.from_numpy(ours.dequantize(name).copy()))
    model, ids = load(tmp_path / "out"), torch.tensor(samples(1, 24, seed=5))
    scales = {name: float(p) for name, p in model.named_parameters() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == (0 if spec == WEIGHT_ONLY else 2 * LAYERS)
    assert spec == DEFAULT or set(scales.values()) <= {1.0}
    wanted, found = (m(ids).logits.float().log_softmax(-1) for m in (expected, model))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.2  # an FP8 cache and no more


def test_transformers_still_decodes_experts_without_their_global_scale(zoo: Zoo, tmp_path: Path) -> None:
    """transformers#48371: when this fails, it is mended there, and what the format's page says is old."""
    ours, _ = _outputs(zoo("mixtral"), WEIGHT_ONLY, tmp_path)
    down = _decoded(ours.path)["model.layers.0.mlp.experts.down_proj"]
    name = "model.layers.0.block_sparse_moe.experts.3.w2"
    meant = torch.from_numpy(ours.dequantize(name).copy())
    divisor = float(ours.array(ours.part(name, "weight_scale_2"))[0])
    torch.testing.assert_close(down[3].float(), meant * divisor, rtol=2**-7, atol=0)
    assert divisor > 100


def test_experts_in_one_tensor_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with pytest.raises(
        fxq.CheckpointError, match=r"gate_up_proj: compressed-tensors names .* --format modelopt"
    ):
        fxq.compile(random_model(config), WEIGHT_ONLY, out=tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())
