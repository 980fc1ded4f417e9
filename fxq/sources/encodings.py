"""Encodings: how the tensors of a checkpoint stand for weights, whoever wrote it; a table of layouts.

config.json says by what the weights are quantized, the tensors say which are and how: a layout is where the
parts of a weight lie and what they are. What no layout explains is refused by name.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxq.errors import SourceError
from fxq.graph.hub import TensorInfo
from fxq.sources.encoded_weight import E2M1, E4M3, INT4, Elements, EncodedWeight, TensorScale
from fxq.sources.files import json_object

NESTED = "hf_quant_config.json"
Infos = Mapping[str, TensorInfo]
_BYTES = (torch.uint8, torch.float8_e8m0fnu)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a weight `m` lie.

    codes, scales, tensor_scale: how the names of their tensors end; scales go by several. Without an ending,
    codes have a parameter's own name. scale_dtypes: what scales are stored as. block: what shares a scale;
    None: what their shape says. groups: whether codes lie as [..., N, groups, bytes of a group].
    """

    title: str
    codes: str
    elements: Elements
    scales: tuple[str, ...]
    scale_dtypes: tuple[torch.dtype, ...]
    block: tuple[int, int] | None
    tensor_scale: str = ""
    is_divisor: bool = False
    transposed: bool = False
    groups: bool = False


LAYOUTS: tuple[Layout, ...] = (
    # transformers, of GPT-OSS: a layer's experts [E, out, groups, 16]; the model has them as [E, in, out]
    Layout("MXFP4", "_blocks", E2M1, ("_scales",), _BYTES, (1, 32), transposed=True, groups=True),
    # compressed-tensors
    Layout(
        "NVFP4",
        ".weight_packed",
        E2M1,
        (".weight_scale",),
        (torch.float8_e4m3fn,),
        (1, 16),
        tensor_scale=".weight_global_scale",
        is_divisor=True,
    ),
    Layout("MXFP4", ".weight_packed", E2M1, (".weight_scale",), _BYTES, (1, 32)),
    Layout("INT4", ".weight_packed", INT4, (".weight_scale",), _FLOATS, None),
    # ModelOpt; MXFP4 of DeepSeek-V4 too
    Layout(
        "NVFP4",
        ".weight",
        E2M1,
        (".weight_scale",),
        (torch.float8_e4m3fn,),
        (1, 16),
        tensor_scale=".weight_scale_2",
    ),
    Layout(
        "NVFP4", "", E2M1, ("_weight_scale",), (torch.float8_e4m3fn,), (1, 16), tensor_scale="_weight_scale_2"
    ),
    Layout("MXFP4", ".weight", E2M1, (".weight_scale", ".weight_scale_inv", ".scale"), _BYTES, (1, 32)),
    Layout("MXFP4", "", E2M1, ("_weight_scale",), _BYTES, (1, 32)),
    # everyone's FP8, and MXFP8
    Layout(
        "FP8", ".weight", E4M3, (".weight_scale_inv", ".weight_scale", ".scale"), (*_FLOATS, *_BYTES), None
    ),
    Layout("FP8", "", E4M3, ("_scale_inv", "_weight_scale", "_scale"), (*_FLOATS, *_BYTES), None),
)

# The algorithms of ModelOpt, and the formats of compressed-tensors, whose weights a layout explains.
_ALGORITHMS = (
    "NVFP4",
    "W4A16_NVFP4",
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "FP8_BLOCK_SCALES",
    "MXFP8",
    "MXFP4",
    "W4A8_MXFP4_FP8",
    "MIXED_PRECISION",
)
_FORMATS = (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
    "dense",
)
_SETTINGS = ("quantization_config", "compression_config")
# The block of FP8 weights whose config does not say it.
_USUAL_BLOCK = (128, 128)
# Tensors beside a quantized weight that say nothing of it: scales of activations and caches, of which the
# output has its own; shapes; zero points of floating-point formats, which are zero.
_ASIDE = (
    ".input_scale",
    "_input_scale",
    ".activation_scale",
    "_activation_scale",
    ".input_global_scale",
    ".output_scale",
    ".input_scale_ub",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".weight_shape",
    ".input_zero_point",
    ".weight_zero_point",
)


@dataclass(frozen=True)
class Stated:
    """What the configs say of a checkpoint: by what its weights are quantized, under which key of which file;
    settings: all that stands there."""

    key: str
    method: str
    settings: Mapping[str, Any]

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """The groups of compressed-tensors, and of ModelOpt in config.json."""
        groups = self.settings.get("config_groups")
        return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


@dataclass(frozen=True)
class Encoding:
    """The tensors of a checkpoint as they decode: `infos` is what the rest of fxq sees, without scales.

    weights: those that are encoded, by their names in `infos`. stated: what the configs say, if anything.
    """

    infos: Mapping[str, TensorInfo]
    weights: Mapping[str, EncodedWeight]
    stated: Stated | None


