"""Every layout decodes to what the library that made it reads; what none explains is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fxq
from fxq.model import open_model
from fxq.sources import Directory
from tests.families import Zoo, zoo

__all__ = ["zoo"]

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
N, K = 48, 96
GENERATOR = torch.Generator().manual_seed(0)


def _bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR, dtype=torch.uint8)


def _checkpoint(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    return path


def _decodes(path: Path, expected: Tensor, name: str = "m.weight") -> None:
    """Whole, and in rows."""
    directory = Directory(path)
    assert list(directory.infos) == [name]
    assert directory.infos[name].shape == tuple(expected.shape)
    found = directory.read_hub(name)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16))
    if expected.dim() == 2:
        assert torch.equal(directory.read_hub(name, range(5, 17)), found[5:17])


def test_mxfp4_as_transformers_keeps_gpt_oss(tmp_path: Path) -> None:
    blocks, scales = _bytes(3, N, K // 32, 16), _bytes(3, N, K // 32, low=90, high=140)
    scales[0, 0] = torch.tensor([0, 1, 2], dtype=torch.uint8)  # subnormal in bfloat16
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    path = _checkpoint(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (3, K, N)
    _decodes(path, expected, name)
    assert torch.equal(Directory(path).read_hub(name, range(1, 3)), expected[1:3])


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_fp4_beside_fp8_as_transformers_keeps_deepseek_v4(kind: str, tmp_path: Path) -> None:
    codes, scales = _bytes(N, K // 2).view(getattr(torch, kind)), _bytes(N, K // 32, low=110, high=140)
    tensors = {"m.weight": codes, "m.scale": scales.view(E8M0)}
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128])))
    expected = theirs._dequantize_one(codes.view(torch.int8), scales.view(E8M0), output_dtype=torch.bfloat16)
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    _decodes(_checkpoint(tmp_path / "m", tensors, stated), expected)


@pytest.mark.parametrize("kind", [torch.uint8, E8M0])
def test_mxfp8_as_transformers_reads_it(kind: torch.dtype, tmp_path: Path) -> None:
    codes, scales = torch.randn(N, K, generator=GENERATOR).to(E4M3), _bytes(N, K // 32, low=110, high=140)
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[1, 32])))
    expected = theirs._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
    tensors = {"m.weight": codes, "m.weight_scale": scales.view(kind)}
    _decodes(
        _checkpoint(tmp_path / "m", tensors, {"quant_method": "modelopt", "quant_algo": "MXFP8"}), expected
    )


FLOAT, INT = {"type": "float", "symmetric": True}, {"type": "int", "symmetric": True}
# format, what its scheme says of weights, the block that shares a scale
COMPRESSED: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("mxfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "group", "group_size": 32}, (1, 32)),
    ("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}, (1, 16)),
    ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}, (1, 32)),
    ("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel"}, (1, K)),
    ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "channel"}, (1, K)),
    ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "tensor"}, (N, K)),
    ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [16, 32]}, (16, 32)),
    ("mxfp8-quantized", {**FLOAT, "num_bits": 8, "strategy": "group", "group_size": 32}, (1, 32)),
]


@pytest.mark.parametrize(("format", "args", "block"), COMPRESSED)
def test_what_compressed_tensors_writes(
    format: str, args: dict[str, Any], block: tuple[int, int], tmp_path: Path
) -> None:
    w = torch.randn(N, K, generator=GENERATOR).bfloat16()
    largest = w.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).abs().amax((1, 3))
    scale = largest / {"int": 7, "float": 6 if args["num_bits"] == 4 else 448}[args["type"]]
    state = {"weight": w}
    if args["strategy"] == "tensor_group":
        divisor = state["weight_global_scale"] = 2688 / w.abs().max().float().reshape(1)
        scale = (scale * divisor).to(E4M3)
    if format.startswith("mx"):
        scale = scale.log2().ceil().exp2()
    state["weight_scale"] = (scale.reshape(1) if args["strategy"] == "tensor" else scale).bfloat16()
    library = BaseCompressor.get_value_from_registry(format)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    stored = library.compress(state, scheme)
    group = {"targets": ["Linear"], "weights": args, "format": format}
    stated = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    path = _checkpoint(tmp_path / "m", {f"m.{name}": t for name, t in stored.items()}, stated)
    directory = Directory(path)
    assert list(directory.infos) == ["m.weight"]
    expected = library.decompress(dict(stored), scheme)["weight"]
    # the library rounds each factor to bfloat16, fxq the product alone
    torch.testing.assert_close(directory.read_hub("m.weight"), expected.bfloat16(), rtol=2**-6, atol=0)


@pytest.mark.parametrize("given", ["", "model-Q4_K_M.gguf"])
def test_gguf_is_refused_with_the_command_that_converts_it(given: str, tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(fxq.SourceError) as caught:
        open_model(tmp_path / given if given else tmp_path)
    message = str(caught.value)
    compile(message.split('python -c "')[1].rstrip('"'), "command", "exec")
    assert f"gguf_file='{'model-Q4_K_M.gguf'}'" in message
    assert str(tmp_path) in message


def _mixed() -> tuple[dict[str, Tensor], dict[str, Any]]:
    codes, scales = _bytes(N, K // 2), _bytes(N, K // 32)
    group = {"weights": {**FLOAT, "num_bits": 4}, "format": "mxfp4-pack-quantized"}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    return {"m.weight_packed": codes, "m.weight_scale": scales}, stated


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m.weight_scale": None}, "m.weight_packed is uint8 [48, 48], but there is no m.weight_scale"),
        ({"m.weight_scale": torch.ones(N, 5, dtype=torch.uint8)}, "needs uint8 [48, 3], a scale for 1x32"),
        ({"m.weight_scale": torch.ones(N, 3).int()}, "m.weight_scale is int32 [48, 3]; m.weight_packed"),
        ({"m.weight_g_idx": torch.zeros(K).int()}, "groups of reordered inputs"),
        ({"m.weight_zero_point": torch.zeros(N, 3).int()}, "integers with zero points"),
        ({"n.weight_scale": torch.ones(N, 3)}, "n.weight_scale [48, 3] scales n.weight, which is missing"),
        ({"m.pre_quant_scale": torch.ones(K)}, "AWQ"),
        ({"n.weight": torch.ones(N, K).to(torch.float8_e5m2)}, "n.weight is float8_e5m2 [48, 96]"),
    ],
)
def test_what_no_layout_explains_is_refused_by_name(
    change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    tensors, stated = _mixed()
    changed = {**tensors, **change}
    path = _checkpoint(tmp_path / "m", {k: t for k, t in changed.items() if t is not None}, stated)
    with pytest.raises(fxq.SourceError) as caught:
        Directory(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "int-quantized"}, "compressed-tensors' int-quantized"),
        ({"config_groups": {"g": {"weights": {**INT, "num_bits": 8}}}}, "compressed-tensors' int of 8 bits"),
        ({"transform_config": {"u": 1}}, "transforms of activations"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "modelopt's NVFP4_SVD"),
        ({"quant_method": "awq"}, "quantized by awq"),
    ],
)
def test_what_a_config_promises_and_no_layout_explains_is_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    tensors, stated = _mixed()
    with pytest.raises(fxq.SourceError) as caught:
        Directory(_checkpoint(tmp_path / "m", tensors, {**stated, **change}))
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["m.weight_scale", "m.weight_global_scale"])
def test_a_scale_that_is_no_number_is_found_when_read(key: str, tmp_path: Path) -> None:
    tensors, stated = _mixed()
    if key == "m.weight_scale":
        tensors[key][3, 1] = 255  # NaN in e8m0
    else:
        stated["format"] = stated["config_groups"]["group_0"]["format"] = "nvfp4-pack-quantized"
        tensors |= {"m.weight_scale": torch.ones(N, K // 16).to(E4M3), key: torch.zeros(1)}
    with pytest.raises(fxq.SourceError, match=f"{key} holds NaN or Inf, so that m.weight_packed"):
        Directory(_checkpoint(tmp_path / "m", tensors, stated)).read_hub("m.weight")


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_an_nvfp4_checkpoint_is_a_source(format: str, zoo: Zoo, tmp_path: Path) -> None:
    """Decoded, and quantized again or written by the other tool's names."""
    other = {"modelopt": "compressed-tensors", "compressed-tensors": "modelopt"}[format]
    fxq.compile(zoo("qwen3_moe"), "nvfp4_weight_only", out=tmp_path / "once", format=format)
    fxq.compile(tmp_path / "once", "nvfp4_weight_only", out=tmp_path / "twice", format=other)
    once, twice = Directory(tmp_path / "once"), Directory(tmp_path / "twice")
    assert set(once.infos) == set(twice.infos)
    assert set(once.weights) == set(twice.weights)
    for key in once.weights:
        first, second = once.read_hub(key).float(), twice.read_hub(key).float()
        assert (first - second).norm() < 0.02 * first.norm(), key
