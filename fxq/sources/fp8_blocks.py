"""FP8 checkpoints as sources: weights in e4m3 with a scale a block, decoded as they are read.

As DeepSeek-V3 introduced it: value = e4m3 * scale of its block. Every other way of storing numbers is refused
by name. Here are also the words in which any quantized checkpoint is described (`Encoding`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.graph.hub import TensorInfo

_FP8 = torch.float8_e4m3fn
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_KEYS = ("quantization_config", "compression_config")
# Scales of activations and of the KV cache, which the output has its own of.
_OTHER_SCALES = (".input_scale", ".activation_scale", "_activation_scale", ".k_scale", ".v_scale")
ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Fp8Weight:
    """An e4m3 tensor [..., N, K] and where its scales lie.

    key: the tensor of scales, [..., ceil(N / block[0]), ceil(K / block[1])]; a block as large as the matrix
    means one scale for all of it, which may have any shape of one element a matrix. shared: all matrices have
    the scales of one.
    """

    key: str
    block: tuple[int, int]
    shared: bool = False

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of this shape."""
        return *shape[:-2], -(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1])


@dataclass(frozen=True)
class Nvfp4Weight:
    """The tensors of an NVFP4 weight: `weight` uint8 [..., N, K / 2], `scale` e4m3 [..., N, K / 16] and
    `scale_2`, one float32 for all or one a matrix; `is_divisor` if it is 1 / weight_scale_2.

    along_rows: codes and scales lie as [..., K / 2, N] and [..., K / 16, N], and it decodes to [..., K, N].
    """

    weight: str
    scale: str
    scale_2: str
    is_divisor: bool = False
    along_rows: bool = False


@dataclass(frozen=True)
class InputScale:
    """The tensor that holds the scale of a linear's input; `is_divisor` if that is 1 / input_scale."""

    key: str
    format: str
    is_divisor: bool = False


@dataclass(frozen=True)
class Activations:
    """How engines quantize what the weights of a checkpoint multiply, and what they cache.

    inputs: weight as the hub calls it -> the scale of its input. fp8_cache: whether the KV cache is FP8.
    cache_scales: the tensors that hold its scales. notes: what is declared and cannot be followed.
    """

    inputs: Mapping[str, InputScale]
    fp8_cache: bool
    cache_scales: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """The tensors of a checkpoint as they decode: `infos` is what the rest of fxq sees, without scales.

    fp8, nvfp4: the weights stored so, by their names in `infos`. activations: None if the
    checkpoint says nothing of them.
    """

    infos: Mapping[str, TensorInfo]
    fp8: Mapping[str, Fp8Weight]
    nvfp4: Mapping[str, Nvfp4Weight] = field(default_factory=dict)
    activations: Activations | None = None


def fp8_encoding(config: Mapping[str, Any], raw: Mapping[str, TensorInfo], where: Path) -> Encoding:
    """How the tensors `raw` of a directory are stored, by its config.json; SourceError if fxq cannot read
    them."""
    found = stated_in(config)
    if found is None and (where / "hf_quant_config.json").is_file():
        raise not_read("hf_quant_config.json", "modelopt", where)
    if found is not None:
        _check_method(*found, where)
    scaled = _pairs(raw, _block(found[1], where), where) if found is not None else {}
    dropped = {pair.key for pair in scaled.values()} if found is not None else set()
    dtype = decoded_dtype(config, raw, dropped)
    infos = {}
    for key, info in raw.items():
        if key in scaled:
            infos[key] = TensorInfo(info.shape, dtype)
        elif info.dtype in _NARROW and key not in dropped:
            raise SourceError(
                f"{where}: {key} is {str(info.dtype).removeprefix('torch.')}, but config.json has no "
                "quantization_config that says how to decode it"
            )
        elif key not in dropped and not (found is not None and key.endswith(_OTHER_SCALES)):
            infos[key] = info
    return Encoding(infos, scaled)