def encoding_of(config: Mapping[str, Any], raw: Infos, where: Path) -> Encoding:
    """How the tensors `raw` of a directory are stored; SourceError if fxq cannot read them."""
    stated = stated_by(config, where)
    if stated is None:
        if (odd := next((key for key, info in raw.items() if _is_narrow(info)), None)) is not None:
            kind = str(raw[odd].dtype).removeprefix("torch.")
            raise SourceError(
                f"{where}: {odd} is {kind}, but config.json has no quantization_config that says how to "
                "decode it"
            )
        return Encoding(raw, {}, None)
    block = _check(stated, where)
    weights = _weights(raw, block, where)
    if block is not None and stated.method != "compressed-tensors":  # which may mix blocks with others
        for weight in weights.values():
            _check_block(weight, block, raw, where)
    parts = {key for weight in weights.values() for key in weight.keys}
    dtype = _decoded_dtype(config, raw, parts)
    infos = {name: TensorInfo(weight.decoded_shape, dtype) for name, weight in weights.items()}
    for key, info in raw.items():
        if key in parts:
            continue
        _check_known(key, raw, where)
        if not key.endswith(_ASIDE):
            _check_left(key, info, raw, where)
            infos[key] = info
    order = {weight.codes: name for name, weight in weights.items()}
    named = [order.get(key, key) for key in raw]
    return Encoding({name: infos[name] for name in named if name in infos}, weights, stated)


def stated_by(config: Mapping[str, Any], where: Path) -> Stated | None:
    """What config.json, or ModelOpt's other file, says of the quantization; None if nothing."""
    found = _stated_in(config)
    if found is None:
        if not (where / NESTED).is_file():
            return None
        settings = json_object(where / NESTED).get("quantization")
        return Stated(NESTED, "modelopt", settings if isinstance(settings, dict) else {})
    key, settings = found
    if not isinstance(settings, dict):
        raise SourceError(
            f"{where / 'config.json'}: expected {key} to be an object, found {str(settings)[:60]}"
        )
    method = settings.get("quant_method", "compressed-tensors" if key.endswith(_SETTINGS[1]) else None)
    return Stated(f"config.json: {key}", str(method), settings)


def without_encoding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says how the source stored its numbers, at any depth."""
    return {
        key: without_encoding(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _SETTINGS
    }


def not_read(key: str, method: Any, where: Path) -> SourceError:
    """The error for a way of storing numbers that fxq does not read."""
    return SourceError(
        f"{where}: {key} says that the weights are quantized by {str(method)[:60]}; fxq reads "
        "unquantized checkpoints, and weights in FP8, MXFP8, MXFP4, NVFP4 and compressed-tensors' INT4: "
        "dequantize it first"
    )


def said(info: TensorInfo) -> str:
    """Dtype and shape, for messages."""
    return f"{_dtype(info.dtype)} {list(info.shape)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_narrow(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point and info.dtype.itemsize == 1


def _stated_in(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(dotted key, value) of the first quantization_config in a config.json, sub-configs included."""
    for key in _SETTINGS:
        if config.get(key) is not None:
            return key, config[key]
    for key, value in config.items():
        if isinstance(value, dict) and (inner := _stated_in(value)) is not None:
            return f"{key}.{inner[0]}", inner[1]
    return None


# What the configs say.


def _check(stated: Stated, where: Path) -> tuple[int, int] | None:
    """The block of FP8 weights, if it is said; SourceError for what no layout explains."""
    settings = stated.settings
    if stated.method in ("fp8", "fbgemm_fp8"):
        format = settings.get("fmt", "e4m3")
        if format != "e4m3":
            raise not_read(stated.key, f"fp8 of fmt {str(format)[:40]}", where)
        return _block(settings.get("weight_block_size"), "weight_block_size", where)
    if stated.method == "mxfp4":
        return None
    if stated.method.startswith("modelopt"):
        layers = settings.get("quantized_layers")
        named = [layer.get("quant_algo") for layer in _objects(layers)]
        for algorithm in (settings.get("quant_algo"), *named):
            if str(algorithm).upper() not in _ALGORITHMS:
                raise not_read(stated.key, f"modelopt's {algorithm}", where)
        return None
    if stated.method == "compressed-tensors":
        return _check_compressed(stated, where)
    raise not_read(stated.key, stated.method, where)


