"""NVFP4 checkpoints as sources, whoever wrote them: ModelOpt's and compressed-tensors', mixed with FP8.

Which tensors are quantized, and how, is read from the tensors; the configs say whether inputs are, and what
the cache is. What cannot be decoded, or would run otherwise than fxq simulates, is refused by name.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fxq.errors import SourceError, and_more
from fxq.graph.hub import TensorInfo
from fxq.numbers.nvfp4 import BLOCK
from fxq.sources.files import json_object
from fxq.sources.fp8_blocks import (
    Activations,
    Encoding,
    Fp8Weight,
    InputScale,
    Nvfp4Weight,
    decoded_dtype,
    not_read,
    said,
    stated_in,
)

NESTED = "hf_quant_config.json"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "MIXED_PRECISION")
_FORMATS = ("nvfp4-pack-quantized", "float-quantized", "mixed-precision")
_E4M3 = torch.float8_e4m3fn
_CACHE_SCALES = ("k_scale", "v_scale")
_LEFT_OUT = (*_CACHE_SCALES, "q_scale", "prob_scale")
Infos = Mapping[str, TensorInfo]


def nvfp4_encoding(config: Mapping[str, Any], raw: Infos, where: Path) -> Encoding | None:
    """How the tensors `raw` of an NVFP4 (or per-tensor FP8) checkpoint decode, and what its activations are
    quantized with; None if it is none. SourceError if it declares, or holds, what cannot be followed."""
    key, stated = stated_in(config) or ("", None)
    if stated is None and (where / NESTED).is_file():
        key, stated = NESTED, json_object(where / NESTED).get("quantization")
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method", "modelopt" if key == NESTED else None))
    if method.startswith("modelopt"):
        weight_only = _check_modelopt(key, stated, where)
    elif method == "compressed-tensors":
        weight_only = _check_compressed(key, stated, where)
    else:
        return None
    if (rotated := next((name for name in raw if name.endswith("pre_quant_scale")), None)) is not None:
        raise not_read(rotated, "AWQ, which scales inputs before they are quantized", where)
    packed = dict(_packed(raw, where))
    taken = {name for p in packed.values() for name in (p.weight, p.scale, p.scale_2)}
    eights = [name for name, info in raw.items() if _is_fp8(info) and name not in taken]
    scaled = {name: _scaled(name, raw[name], raw, where) for name in eights}
    taken |= {pair.key for pair in scaled.values()}
    inputs = {name: found for name, found in _inputs(packed, scaled, raw) if not weight_only(name)}
    taken |= {scale.key for _, scale in _inputs(packed, scaled, raw)}
    caches = tuple(name for name in raw if name.rpartition(".")[2] in _CACHE_SCALES)
    dtype = decoded_dtype(config, raw, taken)
    infos = {name: TensorInfo(_shape(p, raw), dtype) for name, p in packed.items()}
    infos |= {name: TensorInfo(raw[name].shape, dtype) for name in scaled}
    for name, info in raw.items():
        if name not in taken and name not in infos and name.rpartition(".")[2] not in _LEFT_OUT:
            infos[name] = info
    notes = tuple(_notes(packed, scaled, inputs, weight_only, stated))
    fp8_cache = _fp8_cache(key, stated, where)
    return Encoding(infos, scaled, packed, Activations(inputs, fp8_cache, caches, notes))


class _WeightOnly:
    """Whether the configs give a weight inputs that stay as they are."""

    def __init__(self, algorithm: str, layers: Mapping[str, str]) -> None:
        self.algorithm, self.layers = algorithm, layers

    def __call__(self, weight: str) -> bool:
        parts = weight.removesuffix(".weight").split(".")
        around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self.layers[m] for m in around if m in self.layers), self.algorithm) == "W4A16_NVFP4"


def _check_modelopt(key: str, stated: Mapping[str, Any], where: Path) -> _WeightOnly:
    algorithm = str(stated.get("quant_algo")).upper()
    groups = _objects(stated.get("config_groups"))
    if algorithm == "NVFP4" and groups and all(g.get("input_activations") is None for g in groups):
        algorithm = "W4A16_NVFP4"
    listed = stated.get("quantized_layers")
    layers = {
        str(name): str(layer.get("quant_algo")).upper()
        for name, layer in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(layer, dict)
    }
    for found in (algorithm, *layers.values()):
        if found not in _ALGORITHMS:
            raise not_read(key, f"modelopt's {found}", where)
    return _WeightOnly(algorithm, layers)


def _check_compressed(key: str, stated: Mapping[str, Any], where: Path) -> _WeightOnly:
    groups = _objects(stated.get("config_groups"))
    formats = {str(g.get("format") or stated.get("format")) for g in groups} | {str(stated.get("format"))}
    for found in sorted(formats - set(_FORMATS)):
        raise not_read(key, f"compressed-tensors' {found}", where)
    if stated.get("transform_config"):
        raise not_read(key, "compressed-tensors with transforms of activations", where)
    fours = [g for g in groups if (g.get("weights") or {}).get("num_bits") == 4]
    plain = bool(fours) and all(g.get("input_activations") is None for g in fours)
    return _WeightOnly("W4A16_NVFP4" if plain and len(fours) == len(groups) else "NVFP4", {})


def _objects(value: object) -> list[dict[str, Any]]:
    return [v for v in value.values() if isinstance(v, dict)] if isinstance(value, dict) else []


def _fp8_cache(key: str, stated: Mapping[str, Any], where: Path) -> bool:
    """Whether the KV cache is FP8 with a fixed scale; SourceError if it is quantized otherwise."""
    found = stated.get("kv_cache_scheme", stated.get("kv_cache_quant_algo"))
    if found is None:
        return False
    if isinstance(found, dict):
        fits = found.get("num_bits") == 8 and found.get("type") == "float" and not found.get("dynamic")
    else:
        fits = str(found).upper() == "FP8"
    if not fits:
        raise not_read(key, f"a KV cache of {found}", where)
    return True


def _packed(raw: Infos, where: Path) -> Iterator[tuple[str, Nvfp4Weight]]:
    """Every weight of uint8 codes under the hub's name; SourceError where its scales are missing or do not
    fit."""
    for name, info in raw.items():
        if info.dtype != torch.uint8:
            continue
        if name.endswith(".weight_packed"):
            module = name.removesuffix("weight_packed")
            found = _checked(name, module, "weight_global_scale", raw, where)
            yield f"{module}weight", found
        elif name.endswith(".weight"):
            yield name, _checked(name, name.removesuffix("weight"), "weight_scale_2", raw, where)
        elif f"{name}_weight_scale" in raw:
            yield name, _checked(name, f"{name}_", "weight_scale_2", raw, where)


def _checked(name: str, module: str, scale_2: str, raw: Infos, where: Path) -> Nvfp4Weight:
    codes, names = raw[name], (f"{module}weight_scale", f"{module}{scale_2}")
    for needed in names:
        if needed not in raw:
            raise SourceError(f"{where}: {name} is {said(codes)}, but there is no {needed} to decode it with")
    scale, scalar = (raw[n] for n in names)
    rows, width = codes.shape[-2:] if len(codes.shape) > 1 else (0, 0)
    lead = codes.shape[:-2]
    along_rows = scale.shape == (*lead, rows // 8, width) and rows % 8 == 0
    fits = (scale.shape == (*lead, rows, width // 8) and width % 8 == 0) or along_rows
    if scale.dtype != _E4M3 or not rows or not fits:
        raise SourceError(
            f"{where}: {names[0]} is {said(scale)}; {name} {list(codes.shape)} needs float8_e4m3fn "
            f"{[*lead, rows, width // 8]}, one for {BLOCK} elements"
        )
    if scalar.dtype != torch.float32 or math.prod(scalar.shape) not in (1, math.prod(lead)):
        raise SourceError(f"{where}: {names[1]} is {said(scalar)}; expected one float32 of {name}")
    return Nvfp4Weight(name, *names, scale_2 == "weight_global_scale", along_rows)


def _shape(packed: Nvfp4Weight, raw: Infos) -> tuple[int, ...]:
    shape = list(raw[packed.weight].shape)
    shape[-2 if packed.along_rows else -1] *= 2
    return tuple(shape)


def _is_fp8(info: TensorInfo) -> bool:
    return info.dtype == _E4M3 and len(info.shape) > 1


def _scaled(name: str, info: TensorInfo, raw: Infos, where: Path) -> Fp8Weight:
    """An FP8 weight with one scale, one a matrix, or one a row."""
    module = _module(name)
    key = next((k for k in (f"{module}weight_scale", f"{name}_scale") if k in raw), None)
    if key is None:
        raise SourceError(
            f"{where}: {name} is {said(info)}, but there is no {module}weight_scale to decode it with"
        )
    scale, (*lead, rows, width) = raw[key], info.shape
    if scale.dtype.is_floating_point and scale.dtype.itemsize > 1:
        if math.prod(scale.shape) == 1:
            return Fp8Weight(key, (rows, width), shared=math.prod(lead) > 1)
        if scale.shape in ((*lead,), (*lead, 1, 1)):
            return Fp8Weight(key, (rows, width))
        if scale.shape in ((*lead, rows), (*lead, rows, 1)):
            return Fp8Weight(key, (1, width))
    raise SourceError(f"{where}: {key} is {said(scale)}; {name} {list(info.shape)} needs one, or one a row")


def _module(weight: str) -> str:
    """What a weight's scales are called before their own names."""
    return weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"