def without_encoding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says how the source stored its numbers, at any depth."""
    return {
        key: without_encoding(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def decode_blocks(
    values: Tensor, scales: Tensor, block: tuple[int, int], first_row: int, out: Tensor
) -> None:
    """Fill `out` [n, K] with the numbers that rows [first_row, first_row + n) of an e4m3 matrix stand for.

    values: e4m3 [n, K]. scales: float32 [blocks of these rows, ceil(K / block[1])]. Products are taken in
    float32 and rounded once to the dtype of `out`.
    """
    n, width = values.shape
    tall, wide = block
    columns = scales.repeat_interleave(wide, -1)[:, :width]
    most = max(1, ELEMENTS_AT_ONCE // max(width, 1))
    done = 0
    while done < n:  # by rows of blocks, so that little is ever held in float32
        row = (first_row + done) // tall
        end = min(n, (row + 1) * tall - first_row, done + most)
        torch.mul(values[done:end].to(torch.float32), columns[row - first_row // tall], out=out[done:end])
        done = end


def stated_in(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(dotted key, value) of the first quantization_config in a config.json, sub-configs included."""
    for key in _KEYS:
        if config.get(key) is not None:
            return key, config[key]
    for key, value in config.items():
        if isinstance(value, dict) and (inner := stated_in(value)) is not None:
            return f"{key}.{inner[0]}", inner[1]
    return None


def _check_method(key: str, stated: Any, where: Path) -> None:
    if not isinstance(stated, dict):
        raise SourceError(
            f"{where / 'config.json'}: expected {key} to be an object, found {str(stated)[:60]}"
        )
    method = stated.get("quant_method", "compressed-tensors" if key.endswith(_KEYS[1]) else None)
    if method != "fp8":
        raise not_read(f"config.json: {key}", method, where)
    format = stated.get("fmt", "e4m3")
    if format != "e4m3":
        raise not_read(f"config.json: {key}", f"fp8 of fmt {str(format)[:40]}", where)


def not_read(key: str, method: Any, where: Path) -> SourceError:
    """The error for a way of storing numbers that fxq does not read."""
    return SourceError(
        f"{where}: {key} says that the weights are quantized by {str(method)[:60]}; fxq reads unquantized "
        "and fp8 block-quantized checkpoints: dequantize it first"
    )


def _block(stated: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    block = stated.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise SourceError(
            f"{where / 'config.json'}: expected a weight_block_size of two positive integers, found "
            f"{str(block)[:60]}"
        )
    return block[0], block[1]


def _pairs(raw: Mapping[str, TensorInfo], block: tuple[int, int] | None, where: Path) -> dict[str, Fp8Weight]:
    """Every e4m3 tensor of two dimensions or more with its scales."""
    pairs, owners = {}, dict[str, str]()
    for key, info in raw.items():
        if info.dtype == _FP8 and len(info.shape) > 1:
            pair = pairs[key] = _pair(key, info, raw, block, where)
            owners[pair.key] = key
    for key, info in raw.items():
        weight = key.removesuffix("_inv").removesuffix("_scale")
        if key.endswith(("_scale_inv", ".weight_scale")) and key not in owners:
            held = f"is {said(raw[weight])}" if weight in raw else "is missing"
            raise SourceError(
                f"{where}: {key} {list(info.shape)} scales {weight}, which {held}; expected float8_e4m3fn"
            )
    return pairs


def _pair(
    key: str, info: TensorInfo, raw: Mapping[str, TensorInfo], block: tuple[int, int] | None, where: Path
) -> Fp8Weight:
    names = [f"{key}_scale_inv", f"{key}_scale"]
    if key.endswith(".weight"):
        names.append(f"{key.removesuffix('.weight')}.scale")
    name = next((name for name in names if name in raw), None)
    if name is None:
        raise SourceError(f"{where}: {key} is {said(info)}, but there is no {names[0]} to decode it with")
    scale, matrix = raw[name], info.shape[-2:]
    scaled = Fp8Weight(name, block or (max(matrix[0], 1), max(matrix[1], 1)))
    grid = scaled.grid(info.shape)
    single = block is None and math.prod(scale.shape) == math.prod(grid)
    if scale.dtype not in _SCALES or (scale.shape != grid and not single):
        blocks = f"a block of {block[0]}x{block[1]}" if block else "one scale a matrix"
        raise SourceError(
            f"{where}: {name} is {said(scale)}; {key} {list(info.shape)} with {blocks} needs {list(grid)}"
        )
    return scaled


def said(info: TensorInfo) -> str:
    """Dtype and shape, for messages."""
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def decoded_dtype(config: Mapping[str, Any], raw: Mapping[str, TensorInfo], scales: set[str]) -> torch.dtype:
    """What weights decode to: the dtype of the model, or that of most of what it stores unquantized."""
    stated = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    plain = (i.dtype for key, i in raw.items() if key not in scales and len(i.shape) > 1)
    return next((d for d in plain if d.is_floating_point and d.itemsize > 1), torch.bfloat16)