def _check_compressed(stated: Stated, where: Path) -> tuple[int, int] | None:
    format = stated.settings.get("format")
    for found in sorted({str(g.get("format") or format) for g in stated.groups} | {str(format)}):
        if found not in _FORMATS:
            raise not_read(stated.key, f"compressed-tensors' {found}", where)
    if stated.settings.get("transform_config"):
        raise not_read(stated.key, "compressed-tensors with transforms of activations", where)
    block = None
    for weights in (g["weights"] for g in stated.groups if isinstance(g.get("weights"), dict)):
        kind, bits = weights.get("type"), weights.get("num_bits")
        if (kind, bits) not in (("float", 4), ("float", 8), ("int", 4)):
            raise not_read(stated.key, f"compressed-tensors' {kind} of {bits} bits", where)
        block = block or _block(weights.get("block_structure"), "block_structure", where)
    return block


def _block(value: Any, name: str, where: Path) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise SourceError(
            f"{where / 'config.json'}: expected a {name} of two positive integers, found {str(value)[:60]}"
        )
    return value[0], value[1]


def _objects(value: object) -> list[dict[str, Any]]:
    return [v for v in value.values() if isinstance(v, dict)] if isinstance(value, dict) else []


# What the tensors say.


def _weights(raw: Infos, block: tuple[int, int] | None, where: Path) -> dict[str, EncodedWeight]:
    """Every weight that a layout explains, by its name to the model."""
    found: dict[str, EncodedWeight] = {}
    taken: set[str] = set()
    for layout in LAYOUTS:
        for key, info in raw.items():
            if key in taken or not _has_codes(layout, key, info):
                continue
            stem = key.removesuffix(layout.codes)
            scales = next((s for suffix in layout.scales if (s := stem + suffix) in raw), None)
            if scales is None or raw[scales].dtype not in layout.scale_dtypes or scales in taken:
                continue
            if layout.tensor_scale and f"{stem}{layout.tensor_scale}" not in raw:
                continue
            weight = _encoded(layout, key, stem, scales, raw, block, where)
            found[stem if layout.codes in ("", "_blocks") else f"{stem}.weight"] = weight
            taken.update(weight.keys)
    return found


