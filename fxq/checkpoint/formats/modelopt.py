"""ModelOpt's NVFP4 and FP8, as vLLM, SGLang and TensorRT-LLM read it: tensor names, scales as multipliers,
two config files."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq.checkpoint.formats import Scheme
from fxq.errors import CheckpointError
from fxq.graph.hub import TensorInfo
from fxq.numbers.formats import FORMATS, Packed

# Engines read the producer's format by this name; the version is that of the layout written here.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
# Number format -> its entry in a group of the config, and the name of each part of a packed weight.
_CONFIGS: dict[str, dict[str, Any]] = {
    "nvfp4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": FORMATS["nvfp4"].block},
    "fp8": {"dynamic": False, "num_bits": 8, "type": "float"},
    "fp8_blocks": {
        "dynamic": False,
        "num_bits": 8,
        "type": "float",
        "group_size": FORMATS["fp8_blocks"].block,
    },
}
_PARTS = {
    "nvfp4": {"weight": "weight", "scale": "weight_scale", "scale_2": "weight_scale_2"},
    "fp8": {"weight": "weight", "scale": "weight_scale"},
    "fp8_blocks": {"weight": "weight", "scale": "weight_scale"},
}
_ALGORITHMS = {
    Scheme("nvfp4", inputs=True): "NVFP4",
    Scheme("nvfp4", inputs=False): "W4A16_NVFP4",
    Scheme("fp8", inputs=True): "FP8",
    Scheme("fp8_blocks", inputs=True): "FP8_PB_WO",
}
_CACHE_ALGORITHMS = {"fp8": "FP8"}


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
    if scheme not in _ALGORITHMS:
        raise CheckpointError(f"{key}: ModelOpt has no name for {scheme}; it has {_known()}")
    names, format = tensor_names(key), FORMATS[scheme.format]
    scalar = TensorInfo.of((), torch.float32)
    infos = {}
    for part in format.parts:
        if part.per is None:
            infos[names[_PARTS[scheme.format][part.name]]] = scalar
            continue
        *lead, rows, width = part.shape((*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape))
        sizes: tuple[int, ...] = (*lead, width, rows) if transposed else (*lead, rows, width)
        if part.tall > 1:
            if len(shape) != 2 or transposed:
                raise CheckpointError(f"{key}: {format.title} is for matrices [out, in], found {list(shape)}")
            sizes = rows, 1, width, 1  # ModelOpt keeps the dimensions within blocks
        infos[names[_PARTS[scheme.format][part.name]]] = TensorInfo.of(sizes, part.dtype)
    if scheme.inputs and format.has_amaxes:
        infos[names["input_scale"]] = scalar
    return infos


def _known() -> str:
    return ", ".join(map(str, _ALGORITHMS))


def weight_tensors(key: str, packed: Packed, format: str) -> dict[str, Tensor]:
    """What has rows, under its names: the codes, [out, in/2] or of FP8 [out, in], and NVFP4's block scales,
    [out, in/16]."""
    names, parts = tensor_names(key), FORMATS[format].rows(packed)
    tall = {part.name: part.tall for part in FORMATS[format].parts}
    return {
        names[_PARTS[format][part]]: tensor if tall[part] == 1 else tensor[:, None, :, None]
        for part, tensor in parts.items()
    }


def scalar_tensors(key: str, packed: Packed, format: str) -> dict[str, Tensor]:
    """The weight's global scale, a decode multiplier: amax / 2688, for FP8 amax / 448."""
    names, parts = tensor_names(key), FORMATS[format].scalars(packed)
    return {names[_PARTS[format][part]]: scale for part, scale in parts.items()}


def input_tensors(key: str, format: str, amax: Tensor) -> dict[str, Tensor]:
    """The scale of its inputs, alike."""
    return {tensor_names(key)["input_scale"]: FORMATS[format].scale_of(amax)}


def kv_infos(attention: str, format: str, *, calibrated: bool) -> dict[str, TensorInfo]:
    """The two scales of one attention's cache; none where nothing was calibrated, as engines take 1.0."""
    if format not in _CACHE_ALGORITHMS:
        raise CheckpointError(f"{attention}: ModelOpt has no name for a cache in {format}")
    info = TensorInfo.of((), torch.float32)
    return {f"{attention}.{t}_proj.{t}_scale": info for t in "kv"} if calibrated else {}


def kv_tensors(
    attention: str, k_amax: Tensor | None, v_amax: Tensor | None, format: str
) -> dict[str, Tensor]:
    """Of FP8 amax / 448 each, as multipliers; never zero."""
    amaxes = {"k": k_amax, "v": v_amax}
    scale_of = FORMATS[format].scale_of
    return {f"{attention}.{t}_proj.{t}_scale": scale_of(a) for t, a in amaxes.items() if a is not None}


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
    used = set(schemes.values())
    only = next(iter(used)) if len(used) == 1 else None
    algorithm = "MIXED_PRECISION" if only is None else _ALGORITHMS[only]
    flat: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
    if only is not None:
        weights = _CONFIGS[only.format]
        inputs = weights if only.inputs else None
        flat["config_groups"] = {
            "group_0": {"input_activations": inputs, "weights": weights, "targets": ["Linear"]}
        }
    flat |= {"ignore": entries, "producer": _PRODUCER}
    nested: dict[str, Any] = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None if kv_format is None else _CACHE_ALGORITHMS[kv_format],
        "group_size": _group_size(used),
        "exclude_modules": entries,
    }
    if kv_format is not None:
        flat["kv_cache_scheme"] = _CONFIGS[kv_format]
    if len(used) > 1:
        layers = {key.removesuffix(".weight"): _layer(scheme) for key, scheme in schemes.items()}
        flat["quantized_layers"] = nested["quantized_layers"] = layers
    return {
        "config.json": {**source, "quantization_config": flat},
        "hf_quant_config.json": {"producer": _PRODUCER, "quantization": nested},
    }


def _group_size(schemes: Collection[Scheme]) -> int | None:
    """The block of those that have one; NVFP4's, the smallest, is the one that engines ask for."""
    return min((block for s in schemes if (block := FORMATS[s.format].block) is not None), default=None)


def _layer(scheme: Scheme) -> dict[str, Any]:
    block = FORMATS[scheme.format].block
    return {"quant_algo": _ALGORITHMS[scheme], **({} if block is None else {"group_size": block})}


def _unambiguous(module: str, quantized: Sequence[str]) -> str:
    """An entry that no engine takes for part of a quantized module's name: vLLM matches plain entries as
    substrings, and any entry as a glob of the whole name."""
    hit = any(module in name and module != name for name in quantized)
    return module[:-1] + "?" if hit else module
