"""ModelOpt NVFP4, as vLLM, SGLang and TensorRT-LLM read it: tensor names, scales as multipliers, two
config files."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq.nvfp4 import BLOCK, E4M3_MAX, Packed, global_scale
from fxq.program import TensorInfo

# Engines read the producer's format by this name; the version is that of the layout written here.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def tensor_names(key: str) -> dict[str, str]:
    """The names of a quantized tensor and its three scales: `m.weight_scale` for a tensor `m.weight`,
    `K_weight_scale` for one called otherwise."""
    module = key.removesuffix("weight") if key.endswith(".weight") else f"{key}_"
    scales = {name: f"{module}{name}" for name in ("weight_scale", "weight_scale_2", "input_scale")}
    return {"weight": key, **scales}


def weight_infos(
    key: str, shape: Sequence[int], *, transposed: bool, has_input: bool
) -> dict[str, TensorInfo]:
    """The tensors of one quantized tensor of the checkpoint: [..., out, in], or [..., in, out] if
    `transposed`; blocks lie along `in`."""
    names, axis = tensor_names(key), -2 if transposed else -1

    def over(n: int) -> tuple[int, ...]:
        sizes = list(shape)
        sizes[axis] //= n
        return tuple(sizes)

    infos = {
        names["weight"]: TensorInfo(over(2), torch.uint8),
        names["weight_scale"]: TensorInfo(over(BLOCK), torch.float8_e4m3fn),
        names["weight_scale_2"]: TensorInfo((), torch.float32),
    }
    if has_input:
        infos[names["input_scale"]] = TensorInfo((), torch.float32)
    return infos


def weight_tensors(key: str, packed: Packed) -> dict[str, Tensor]:
    """The packed weight and its block scales under their names, [out, in/2] and [out, in/16]."""
    names = tensor_names(key)
    return {names["weight"]: packed.weight, names["weight_scale"]: packed.scale}


def scalar_tensors(key: str, packed: Packed, input_amax: Tensor | None) -> dict[str, Tensor]:
    """The global scales, both decode multipliers, amax / 2688."""
    names = tensor_names(key)
    tensors = {names["weight_scale_2"]: packed.scale_2}
    if input_amax is not None:
        tensors[names["input_scale"]] = global_scale(input_amax)
    return tensors


def kv_infos(attention: str) -> dict[str, TensorInfo]:
    """The two scales of one attention's FP8 cache."""
    return {f"{attention}.{t}_proj.{t}_scale": TensorInfo((), torch.float32) for t in "kv"}


def kv_tensors(attention: str, k_amax: Tensor, v_amax: Tensor) -> dict[str, Tensor]:
    """amax / 448 each, as multipliers; never zero."""
    amaxes = {"k": k_amax, "v": v_amax}
    return {
        f"{attention}.{t}_proj.{t}_scale": torch.where(a > 0, a, torch.ones_like(a)).to(torch.float32)
        / E4M3_MAX
        for t, a in amaxes.items()
    }


def configs(
    source: Mapping[str, Any], excluded: Sequence[str], *, has_inputs: bool, kv_format: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, hf_quant_config.json): the source's own plus `quantization_config`, and the same
    facts again."""
    algorithm = "NVFP4" if has_inputs else "W4A16_NVFP4"
    floats = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    quantization: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "config_groups": {
            "group_0": {
                "input_activations": floats if has_inputs else None,
                "weights": floats,
                "targets": ["Linear"],
            }
        },
        "ignore": list(excluded),
        "producer": _PRODUCER,
    }
    if kv_format == "fp8":
        quantization["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    nested = {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8" if kv_format == "fp8" else None,
            "group_size": BLOCK,
            "exclude_modules": list(excluded),
        },
    }
    return {**source, "quantization_config": quantization}, nested