def _check_block(weight: EncodedWeight, block: tuple[int, int], raw: Infos, where: Path) -> None:
    """SourceError for an FP8 weight whose scales are not those of the blocks that config.json declares."""
    if weight.elements is E4M3 and weight.block != block:
        *lead, height, width = weight.shape
        grid = [*lead, -(-height // block[0]), -(-width // block[1])]
        raise SourceError(
            f"{where}: {weight.scales} is {said(raw[weight.scales])}; {weight.codes} {list(weight.shape)} "
            f"with a block of {block[0]}x{block[1]} needs {grid}"
        )


def _has_codes(layout: Layout, key: str, info: TensorInfo) -> bool:
    """Whether a tensor may be the codes of a layout."""
    named = key.endswith(layout.codes) if layout.codes else not key.endswith(".weight")
    return named and info.dtype in layout.elements.dtypes and len(info.shape) > (2 if layout.groups else 1)


def _encoded(
    layout: Layout, key: str, stem: str, scales: str, raw: Infos, block: tuple[int, int] | None, where: Path
) -> EncodedWeight:
    """The weight of which `key` holds the codes; SourceError where its scales do not fit."""
    shape, per, scale = _matrices(layout, raw[key]), layout.elements.per, raw[scales]
    lead = shape[:-2]
    factor = None
    if layout.tensor_scale:
        name = stem + layout.tensor_scale
        count = math.prod(raw[name].shape)
        if raw[name].dtype != torch.float32 or count not in (1, math.prod(lead)):
            raise SourceError(f"{where}: {name} is {said(raw[name])}; expected one float32 of {key}")
        factor = TensorScale(name, count > 1, layout.is_divisor)
    matrix = shape[-2], shape[-1] * per
    for found, shared in _blocks(layout, lead, matrix, scale, block):
        title = _eight_bits(found, scale, (*lead, *matrix)) if layout.elements is E4M3 else layout.title
        return EncodedWeight(
            title,
            key,
            layout.elements,
            (*lead, *matrix),
            scales,
            found,
            shared,
            factor,
            layout.transposed,
        )
    turned = shape[-1], shape[-2] * per  # ModelOpt's, of experts that the family keeps as [E, in, out]
    if layout.block and scale.shape == (*lead, -(-turned[1] // layout.block[1]), turned[0]):
        return EncodedWeight(
            layout.title,
            key,
            layout.elements,
            (*lead, *turned),
            scales,
            layout.block,
            False,
            factor,
            True,
            True,
        )
    tall, wide = layout.block or block or (max(matrix[0], 1), max(matrix[1], 1))
    grid = [*lead, -(-matrix[0] // tall), -(-matrix[1] // wide)]
    raise SourceError(
        f"{where}: {scales} is {said(scale)}; {key} {list(raw[key].shape)} of {layout.title} needs "
        f"{_dtype(layout.scale_dtypes[0])} {grid}, a scale for {tall}x{wide} of its numbers"
    )


def _eight_bits(block: tuple[int, int], scale: TensorInfo, shape: Sequence[int]) -> str:
    """The title of an FP8 weight: matrices in the blocks of 128 x 128 that engines know have one of their
    own."""
    if block == (1, 32) and scale.dtype in _BYTES:
        return "MXFP8"
    is_usual = block == _USUAL_BLOCK and len(shape) == 2 and shape[1] % block[1] == 0
    return "FP8_BLOCKS" if is_usual else "FP8"


def _matrices(layout: Layout, info: TensorInfo) -> tuple[int, ...]:
    """The shape of codes, those of a row side by side."""
    return (*info.shape[:-2], info.shape[-2] * info.shape[-1]) if layout.groups else info.shape


def _blocks(
    layout: Layout,
    lead: tuple[int, ...],
    matrix: tuple[int, int],
    scale: TensorInfo,
    block: tuple[int, int] | None,
) -> Iterator[tuple[tuple[int, int], bool]]:
    """(block, whether all matrices have the scales of one) of each way in which scales of [..., N, K] may be
    meant; where there are two they say the same."""
    height, width = matrix
    tall, wide = layout.block or block or _USUAL_BLOCK
    grid = -(-height // tall), -(-width // wide)
    kept = (grid[0], 1, grid[1], 1)  # ModelOpt's
    if scale.shape == (*lead, *grid) or (scale.shape == kept and not lead):
        yield (tall, wide), False
    if layout.block is not None:
        return
    whole = max(height, 1), max(width, 1)
    if math.prod(scale.shape) == 1:
        yield whole, math.prod(lead) > 1
    elif scale.shape in (lead, (*lead, 1, 1)):
        yield whole, False
    elif scale.shape == (*lead, height):
        yield (1, whole[1]), False
    elif scale.shape[:-1] == (*lead, height) and scale.shape[-1] and width % scale.shape[-1] == 0:
        yield (1, max(width // scale.shape[-1], 1)), False


def _check_known(key: str, raw: Infos, where: Path) -> None:
    """SourceError for what makes a weight, or its input, something that no layout says."""
    if key.endswith("pre_quant_scale"):
        raise not_read(key, "AWQ, which scales inputs before they are quantized", where)
    if key.endswith(".weight_g_idx"):
        raise not_read(key, "groups of reordered inputs", where)
    if key.endswith(".weight_zero_point") and f"{key.removesuffix('zero_point')}packed" in raw:
        raise not_read(key, "integers with zero points", where)


def _check_left(key: str, info: TensorInfo, raw: Infos, where: Path) -> None:
    """SourceError for what belongs to a weight that no layout explains."""
    for layout in LAYOUTS:
        if _has_codes(layout, key, info) and (layout.codes or _is_narrow(info)):
            raise _unexplained(key, info, raw, where)
    if _is_narrow(info):
        raise SourceError(f"{where}: {key} is {said(info)}, and nothing says how to decode it")
    if key.endswith(("_scale_inv", ".weight_scale")):
        weight = key.removesuffix("_inv").removesuffix("_scale")
        held = f"is {said(raw[weight])}" if weight in raw else "is missing"
        raise SourceError(
            f"{where}: {key} {list(info.shape)} scales {weight}, which {held}; expected float8_e4m3fn"
        )


def _unexplained(key: str, info: TensorInfo, raw: Infos, where: Path) -> SourceError:
    """The error for codes without the scales that a layout needs."""
    layouts = [layout for layout in LAYOUTS if _has_codes(layout, key, info)]
    missing, scales = key.removesuffix(layouts[0].codes) + layouts[0].scales[0], None
    for layout in layouts:
        stem = key.removesuffix(layout.codes)
        found = next((s for suffix in layout.scales if (s := stem + suffix) in raw), None)
        if found is not None and raw[found].dtype in layout.scale_dtypes:
            missing, scales = stem + layout.tensor_scale, None
            break
        scales = scales or found
    if scales is None:
        return SourceError(f"{where}: {key} is {said(info)}, but there is no {missing} to decode it with")
    known = dict.fromkeys(_dtype(dtype) for layout in layouts for dtype in layout.scale_dtypes)
    return SourceError(
        f"{where}: {scales} is {said(raw[scales])}; {key} {said(info)} needs {' or '.join(known)}"
    )


def _decoded_dtype(config: Mapping[str, Any], raw: Infos, parts: Container[str]) -> torch.dtype:
    """What weights decode to: the dtype of the model, or that of most of what it stores unquantized."""
    stated = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    plain = (i.dtype for key, i in raw.items() if key not in parts and len(i.shape) > 1)
    return next((d for d in plain if d.is_floating_point and d.itemsize > 1), torch.bfloat16)