def _inputs(
    packed: Mapping[str, Nvfp4Weight], scaled: Iterable[str], raw: Infos
) -> Iterator[tuple[str, InputScale]]:
    """Weight -> the scale of its input, of those that have one."""
    for name, codes in packed.items():
        key = f"{_module(name)}input_{'global_' if codes.is_divisor else ''}scale"
        if key in raw:
            yield name, InputScale(key, "nvfp4", codes.is_divisor)
    for name in scaled:
        if (key := f"{_module(name)}input_scale") in raw:
            yield name, InputScale(key, "fp8")


def _notes(
    packed: Iterable[str],
    scaled: Iterable[str],
    inputs: Mapping[str, InputScale],
    weight_only: _WeightOnly,
    stated: Mapping[str, Any],
) -> Iterator[str]:
    """Where engines do to inputs what is not simulated."""
    compressed = any(
        group.get("input_activations") is None for group in _objects(stated.get("config_groups"))
    )
    bare = [name for name in packed if name not in inputs and not weight_only(name) and not compressed]
    if bare:
        yield (
            f"{and_more(bare)}: no input scale, although 4-bit inputs are declared; simulated "
            "without, but engines take whatever memory holds (fxq verify)"
        )
    free = [name for name in scaled if name not in inputs]
    if free:
        yield (
            f"{and_more(free)}: FP8 without an input scale; engines quantize its input token by "
            "token, which is not simulated"
        )
