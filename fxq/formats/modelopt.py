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


def linear_infos(name: str, rows: int, width: int, *, has_input: bool) -> dict[str, TensorInfo]:
    """The tensors of one quantized linear [rows, width]."""
    infos = {
        f"{name}.weight": TensorInfo((rows, width // 2), torch.uint8),
        f"{name}.weight_scale": TensorInfo((rows, width // BLOCK), torch.float8_e4m3fn),
        f"{name}.weight_scale_2": TensorInfo((), torch.float32),
    }
    if has_input:
        infos[f"{name}.input_scale"] = TensorInfo((), torch.float32)
    return infos


def linear_tensors(name: str, packed: Packed, input_amax: Tensor | None) -> dict[str, Tensor]:
    """The values of `linear_infos`; both global scales are decode multipliers, amax / 2688."""
    tensors = {
        f"{name}.weight": packed.weight,
        f"{name}.weight_scale": packed.scale,
        f"{name}.weight_scale_2": packed.scale_2,
    }
    if input_amax is not None:
        tensors[f"{name}.input_scale"] = global_scale(input_amax)
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
