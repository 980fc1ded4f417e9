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
from fxq.numbers import fp8, nvfp4
from fxq.numbers.nvfp4 import BLOCK, global_scale

_FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
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
    if scheme is Scheme.FP8:
        raise CheckpointError(
            f"{key}: fxq writes FP8 weights as ModelOpt does, not as compressed-tensors; use "
            "--format modelopt"
        )
    if len(shape) != 2 or transposed:
        raise CheckpointError(
            f"{key}: compressed-tensors packs matrices [out, in] alone, found {list(shape)}"
            f"{' as [in, out]' if transposed else ''}; use --format modelopt"
        )
    out, width = shape
    infos = {
        names["weight_packed"]: TensorInfo.of((out, width // 2), torch.uint8),
        names["weight_scale"]: TensorInfo.of((out, width // BLOCK), torch.float8_e4m3fn),
        names["weight_global_scale"]: _SCALAR,
    }
    if scheme is Scheme.NVFP4:
        infos[names["input_global_scale"]] = _SCALAR
    return infos


def weight_tensors(key: str, packed: nvfp4.Packed | fp8.Packed) -> dict[str, Tensor]:
    """The packed weight and its block scales under their names, [out, in/2] and [out, in/16]."""
    names = tensor_names(key)
    return {names["weight_packed"]: packed.weight, names["weight_scale"]: packed.scale}


def scalar_tensors(
    key: str, packed: nvfp4.Packed | fp8.Packed, input_amax: Tensor | None
) -> dict[str, Tensor]:
    """The global scales as divisors, float32 [1]."""
    assert isinstance(packed, nvfp4.Packed)
    names = tensor_names(key)
    tensors = {names["weight_global_scale"]: _divisor(packed.scale_2)}
    if input_amax is not None:
        tensors[names["input_global_scale"]] = _divisor(global_scale(input_amax))
    return tensors


def _divisor(multiplier: Tensor) -> Tensor:
    return multiplier.reciprocal().reshape(1)


def kv_infos(attention: str) -> dict[str, TensorInfo]:
    """The two scales of one attention's FP8 cache."""
    return {f"{attention}.{t}_scale": _SCALAR for t in "kv"}


def kv_tensors(attention: str, k_amax: Tensor, v_amax: Tensor) -> dict[str, Tensor]:
    """amax / 448 each, as multipliers; never zero."""
    amaxes = {"k": k_amax, "v": v_amax}
    return {f"{attention}.{t}_scale": fp8.scale_of(amax).reshape(1) for t, amax in amaxes.items()}


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
            f"{' and '.join(used)} in one model: fxq writes such a mixture as ModelOpt does, not as "
            "compressed-tensors; use --format modelopt"
        )
    inputs = {**_FP4, "dynamic": "local"} if used == [Scheme.NVFP4] else None
    group = {"targets": ["Linear"], "weights": _FP4, "input_activations": inputs, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": "nvfp4-pack-quantized"}},
        "ignore": list(excluded),
        "kv_cache_scheme": _FP8 if kv_format == "fp8" else None,
    }
    return {"config.json": {**source, "quantization_config": quantization}}
