"""FP8 checkpoints are decoded as they are read; every other stored format is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import fxq
from fxq.sources import Directory
from fxq.sources.encodings import without_encoding
from fxq.sources.safetensors_file import SafetensorsFile
from tests import reader
from tests.families import EXPERTS, Zoo, add_tensors, drop_tensors, load, zoo

__all__ = ["zoo"]

FP8 = torch.float8_e4m3fn
FAMILIES = ["qwen3_moe", "deepseek_v3", "llama"]
BLOCK = (24, 40)  # divides none of the models' sizes

Convert = Callable[..., Path]


def _quantized(tensor: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """(e4m3 values, scales of their blocks), by loops over blocks in numpy's indexing."""
    *lead, rows, columns = tensor.shape
    tall, wide = block or (rows, columns)
    scales = torch.zeros(*lead, -(-rows // tall), -(-columns // wide))
    values = torch.zeros(tensor.shape, dtype=FP8)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            area = (..., slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
            scale = tensor[area].float().abs().amax((-2, -1)) / 448
            scales[..., i, j] = scale
            values[area] = (tensor[area].float() / scale[..., None, None].clamp(min=1e-30)).to(FP8)
    return values, scales


def _decoded(values: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Element by element in float64, rounded once."""
    *_, rows, columns = values.shape
    tall, wide = block or (rows, columns)
    row, column = torch.arange(rows) // tall, torch.arange(columns) // wide
    if not scales.dim():
        scales = scales.reshape(1, 1)
    return (values.double() * scales.double()[..., row[:, None], column[None, :]]).bfloat16()


@pytest.fixture
def convert(zoo: Zoo, tmp_path: Path) -> Convert:
    """A family's checkpoint as an FP8 one."""
    return lambda family, block=BLOCK, scale="weight_scale_inv": fp8_copy(
        zoo(family), tmp_path / f"{family}-{scale}", block, scale
    )


def fp8_copy(
    source: Path, path: Path, block: tuple[int, int] | None, scale: str = "weight_scale_inv"
) -> Path:
    """A checkpoint whose linears, but lm_head and routers, are in FP8."""
    shutil.copytree(source, path)
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        tensors[key] = tensor
        if key.endswith("_proj.weight"):
            tensors[key], scales = _quantized(tensor, block)
            tensors[key.removesuffix("weight") + scale] = scales if block else scales.reshape(())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _state(path, {"quant_method": "fp8", "weight_block_size": list(block) if block else None})
    return path


def _state(path: Path, quantization: Any, key: str = "quantization_config") -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: quantization}))


def _reference(path: Path, block: tuple[int, int] | None) -> dict[str, Tensor]:
    """Every tensor decoded, by an independent reading of the file."""
    raw = load_file(path / "model.safetensors")
    scales = {k.removesuffix("_scale_inv"): t for k, t in raw.items() if k.endswith("_scale_inv")}
    return {
        key: _decoded(t, scales[key], block) if key in scales else t
        for key, t in raw.items()
        if not key.endswith("_scale_inv")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [BLOCK, (128, 128), (16, 16), None])
def test_every_tensor_decodes_to_value_times_scale_of_its_block(
    family: str, block: tuple[int, int] | None, convert: Convert
) -> None:
    path = convert(family, block)
    wanted = _reference(path, block)
    directory = Directory(path)
    assert set(directory.infos) == set(wanted)
    for key, tensor in wanted.items():
        info, found = directory.infos[key], directory.read_hub(key)
        assert (info.shape, info.dtype) == (tuple(found.shape), found.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(found, tensor), key
        if len(tensor) > 20:
            assert torch.equal(directory.read_hub(key, range(7, 20)), tensor[7:20]), key


def test_decoding_is_transformers_own(convert: Convert) -> None:
    path = convert("qwen3_moe", (16, 32))
    raw, directory = load_file(path / "model.safetensors"), Directory(path)
    theirs = Fp8Dequantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    for key in (k for k in raw if raw[k].dtype == FP8):
        wanted = theirs._dequantize_one(raw[key], raw[f"{key}_scale_inv"], output_dtype=torch.bfloat16)
        assert torch.equal(directory.read_hub(key), wanted), key


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_experts_are_made_of_decoded_tensors(
    family: str, zoo: Zoo, convert: Convert, tmp_path: Path
) -> None:
    path = convert(family)
    plain = Path(shutil.copytree(zoo(family), tmp_path / "decoded"))
    save_file(_reference(path, BLOCK), plain / "model.safetensors", {"format": "pt"})
    model, directory = load(plain), Directory(path)
    directory.attach(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(directory.read(name), parameter.detach()), name
        if parameter.dim() == 3:
            for expert in range(EXPERTS):
                assert torch.equal(directory.read_expert(name, expert), parameter[expert]), name


def test_an_expert_is_decoded_from_its_own_bytes(
    convert: Convert, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(convert("qwen3_moe"))
    directory.attach(load(zoo("qwen3_moe")))
    seen = []
    plain = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda *a: (seen.append(a[1]), plain(*a))[1])  # type: ignore[func-returns-value]
    directory.read_expert("model.layers.1.mlp.experts.down_proj", 3)
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert seen == [key, f"{key}_scale_inv"]


def _fused(path: Path, zoo: Zoo, block: tuple[int, int]) -> dict[str, Tensor]:
    """Store a layer's experts in one e4m3 tensor [E, out, in] with scales [E, ., .]; the decoded ones."""
    tensors = load_file(path / "model.safetensors")
    kept = {k: t for k, t in tensors.items() if ".experts." not in k}
    wanted = {}
    for name, parameter in load(zoo("qwen3_moe")).named_parameters():
        if parameter.dim() == 3:
            kept[name], scales = _quantized(parameter.detach(), block)
            kept[f"{name}_scale_inv"] = scales
            wanted[name] = _decoded(kept[name], scales, block)
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return wanted


def test_rows_of_a_fused_tensor_read_only_their_scales(convert: Convert, zoo: Zoo) -> None:
    path = convert("qwen3_moe")
    wanted = _fused(path, zoo, BLOCK)
    directory = Directory(path)
    directory.attach(load(zoo("qwen3_moe")))
    for name, tensor in wanted.items():
        assert torch.equal(directory.read(name), tensor), name
        for expert in range(EXPERTS):
            assert torch.equal(directory.read_expert(name, expert), tensor[expert])
        for rows in (range(16), range(5, 31), range(1, 32, 2), range(23, 25)):
            out = torch.empty(len(rows), tensor.shape[-1], dtype=torch.bfloat16)
            directory._rows(name, rows, 3, out)
            assert torch.equal(out, tensor[3][rows.start : rows.stop : rows.step]), rows


@pytest.mark.parametrize("scale", ["weight_scale", "scale"])
def test_scales_under_every_name_they_go_by(scale: str, convert: Convert) -> None:
    wanted = _reference(convert("llama"), BLOCK)
    directory = Directory(convert("llama", BLOCK, scale))
    assert set(directory.infos) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(directory.read_hub(key), tensor), key


def test_scales_that_are_powers_of_two_in_a_byte_each(convert: Convert) -> None:
    path = convert("llama")
    key = "model.layers.0.mlp.up_proj.weight"
    scales = load_file(path / "model.safetensors")[f"{key}_scale_inv"].log2().ceil().exp2()
    add_tensors(path, {f"{key}_scale_inv": scales.to(torch.float8_e8m0fnu)})
    wanted = _decoded(load_file(path / "model.safetensors")[key], scales, BLOCK)
    assert torch.equal(Directory(path).read_hub(key), wanted)


def test_scales_of_inputs_and_of_the_cache_are_left_behind(convert: Convert) -> None:
    path = convert("llama", None)
    names = [f"model.layers.0.self_attn.k_proj.{s}" for s in ("input_scale", "activation_scale", "k_scale")]
    add_tensors(path, {name: torch.tensor(0.5) for name in names})
    assert not set(names) & set(Directory(path).infos)


@pytest.mark.slow
def test_an_fp8_checkpoint_compiles_like_its_decoded_source(
    zoo: Zoo, convert: Convert, tmp_path: Path
) -> None:
    """DeepSeek-V3 with its multi-token-prediction layer, which the model class ignores, in FP8 as well."""
    path = convert("deepseek_v3")
    plain = Path(shutil.copytree(zoo("deepseek_v3"), tmp_path / "decoded"))
    save_file(_reference(path, BLOCK), plain / "model.safetensors", {"format": "pt"})
    for source, out in ((path, "from_fp8"), (plain, "from_plain")):
        fxq.compile(source, "nvfp4_weight_only", out=tmp_path / out)
    assert reader.check(tmp_path / "from_fp8") == []
    files = {p.name for p in (tmp_path / "from_plain").iterdir() if p.is_file()}
    assert {p.name for p in (tmp_path / "from_fp8").iterdir() if p.is_file()} == files
    for name in files - {"README.md"}:  # which names the source
        assert (tmp_path / "from_fp8" / name).read_bytes() == (tmp_path / "from_plain" / name).read_bytes()
    assert not any("scale_inv" in key for key in reader.read_checkpoint(tmp_path / "from_fp8").tensors)


def test_the_output_does_not_say_how_the_source_was_stored() -> None:
    config = {"a": 1, "quantization_config": {}, "text_config": {"b": [2], "quantization_config": {"c": 3}}}
    assert without_encoding(config) == {"a": 1, "text_config": {"b": [2]}}


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(fxq.SourceError) as caught:
        Directory(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1


OTHERS = ["gptq", "awq", "bitsandbytes", "compressed-tensors", "modelopt", "hqq", "quark", "no-such", None, 7]


@pytest.mark.parametrize("method", OTHERS)
def test_another_format_is_refused_by_name(method: Any, zoo: Zoo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    _state(path, {"quant_method": method, "bits": 4})
    _refused(path, "config.json: quantization_config", str(method), "dequantize it first")


def test_a_format_that_a_sub_config_or_another_file_states_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(zoo("llama"), tmp_path / "inner"))
    _state(path, {"quantization_config": {"quant_method": "gptq"}}, "text_config")
    _refused(path, "text_config.quantization_config", "gptq")
    path = Path(shutil.copytree(zoo("llama"), tmp_path / "older"))
    _state(path, {"format": "int-quantized"}, "compression_config")
    _refused(path, "compression_config", "compressed-tensors")
    path = Path(shutil.copytree(zoo("llama"), tmp_path / "modelopt"))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "INT4_AWQ"}}')
    _refused(path, "hf_quant_config.json", "modelopt")


@pytest.mark.parametrize("block", [[128], 128, [0, 128], [128, 1.5], "128", [True, 128], {}])
def test_a_block_size_that_is_none(block: Any, convert: Convert) -> None:
    path = convert("llama")
    _state(path, {"quant_method": "fp8", "weight_block_size": block})
    _refused(path, "weight_block_size", str(block))


KEY = "model.layers.1.mlp.down_proj.weight"


def test_a_missing_scale_is_named(convert: Convert) -> None:
    path = convert("llama")
    drop_tensors(path, f"{KEY}_scale_inv")
    _refused(path, KEY, f"{KEY}_scale_inv", "[64, 96]")


def test_a_scale_without_its_weight_is_named(convert: Convert) -> None:
    path = convert("llama")
    drop_tensors(path, KEY)
    _refused(path, f"{KEY}_scale_inv", "missing")
    add_tensors(path, {KEY: torch.zeros(64, 96).bfloat16()})
    _refused(path, f"{KEY}_scale_inv", "bfloat16 [64, 96]")


def test_a_scale_that_does_not_fit_is_named_with_both_shapes(convert: Convert) -> None:
    path = convert("llama")
    add_tensors(path, {f"{KEY}_scale_inv": torch.ones(4, 3)})
    _refused(path, f"{KEY}_scale_inv", "[4, 3]", "[3, 3]", "24x40")
    add_tensors(path, {f"{KEY}_scale_inv": torch.ones(3, 3, dtype=torch.int32)})
    _refused(path, f"{KEY}_scale_inv", "int32")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_that_nothing_explains_is_refused_by_tensor(dtype: torch.dtype, zoo: Zoo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    add_tensors(path, {KEY: torch.ones(64, 96).to(dtype)})
    _refused(path, KEY, str(dtype).removeprefix("torch."), "quantization_config")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_found_when_read(value: float, convert: Convert) -> None:
    path = convert("llama")
    scales = load_file(path / "model.safetensors")[f"{KEY}_scale_inv"]
    scales[1, 2] = value
    add_tensors(path, {f"{KEY}_scale_inv": scales})
    with pytest.raises(fxq.SourceError, match=f"{KEY}_scale_inv"):
        Directory(path).read_hub(KEY)


def test_an_e4m3_nan_is_found_when_its_weight_is_quantized(convert: Convert, tmp_path: Path) -> None:
    path = convert("llama")
    values = load_file(path / "model.safetensors")[KEY].view(torch.uint8)
    values[3, 5] = 0x7F
    add_tensors(path, {KEY: values.view(FP8)})
    with pytest.raises(fxq.SourceError, match=r"down_proj.*NaN"):
        fxq.compile(path, "nvfp4_weight_only", out=tmp_path / "out")
