"""ModelOpt's NVFP4 and FP8, as vLLM, SGLang and TensorRT-LLM read it: tensor names, scales as multipliers,
two config files."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq.checkpoint.formats import Scheme
from fxq.graph.hub import TensorInfo
from fxq.numbers import fp8, nvfp4
from fxq.numbers.nvfp4 import BLOCK, global_scale

# Engines read the producer's format by this name; the version is that of the layout written here.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_GROUPS: dict[Scheme, dict[str, Any]] = {
    Scheme.NVFP4: {"input_activations": _FP4, "weights": _FP4},
    Scheme.W4A16: {"input_activations": None, "weights": _FP4},
    Scheme.FP8: {"input_activations": _FP8, "weights": _FP8},
}


def tensor_names(key: str) -> dict[str, str]:
    """The names of a quantized tensor and its three scales: `m.weight_scale` for a tensor `m.weight`,
    `K_weight_scale` for one called otherwise."""
    module = key.removesuffix("weight") if key.endswith(".weight") else f"{key}_"
    scales = {name: f"{module}{name}" for name in ("weight_scale", "weight_scale_2", "input_scale")}
    return {"weight": key, **scales}


def weight_infos(
    key: str, shape: Sequence[int], scheme: Scheme, *, transposed: bool
) -> dict[str, TensorInfo]:
    """The tensors of one quantized tensor of the checkpoint: [..., out, in], or [..., in, out] if
    `transposed`; blocks lie along `in`."""
    names, axis = tensor_names(key), -2 if transposed else -1
    scalar = TensorInfo.of((), torch.float32)

    def over(n: int) -> tuple[int, ...]:
        sizes = list(shape)
        sizes[axis] //= n
        return tuple(sizes)

    if scheme is Scheme.FP8:
        infos = {
            names["weight"]: TensorInfo.of(tuple(shape), torch.float8_e4m3fn),
            names["weight_scale"]: scalar,
        }
    else:
        infos = {
            names["weight"]: TensorInfo.of(over(2), torch.uint8),
            names["weight_scale"]: TensorInfo.of(over(BLOCK), torch.float8_e4m3fn),
            names["weight_scale_2"]: scalar,
        }
    if scheme is not Scheme.W4A16:
        infos[names["input_scale"]] = scalar
    return infos


def weight_tensors(key: str, packed: nvfp4.Packed | fp8.Packed) -> dict[str, Tensor]:
    """What has rows, under its names: the quantized weight, [out, in/2] or of FP8 [out, in], and NVFP4's
    block scales, [out, in/16]."""
    names = tensor_names(key)
    if isinstance(packed, fp8.Packed):
        return {names["weight"]: packed.weight}
    return {names["weight"]: packed.weight, names["weight_scale"]: packed.scale}


def scalar_tensors(
    key: str, packed: nvfp4.Packed | fp8.Packed, input_amax: Tensor | None
) -> dict[str, Tensor]:
    """The global scales, decode multipliers all: amax / 2688, for FP8 amax / 448."""
    names, is_fp8 = tensor_names(key), isinstance(packed, fp8.Packed)
    if isinstance(packed, fp8.Packed):
        tensors = {names["weight_scale"]: packed.scale}
    else:
        tensors = {names["weight_scale_2"]: packed.scale_2}
    if input_amax is not None:
        tensors[names["input_scale"]] = (fp8.scale_of if is_fp8 else global_scale)(input_amax)
    return tensors


def kv_infos(attention: str) -> dict[str, TensorInfo]:
    """The two scales of one attention's FP8 cache."""
    return {f"{attention}.{t}_proj.{t}_scale": TensorInfo.of((), torch.float32) for t in "kv"}


def kv_tensors(attention: str, k_amax: Tensor, v_amax: Tensor) -> dict[str, Tensor]:
    """amax / 448 each, as multipliers; never zero."""
    amaxes = {"k": k_amax, "v": v_amax}
    return {f"{attention}.{t}_proj.{t}_scale": fp8.scale_of(amax) for t, amax in amaxes.items()}


def config_files(
    source: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    excluded: Sequence[str],
    *,
    kv_format: str | None,
) -> dict[str, dict[str, Any]]:
    """config.json: the source's own plus `quantization_config`; hf_quant_config.json: the same facts again.

    schemes: quantized tensor -> its scheme; several make it MIXED_PRECISION, which lists every module.
    """
    quantized = [key.removesuffix(".weight") for key in schemes]
    entries = sorted({_unambiguous(module, quantized) for module in excluded})
    used = sorted(set(schemes.values()))
    algorithm = used[0].value if len(used) == 1 else "MIXED_PRECISION"
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
    if len(used) == 1:
        flat["config_groups"] = {"group_0": {**_GROUPS[used[0]], "targets": ["Linear"]}}
    flat |= {"ignore": entries, "producer": _PRODUCER}
    nested: dict[str, Any] = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if kv_format == "fp8" else None,
        "group_size": None if used == [Scheme.FP8] else BLOCK,
        "exclude_modules": entries,
    }
    if kv_format == "fp8":
        flat["kv_cache_scheme"] = _FP8
    if len(used) > 1:
        layers = {key.removesuffix(".weight"): _layer(scheme) for key, scheme in schemes.items()}
        flat["quantized_layers"] = nested["quantized_layers"] = layers
    return {
        "config.json": {**source, "quantization_config": flat},
        "hf_quant_config.json": {"producer": _PRODUCER, "quantization": nested},
    }


def _layer(scheme: Scheme) -> dict[str, Any]:
    size = {} if scheme is Scheme.FP8 else {"group_size": BLOCK}
    return {"quant_algo": scheme.value, **size}


def _unambiguous(module: str, quantized: Sequence[str]) -> str:
    """An entry that no engine takes for part of a quantized module's name: vLLM matches plain entries as
    substrings, and any entry as a glob of the whole name."""
    hit = any(module in name and module != name for name in quantized)
    return module[:-1] + "?" if hit else module
