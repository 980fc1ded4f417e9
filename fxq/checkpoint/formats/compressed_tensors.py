"""compressed-tensors' `nvfp4-pack-quantized`: the bytes of ModelOpt's NVFP4 under other names, global scales
as divisors.

A divisor is the float32 nearest to 1 / multiplier; engines take 1 / divisor, which is the multiplier or, half
an ulp each time, its neighbour. vLLM loads dense models and mixtures of experts. transformers loads dense
models (inputs are not quantized there); up to 5.23 it loads mixtures of experts without a word and wrongly,
its experts too large by their divisor (transformers#48371). A tensor that holds all experts of a layer has no
name in this format.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq.checkpoint.formats import Scheme
from fxq.errors import CheckpointError
from fxq.graph.hub import TensorInfo
from fxq.numbers.formats import FORMATS, NVFP4, Packed

_FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": NVFP4.block,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}
# Scheme -> the entries of its config group; number format -> the name of each part of a packed weight.
_GROUPS: dict[Scheme, dict[str, Any]] = {
    Scheme("nvfp4", inputs=True): {"weights": _FP4, "input_activations": {**_FP4, "dynamic": "local"}},
    Scheme("nvfp4", inputs=False): {"weights": _FP4, "input_activations": None},
}
_PARTS = {"nvfp4": {"weight": "weight_packed", "scale": "weight_scale", "scale_2": "weight_global_scale"}}
_CACHES = {"fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}}
_SCALAR = TensorInfo((1,), torch.float32)


def tensor_names(key: str) -> dict[str, str]:
    """The names of a linear's packed weight and scales; CheckpointError for what is no linear's weight."""
    if not key.endswith(".weight"):
        raise CheckpointError(
            f"{key}: compressed-tensors names packed weights `<module>.weight_packed` alone; this family's "
            "checkpoints hold other tensors, which only --format modelopt can express"
        )
    module = key.removesuffix("weight")
    names = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    return {name: f"{module}{name}" for name in names}


def weight_infos(
    key: str, shape: Sequence[int], scheme: Scheme, *, transposed: bool
) -> dict[str, TensorInfo]:
    """The tensors of one linear [out, in]; CheckpointError for anything else."""
    names = tensor_names(key)
    if scheme not in _GROUPS:
        raise CheckpointError(
            f"{key}: fxq writes {FORMATS[scheme.format].title} weights as ModelOpt does, not as "
            "compressed-tensors; use --format modelopt"
        )
    if len(shape) != 2 or transposed:
        raise CheckpointError(
            f"{key}: compressed-tensors packs matrices [out, in] alone, found {list(shape)}"
            f"{' as [in, out]' if transposed else ''}; use --format modelopt"
        )
    infos = {}
    for part in FORMATS[scheme.format].parts:
        info = TensorInfo.of(part.shape(tuple(shape)), part.dtype) if part.per is not None else _SCALAR
        infos[names[_PARTS[scheme.format][part.name]]] = info
    if scheme.inputs:
        infos[names["input_global_scale"]] = _SCALAR
    return infos


def weight_tensors(key: str, packed: Packed, format: str) -> dict[str, Tensor]:
    """The packed weight and its block scales under their names, [out, in/2] and [out, in/16]."""
    names, parts = tensor_names(key), FORMATS[format].rows(packed)
    return {names[_PARTS[format][part]]: tensor for part, tensor in parts.items()}


def scalar_tensors(key: str, packed: Packed, format: str) -> dict[str, Tensor]:
    """The weight's global scale as a divisor, float32 [1]."""
    names, parts = tensor_names(key), FORMATS[format].scalars(packed)
    return {names[_PARTS[format][part]]: _divisor(scale) for part, scale in parts.items()}


def input_tensors(key: str, format: str, amax: Tensor) -> dict[str, Tensor]:
    """The scale of its inputs, alike."""
    return {tensor_names(key)["input_global_scale"]: _divisor(FORMATS[format].scale_of(amax))}


def _divisor(multiplier: Tensor) -> Tensor:
    return multiplier.reciprocal().reshape(1)


def kv_infos(attention: str, format: str, *, calibrated: bool) -> dict[str, TensorInfo]:
    """The two scales of one attention's cache; transformers leaves those that are not stored as they are
    allocated."""
    if format not in _CACHES:
        raise CheckpointError(f"{attention}: compressed-tensors has no name for a cache in {format}")
    return {f"{attention}.{t}_scale": _SCALAR for t in "kv"}


def kv_tensors(
    attention: str, k_amax: Tensor | None, v_amax: Tensor | None, format: str
) -> dict[str, Tensor]:
    """Of FP8 amax / 448 each, as multipliers, never zero; 1.0 where nothing was calibrated."""
    amaxes = {"k": k_amax, "v": v_amax}
    scales = {t: torch.ones([]) if a is None else FORMATS[format].scale_of(a) for t, a in amaxes.items()}
    return {f"{attention}.{t}_scale": scale.reshape(1) for t, scale in scales.items()}


def config_files(
    source: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    excluded: Sequence[str],
    *,
    kv_format: str | None,
) -> dict[str, dict[str, Any]]:
    """config.json: the source's own plus `quantization_config`. Raises CheckpointError if some of `schemes`
    (quantized tensor -> its scheme) differ."""
    used = sorted(set(schemes.values()))
    if len(used) > 1:
        raise CheckpointError(
            f"{' and '.join(map(str, used))} in one model: fxq writes such a mixture as ModelOpt does, not "
            "as compressed-tensors; use --format modelopt"
        )
    group = {"targets": ["Linear"], **_GROUPS[used[0]], "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": "nvfp4-pack-quantized"}},
        "ignore": list(excluded),
        "kv_cache_scheme": None if kv_format is None else _CACHES[kv_format],
    }
    return {"config.json": {**source, "quantization_config": quantization}}
