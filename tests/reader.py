"""An independent reader and checker of ModelOpt NVFP4 checkpoints, from docs/checkpoint_contract.md alone.

It parses safetensors itself and shares no code with the writer. `check` returns findings, one sentence each;
an empty list means that every rule of the contract that can be seen in the files holds. "Section n" is a
section of the contract.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import reference

Array = NDArray[Any]
Json = dict[str, Any]

# safetensors dtype -> (numpy type of the raw elements); BF16 and F8_* are raw bit patterns.
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
MAX_HEADER = 100_000_000

SCALES = ("weight_scale", "weight_scale_2", "input_scale")
KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
# The names that compressed-tensors has for the same (section 7).
COMPRESSED = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}
FP8_SOURCE_SCALE = "weight_scale_inv"
# Members that engines merge, and the merged module's name in vLLM (section 3).
FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "w13",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
}
EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)")
EXPERT_INPUTS = {
    "gate/up": {"gate_proj", "up_proj", "gate_up_proj", "w1", "w3"},
    "down": {"down_proj", "w2"},
}
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NOT_CALIBRATED = re.compile(r"(^|\.)(mtp|visual|vision\w*|audio\w*)\.")
LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
FORMAT = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
KV_FORMAT = {"dynamic": False, "num_bits": 8, "type": "float"}
INDEX, CONFIG, QUANT_CONFIG = "model.safetensors.index.json", "config.json", "hf_quant_config.json"
# Files of a source that a copy need not repeat: weights, other index files, text about the source.
NOT_SIDE_FILES = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|tflite|index\.json|md|png|jpg|pdf)"
    r"|config\.json|hf_quant_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY).*|\..*",
    re.IGNORECASE,
)

# A few ulp of fp32: weight_scale_2 may be amax * fp32(1/2688) or a true division (section 1).
SCALE_TOLERANCE = 1e-6
# Correct NVFP4 weights are near 20 dB; swapped nibbles, wrong signs or a scale off by 2 are below 7.
LEAST_SQNR_DB = 8.0
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: safetensors dtype, shape, and its bytes [begin, end) from the file's start."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A directory of safetensors shards with its JSON files; nothing but headers is in memory.

    `findings` holds what is wrong with shards, index and JSON. `config` is config.json, `quant`
    hf_quant_config.json, each None when absent.
    """

    path: Path
    tensors: dict[str, Entry]
    index: Json | None
    config: Json | None
    quant: Json | None
    findings: tuple[str, ...]

    def raw(self, name: str) -> Array:
        """The stored elements, a read-only memory map of the tensor's shape: BF16 as uint16, F8 as uint8."""
        entry = self.tensors[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        if entry.size == 0:
            return np.empty(entry.shape, dtype=dtype)
        flat = np.memmap(
            self.path / entry.shard, mode="r", dtype=dtype, offset=entry.begin, shape=(entry.size,)
        )
        return flat.reshape(entry.shape)

    def array(self, name: str, rows: slice = slice(None)) -> Array:
        """Values of `rows` of the first axis: BF16 decoded to float32, F8 as uint8 codes, others as is."""
        raw = self.raw(name)
        raw = np.array(raw[rows] if raw.ndim else raw)
        if self.tensors[name].dtype != "BF16":
            return raw
        return (raw.astype(np.uint32) << 16).view(np.float32)

    @cached_property
    def holds_transposed(self) -> bool:
        """Whether some matrix with a bias has as many columns, not rows, as the bias elements."""
        shapes = {n.removesuffix("weight"): e.shape for n, e in self.tensors.items() if n.endswith(".weight")}
        biases = {n: self.tensors.get(f"{n}bias") for n in shapes}
        return any(
            b is not None and len(shapes[n]) == 2 and b.shape == shapes[n][1:] != shapes[n][:1]
            for n, b in biases.items()
        )

    @cached_property
    def is_compressed(self) -> bool:
        """Whether this is compressed-tensors' layout: global scales are divisors there."""
        declared = (self.config or {}).get("quantization_config")
        return isinstance(declared, dict) and declared.get("quant_method") == "compressed-tensors"

    def multiplier(self, name: str, suffix: str) -> np.float32:
        """A global scale (weight_scale_2 or input_scale) as what codes are multiplied by."""
        value = np.float32(self.array(self.part(name, suffix)).reshape(()))
        return np.float32(1) / value if self.is_compressed else value

    @cached_property
    def _fused(self) -> set[str]:
        """Parameters `K` that are no module's `.weight`, but have scales `K_weight_scale` (section 5)."""
        return {n.removesuffix(f"_{s}") for n in self.tensors for s in SCALES[:2] if n.endswith(f"_{s}")}

    def quantized_linears(self) -> list[str]:
        """Sorted modules with a U8 `.weight`, a `.weight_scale` or a `.weight_scale_2`, and fused
        parameters; complete or not."""
        names = {_module(n, s) for n in self.tensors for s in SCALES[:2] if n.endswith("." + s)}
        names |= {_module(n, "weight_packed") for n in self.tensors if n.endswith(".weight_packed")}
        weights = {n: e for n, e in self.tensors.items() if n.endswith(".weight")}
        modules = names | {_module(n, "weight") for n, e in weights.items() if e.dtype == "U8"}
        return sorted((modules | self._fused) - set(self.fp8_linears()))

    def fp8_linears(self) -> list[str]:
        """Sorted modules with an F8_E4M3 `.weight` and one F32 `.weight_scale` for all of it."""
        weights = [n for n, e in self.tensors.items() if n.endswith(".weight") and e.dtype == "F8_E4M3"]
        scales = {n: self.tensors.get(f"{n}_scale") for n in weights}
        return sorted(_module(n, "weight") for n, e in scales.items() if e is not None and e.dtype == "F32")

    def part(self, name: str, suffix: str = "weight") -> str:
        """The tensor `suffix` (weight or one of SCALES) of a quantized linear or fused parameter."""
        if name in self._fused:
            return name if suffix == "weight" else f"{name}_{suffix}"
        if self.is_compressed:
            return f"{name}.{COMPRESSED.get(suffix, suffix)}"
        return f"{name}.{suffix}"

    def packed_axis(self, name: str) -> int | None:
        """The axis along which `name` is packed: the last, or for [E, in, out] (and matrices of such
        experts) the one before, as the shapes of weight and scales say; None if they say neither."""
        weight, scale = (self.tensors.get(self.part(name, s)) for s in ("weight", "weight_scale"))
        if weight is None or scale is None or len(weight.shape) not in (2, 3):
            return None
        for axis in (-1, -2) if name in self._fused or len(weight.shape) == 3 else (-1,):
            expected = list(weight.shape)
            expected[axis] = expected[axis] // 8
            if weight.shape[axis] % 8 == 0 and tuple(expected) == scale.shape:
                return axis
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the quantized linear or fused parameter `name` before it was packed."""
        shape, axis = list(self.tensors[self.part(name)].shape), self.packed_axis(name)
        shape[-1 if axis is None else axis] *= 2
        return tuple(shape)

    def dequantize(self, name: str, rows: slice = slice(None)) -> Array:
        """float32 [N, K] of an NVFP4 linear, or [E, ., .] of a fused parameter in its stored orientation (or
        `rows` of the first axis): the exact products, rounded once."""
        scale_2 = float(self.multiplier(name, "weight_scale_2"))
        axis, shape = self.packed_axis(name), self.shape(name)
        first = rows if len(shape) == 3 or axis == -1 else slice(None)
        packed, scale = (self.array(self.part(name, s), first) for s in ("weight", "weight_scale"))
        if axis == -2:
            packed, scale = (np.ascontiguousarray(np.swapaxes(t, -1, -2)) for t in (packed, scale))
        flat = reference.dequantize(
            packed.reshape(-1, packed.shape[-1]), scale.reshape(-1, scale.shape[-1]), scale_2
        ).astype(np.float32)
        values = flat.reshape(*packed.shape[:-1], -1)
        if axis == -2:
            values = np.swapaxes(values, -1, -2)
        return values if first == rows else values[rows]

    @cached_property
    def linears(self) -> list[str]:
        """Sorted names of modules with a 2-D `.weight`, quantized ones included."""
        weights = {n: e for n, e in self.tensors.items() if n.endswith(".weight")}
        matrices = {_module(n, "weight") for n, e in weights.items() if len(e.shape) == 2}
        return sorted(matrices | set(self.quantized_linears()) | set(self.fp8_linears()))


def read_checkpoint(directory: Path | str) -> Checkpoint:
    """Parse every shard header and JSON file of `directory`; problems are collected in `findings`.

    With an index only the shards that it names count, others are findings. Raises FileNotFoundError without
    shards.
    """
    path = Path(directory)
    findings: list[str] = []
    index = _read_json(path / INDEX, findings)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: expected *.safetensors files, found none")
    headers = {file: _read_header(path / file, findings) for file in files}
    if index is not None:
        tensors = _checked_against_index(index, headers, findings)
    else:
        if files != ["model.safetensors"]:
            findings.append(f"{INDEX}: missing, and the shards are not one model.safetensors: {files[:4]}")
        tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    for name, count in _counts(n for header in headers.values() for n in header).items():
        if count > 1:
            findings.append(f"{name}: expected in one shard, found in {count}")
    config, quant = _read_json(path / CONFIG, findings), _read_json(path / QUANT_CONFIG, findings)
    return Checkpoint(path, tensors, index, config, quant, tuple(findings))


def check(directory: Path | str, source_dir: Path | str | None = None) -> list[str]:
    """Every way in which `directory` breaks the contract, as sentences; empty when it is good.

    With `source_dir`, also that each source tensor is there byte for byte or as a quantized linear of its
    shape, that nothing but scales was added, that `weight_scale_2` is an amax of the source over 6 * 448 (or
    6 * 256), that the weights decode to the source within NVFP4's error, and that config.json and the side
    files are the source's.
    """
    try:
        out = read_checkpoint(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    scheme = _scheme(out)
    findings = [
        *out.findings,
        *_check_linears(out, scheme),
        *_check_configs(out),
        *_check_mixed(out),
        *_check_exclude(out, scheme),
        *_check_kv(out),
        *_check_fusion(out),
        *_check_experts(out),
    ]
    if source_dir is not None:
        try:
            source = read_checkpoint(source_dir)
        except (OSError, ValueError) as error:
            return [*findings, f"source: {error}"]
        findings += _check_tensors_against(out, source)
        findings += _check_weights_against(out, source)
        findings += _check_files_against(out, source)
    return findings


def sqnr_db(directory: Path | str, source_dir: Path | str, only: str = "") -> float:
    """10 log10 of sum(w^2) / sum((w - w')^2) in float64, over quantized linears with `only` in their name.

    w is the source's `.weight` (FP8 sources times their `weight_scale_inv`), w' is `dequantize`'s. inf when
    exact.
    """
    out, source = read_checkpoint(directory), read_checkpoint(source_dir)
    names = [name for name in out.quantized_linears() if only in name]
    if not names:
        raise ValueError(f"{directory}: expected quantized linears with {only!r} in their name, found none")
    signal, noise = np.sum([_signal_noise(out, source, name) for name in names], axis=0)
    return _decibel(signal, noise)


def vllm_name(name: str, modules: set[str]) -> str:
    """vLLM's name for a hub module: fused if siblings are among `modules`, `...experts` for an expert's."""
    if match := EXPERT.fullmatch(name):
        return match["layer"]
    parent, _, leaf = name.rpartition(".")
    for members, fused in FUSED.items():
        if leaf in members and sum(_join(parent, m) in modules for m in members) > 1:
            return _join(parent, fused)
    return name


def _read_json(path: Path, findings: list[str]) -> Json | None:
    """The object in a JSON file, None when the file is absent or no object; doubled keys are findings."""
    if not path.exists():
        return None
    try:
        return _parse_object(path.read_text(encoding="utf-8"), path.name, findings)
    except ValueError as error:
        findings.append(f"{path.name}: expected a JSON object, found {error}")
        return None


def _parse_object(text: str, where: str, findings: list[str]) -> Json:
    def unique(pairs: list[tuple[str, Any]]) -> Json:
        counts = _counts(key for key, _ in pairs)
        findings.extend(f"{where}: key {k!r} occurs {n} times" for k, n in counts.items() if n > 1)
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def _read_header(path: Path, findings: list[str]) -> dict[str, Entry]:
    """Tensors of one safetensors file: u64 LE header length, JSON header, data; ValueError if unreadable.

    Offsets must tile the data without holes or overlaps (findings); a tensor's bytes must be what dtype and
    shape say.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(total - 8, MAX_HEADER):
            raise ValueError(f"{path.name}: {total} bytes, too short for a header of length {length}")
        text = file.read(length)
    if text[:1] != b"{":
        raise ValueError(f"{path.name}: expected the header to start with '{{', found {text[:1]!r}")
    try:
        header = _parse_object(text.decode("utf-8"), path.name, findings)
    except ValueError as error:
        raise ValueError(f"{path.name}: expected a JSON header, found {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        findings.append(f"{path.name}: __metadata__ must map strings to strings, found {metadata!r}")
    entries = {name: _entry(path.name, name, value, 8 + length) for name, value in header.items()}
    findings += _check_layout(path.name, entries, 8 + length, total)
    return entries


def _entry(shard: str, name: str, value: Any, data: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{shard}: {name}: expected dtype, shape, data_offsets; found {value!r}") from error
    if str(dtype) not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{shard}: {name}: unknown dtype, or sizes that are no counts, in {value!r}")
    if set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shard}: {name}: unknown keys in {value!r}")
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{shard}: {name}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return Entry(shard, dtype, shape, data + begin, data + end)


def _check_layout(shard: str, entries: dict[str, Entry], data: int, total: int) -> Iterator[str]:
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "a hole" if entry.begin > position else "an overlap"
            yield f"{shard}: {name}: {kind}: starts at {entry.begin}, the tensor before ends at {position}"
        position = max(position, entry.end)
    if position != total:
        yield f"{shard}: tensors end at byte {position}, the file at {total}"
    if position > total:
        raise ValueError(f"{shard}: cut off: tensors end at byte {position}, the file at {total}")


def _checked_against_index(
    index: Json, headers: dict[str, dict[str, Entry]], findings: list[str]
) -> dict[str, Entry]:
    """Tensors that index and header agree on; every disagreement is a finding."""
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict):
        findings.append(f"{INDEX}: expected a weight_map")
        weight_map = {}
    tensors = {}
    for name, shard in weight_map.items():
        if isinstance(shard, str) and name in headers.get(shard, {}):
            tensors[name] = headers[shard][name]
        else:
            findings.append(
                f"{INDEX}: {name} should be in {shard}, which has no such tensor or does not exist"
            )
    for shard, header in headers.items():
        if shard not in weight_map.values():
            findings.append(f"{shard}: no tensor of the index is in this file")
        findings += [f"{shard}: {name} is not in the index" for name in header if name not in weight_map]
    total = sum(entry.end - entry.begin for entry in tensors.values())
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        findings.append(f"{INDEX}: expected total_size {total}, found {stated}")
    return tensors


def _scheme(out: Checkpoint) -> dict[str, str]:
    """Quantized linear -> NVFP4 or W4A16_NVFP4 by the configs (config.json first, as engines do)."""
    config = _quantization_config(out) or _quantization(out)
    algorithm = config.get("quant_algo", "NVFP4")
    layers = config.get("quantized_layers")
    listed = layers if algorithm == "MIXED_PRECISION" and isinstance(layers, dict) else {}
    default = "NVFP4" if algorithm == "MIXED_PRECISION" else str(algorithm)

    def of(name: str) -> str:
        layer = listed.get(name)
        return str(layer.get("quant_algo", default)) if isinstance(layer, dict) else default

    return {name: of(name) for name in out.quantized_linears()}


def _check_linears(out: Checkpoint, scheme: dict[str, str]) -> Iterator[str]:
    """Section 1: names, dtypes, shapes and values of the tensors of each quantized linear."""
    if not scheme:
        yield "expected quantized linears, found none"
    for name, algorithm in scheme.items():
        weight = out.tensors.get(out.part(name))
        if weight is None or weight.dtype != "U8" or len(weight.shape) not in (2, 3):
            yield f"{out.part(name)}: expected U8 [N, K/2] or fused experts, found {_describe(weight)}"
            continue
        axis = out.packed_axis(name)
        k = out.shape(name)[-1 if axis is None else axis]
        if k % reference.BLOCK or 0 in weight.shape:
            yield f"{out.part(name)}: expected K to be a positive multiple of 16, found {_describe(weight)}"
            continue
        yield from _check_block_scales(out, name)
        yield from _check_scalar(out, out.part(name, "weight_scale_2"))
        if algorithm != "W4A16_NVFP4":
            yield from _check_scalar(out, out.part(name, "input_scale"))
        elif out.part(name, "input_scale") in out.tensors:
            yield f"{out.part(name, 'input_scale')}: expected none with W4A16_NVFP4"
        bias = out.tensors.get(f"{name}.bias")
        if bias is not None and len(weight.shape) == 2 and bias.shape != (weight.shape[0],):
            yield f"{name}.bias: expected [{weight.shape[0]}], found {_describe(bias)}"
        for other in ("pre_quant_scale", FP8_SOURCE_SCALE):
            if f"{name}.{other}" in out.tensors:
                yield f"{name}.{other}: no part of an NVFP4 linear"
    for tensor in out.tensors:
        if tensor.endswith("input_scale") and tensor[: -len(".input_scale")] not in scheme:
            yield f"{tensor}: belongs to no quantized linear"


def _check_block_scales(out: Checkpoint, name: str) -> Iterator[str]:
    where = out.part(name, "weight_scale")
    entry = out.tensors.get(where)
    if entry is None or entry.dtype != "F8_E4M3" or out.packed_axis(name) is None:
        packed = list(out.tensors[out.part(name)].shape)
        yield f"{where}: expected F8_E4M3, one for 16 along K of {packed}, found {_describe(entry)}"
        return
    count = np.bincount(out.array(where).reshape(-1), minlength=256)
    nan = int(count[reference.NAN_CODE] + count[128 + reference.NAN_CODE])
    zero, negative = int(count[0] + count[128]), int(count[129 : 128 + reference.NAN_CODE].sum())
    for kind, number in (("zero", zero), ("NaN", nan), ("negative", negative)):
        if number:
            yield f"{where}: expected positive finite values, found {number} {kind}"


def _check_scalar(out: Checkpoint, name: str) -> Iterator[str]:
    entry = out.tensors.get(name)
    if entry is None or (entry.dtype, entry.shape) != ("F32", ()):
        yield f"{name}: expected F32 [], found {_describe(entry)}"
        return
    value = float(out.array(name))
    if not (math.isfinite(value) and value > 0):
        yield f"{name}: expected a finite positive value, found {value}"


def _check_configs(out: Checkpoint) -> Iterator[str]:
    """Section 4: both files present, complete, and saying the same."""
    flat, nested = _quantization_config(out), _quantization(out)
    if not flat:
        yield f"{CONFIG}: expected a quantization_config"
    if not nested:
        yield f"{QUANT_CONFIG}: expected an object 'quantization'"
    if not (flat and nested):
        return
    for key in ("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"):
        if key not in nested:
            yield f"{QUANT_CONFIG}: quantization has no {key}"
    for key in ("quant_method", "quant_algo", "config_groups", "ignore", "producer"):
        if key not in flat and not (key == "config_groups" and flat.get("quant_algo") == "MIXED_PRECISION"):
            yield f"{CONFIG}: quantization_config has no {key}"
    if not str(flat.get("quant_method")).startswith("modelopt"):
        yield f"{CONFIG}: expected quant_method modelopt, found {flat.get('quant_method')!r}"
    algorithm = flat.get("quant_algo")
    if algorithm not in ALGORITHMS:
        yield f"{CONFIG}: expected quant_algo to be one of {', '.join(ALGORITHMS)}, found {algorithm!r}"
    if nested.get("quant_algo") != algorithm:
        yield f"quant_algo differs: {algorithm!r} in {CONFIG}, {nested.get('quant_algo')!r} in {QUANT_CONFIG}"
    if not _same(nested.get("group_size"), reference.BLOCK):
        yield f"{QUANT_CONFIG}: expected group_size 16, found {nested.get('group_size')!r}"
    yield from _check_groups(flat)
    yield from _check_kv_configs(flat, nested)
    yield from _check_producers(flat, out.quant or {})
    yield from _check_lists(flat.get("ignore"), nested.get("exclude_modules"))


def _check_groups(flat: Json) -> Iterator[str]:
    groups = flat.get("config_groups", {})
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        yield f"{CONFIG}: expected config_groups to hold objects, found {groups!r}"
        return
    if not groups and flat.get("quant_algo") != "MIXED_PRECISION":
        yield f"{CONFIG}: expected a group in config_groups"
    for name, group in groups.items():
        where = f"{CONFIG}: config_groups.{name}"
        inputs, weights = group.get("input_activations"), group.get("weights")
        if not _has(weights, FORMAT):
            yield f"{where}: expected weights {FORMAT}, found {weights!r}"
        if flat.get("quant_algo") == "W4A16_NVFP4" and inputs is not None:
            yield f"{where}: expected no input_activations with W4A16_NVFP4, found {inputs!r}"
        if flat.get("quant_algo") == "NVFP4" and not _has(inputs, FORMAT):
            yield f"{where}: expected input_activations {FORMAT}, found {inputs!r}"
        if flat.get("quant_algo") in ("NVFP4", "W4A16_NVFP4") and group.get("targets") != ["Linear"]:
            yield f"{where}: expected targets ['Linear'], found {group.get('targets')!r}"


def _check_kv_configs(flat: Json, nested: Json) -> Iterator[str]:
    algorithm, kv = nested.get("kv_cache_quant_algo"), flat.get("kv_cache_scheme")
    if algorithm not in (None, "FP8"):
        yield f"{QUANT_CONFIG}: expected kv_cache_quant_algo FP8 or null, found {algorithm!r}"
    if kv is not None and not _has(kv, KV_FORMAT):
        yield f"{CONFIG}: expected kv_cache_scheme {KV_FORMAT}, found {kv!r}"
    if (kv is None) != (algorithm is None):
        yield f"KV cache differs: kv_cache_scheme {kv!r} in {CONFIG}, {algorithm!r} in {QUANT_CONFIG}"


def _check_producers(flat: Json, quant: Json) -> Iterator[str]:
    for where, producer in ((CONFIG, flat.get("producer")), (QUANT_CONFIG, quant.get("producer"))):
        if (
            not isinstance(producer, dict)
            or producer.get("name") != "modelopt"
            or not producer.get("version")
        ):
            yield f"{where}: expected a producer named modelopt with a version, found {producer!r}"
    if not _same(flat.get("producer"), quant.get("producer")):
        yield f"producer differs between {CONFIG} and {QUANT_CONFIG}"


def _check_lists(ignore: Any, exclude: Any) -> Iterator[str]:
    for where, entries in ((f"{CONFIG}: ignore", ignore), (f"{QUANT_CONFIG}: exclude_modules", exclude)):
        if not isinstance(entries, list) or not all(isinstance(e, str) and e for e in entries):
            yield f"{where}: expected a list of names, found {entries!r}"
            return
        yield from (f"{where}: {e} occurs {n} times" for e, n in _counts(entries).items() if n > 1)
        yield from (
            f"{where}: {e}: only vLLM's wildcards are portable" for e in entries if e.startswith("re:")
        )
    for entry in sorted(set(ignore) ^ set(exclude)):
        here, there = (CONFIG, QUANT_CONFIG) if entry in ignore else (QUANT_CONFIG, CONFIG)
        yield f"exclude lists differ: {entry} is in {here} but not in {there}"


def _check_mixed(out: Checkpoint) -> Iterator[str]:
    """Section 4, MIXED_PRECISION: both files list the quantized linears, and nothing else."""
    flat, nested = _quantization_config(out), _quantization(out)
    for where, config in ((CONFIG, flat), (QUANT_CONFIG, nested)):
        layers = config.get("quantized_layers")
        if config.get("quant_algo") != "MIXED_PRECISION":
            if layers:
                yield f"{where}: quantized_layers has a meaning only with MIXED_PRECISION"
            continue
        if not isinstance(layers, dict) or not layers:
            yield f"{where}: expected a non-empty quantized_layers with MIXED_PRECISION, found {layers!r}"
            continue
        for name in sorted(set(layers) ^ set(out.quantized_linears())):
            yield f"{where}: quantized_layers and the tensors disagree about {name}"
        for name, layer in layers.items():
            known = isinstance(layer, dict) and layer.get("quant_algo") in ALGORITHMS[:2]
            if not known or not _same(layer.get("group_size"), reference.BLOCK):
                yield f"{where}: quantized_layers.{name}: expected NVFP4 with group_size 16, found {layer!r}"
    if not _same(flat.get("quantized_layers"), nested.get("quantized_layers")):
        yield f"quantized_layers differ between {CONFIG} and {QUANT_CONFIG}"


def _check_exclude(out: Checkpoint, scheme: dict[str, str]) -> Iterator[str]:
    """Section 4: lists each unquantized 2-D linear and lm_head; no engine's matching hits a quantized one."""
    entries = _entries(_quantization_config(out).get("ignore"))
    entries |= _entries(_quantization(out).get("exclude_modules"))
    modules = set(out.linears)
    wild = sorted(entry for entry in entries if _is_glob(entry))

    def excluded(name: str) -> bool:
        fused = vllm_name(name, modules)
        return name in entries or any(fnmatchcase(name, w) and fnmatchcase(fused, w) for w in wild)

    if _quantization_config(out).get("quant_algo") != "MIXED_PRECISION":
        for name in sorted(modules - set(scheme)):
            if not excluded(name):
                yield f"exclude list: {name} is not quantized and not listed"
        yield from _check_arrays_listed(out, entries, set(scheme))
    heads = [name for name in modules if _leaf(name) == "lm_head"]
    listed = [entry for entry in entries if _leaf(entry) == "lm_head" or fnmatchcase("lm_head", entry)]
    if not heads and not listed:
        yield "exclude list: lm_head (tied, no tensor) is not listed"
    prefixes: dict[str, str] = {}
    for name in scheme:
        # Of experts in one tensor the engine's module is the one that owns it.
        fused = out.part(name) == name or len(out.shape(name)) == 3
        prefixes.setdefault(name.rpartition(".")[0] if fused else vllm_name(name, modules), name)
        if name in entries:
            yield f"exclude list: {name} is quantized and listed"
        for w in wild:
            by_part = "*" in w and any(fnmatchcase(part, w) for part in name.split("."))
            if fnmatchcase(name, w) or by_part:
                yield f"exclude list: {w} matches the quantized {name}"
    ordered = sorted(entries)
    for prefix, name in prefixes.items():
        for entry in ordered:
            if entry != name and (entry in prefix or (_is_glob(entry) and fnmatchcase(prefix, entry))):
                yield f"exclude list: {entry} matches {prefix}, vLLM's name for the quantized {name}"
    yield from _check_entries_exist(out, entries, set(scheme))


def _is_glob(entry: str) -> bool:
    return any(character in entry for character in "*?[")


def _check_arrays_listed(out: Checkpoint, entries: set[str], quantized: set[str]) -> Iterator[str]:
    """Section 4 for what is more than a matrix: convolutions and fused experts left unquantized, the latter
    by their own name or by that of the module that owns them."""
    for name, entry in out.tensors.items():
        if len(entry.shape) < 3 or entry.dtype not in ("BF16", "F16", "F32"):
            continue
        module = name.removesuffix(".weight")
        listed = module in entries or any(fnmatchcase(module, e) for e in entries if _is_glob(e))
        if module not in quantized and not listed and module.rpartition(".")[0] not in entries:
            yield f"exclude list: {module} {list(entry.shape)} is not quantized and not listed"


def _check_entries_exist(out: Checkpoint, entries: set[str], quantized: set[str]) -> Iterator[str]:
    """Section 9: nothing but unquantized modules; lm_head and embed_tokens may have no tensor."""
    scales = {f"{name}_weight_scale" for name in quantized} | {f"{name}.weight_scale" for name in quantized}
    paths = [name.split(".") for name in out.tensors if name not in scales]
    modules = {".".join(path[:i]) for path in paths for i in range(1, len(path) + 1)}
    for entry in sorted(entries - modules - quantized):
        if _leaf(entry) in ("lm_head", "embed_tokens") or entry.startswith("re:"):
            continue
        if not _is_glob(entry) or not any(fnmatchcase(name, entry) for name in modules):
            yield f"exclude list: {entry} names nothing in the checkpoint"


def _check_kv(out: Checkpoint) -> Iterator[str]:
    """Section 2: k_scale and v_scale of every attention layer, or none; none undeclared; F32 [] > 0."""
    found = sorted(n for n in out.tensors if n.endswith((".k_scale", ".v_scale")))
    if not found:
        return
    flat, nested = _quantization_config(out), _quantization(out)
    if flat.get("kv_cache_scheme") is None and nested.get("kv_cache_quant_algo") is None:
        yield f"{found[0]}: a KV scale, but no config declares an FP8 KV cache"
    expected = {_join(layer, scale) for layer in _attention_layers(out) for scale in KV_SCALES}
    yield from (
        f"{name}: missing, though other KV scales are there" for name in sorted(expected - set(found))
    )
    for name in found:
        if name not in expected:
            yield f"{name}: expected ...k_proj.k_scale or ...v_proj.v_scale of an attention layer"
        yield from _check_scalar(out, name)


def _attention_layers(out: Checkpoint) -> list[str]:
    """Modules with k_proj and v_proj (or a stored qkv_proj), less vision, audio and MTP layers."""
    modules = set(out.linears)
    depth = _config_values(out, ("num_hidden_layers",))
    layers = []
    for name in sorted(modules):
        parent, _, leaf = name.rpartition(".")
        if not (leaf == "qkv_proj" or (leaf == "k_proj" and _join(parent, "v_proj") in modules)):
            continue
        layer = LAYER.search(parent)
        past_the_end = layer is not None and bool(depth) and int(layer[2]) >= max(depth)
        if not NOT_CALIBRATED.search(parent) and not past_the_end:
            layers.append(parent)
    return layers


def _check_fusion(out: Checkpoint) -> Iterator[str]:
    """Section 3: members of a group are all quantized or none, with equal weight_scale_2 and input_scale."""
    quantized = set(out.quantized_linears())
    for group in _fusion_groups(out.linears):
        members = [name for name in group if name in quantized]
        if 0 < len(members) < len(group):
            plain = [name for name in group if name not in quantized]
            yield f"{plain[0]}: not quantized, but its sibling {members[0]} is"
        for scale in ("weight_scale_2", "input_scale"):
            yield from _check_equal(out, members, scale, "engines merge these linears")


def _check_experts(out: Checkpoint) -> Iterator[str]:
    """Sections 3 and 9: experts 0..E-1 alike, all or none quantized; one gate/up and one down input_scale."""
    quantized = set(out.quantized_linears())
    counts = _config_values(out, EXPERT_COUNTS)
    for name in sorted(quantized):
        entry = out.tensors.get(out.part(name))
        stacks = counts and [*counts, *_config_values(out, SHARED_COUNTS)]
        if stacks and entry is not None and len(entry.shape) == 3 and entry.shape[0] not in stacks:
            yield f"{name}: expected {max(counts)} experts, found {_describe(entry)}"
    layers: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in out.linears:
        if match := EXPERT.fullmatch(name):
            layers[match["layer"]][int(match["index"])].append(match["projection"])
    for layer, experts in layers.items():
        wanted = max(len(experts), max(experts) + 1)
        if not any(wanted % count == 0 for count in counts):  # one list may hold several sets of experts
            wanted = max(counts, default=wanted)
        projections = sorted({p for found in experts.values() for p in found})
        names = [_join(layer, f"{e}.{p}") for e in range(wanted) for p in projections]
        present = [n for n in names if f"{n}.weight" in out.tensors]
        if missing := sorted(set(names) - set(present)):
            yield f"{layer}: expected {wanted} experts with {projections}; missing: {missing[0]}"
        if extra := [e for e in experts if e >= wanted]:
            yield f"{layer}: expected {wanted} experts, found expert {max(extra)}"
        plain = [n for n in present if n not in quantized]
        if 0 < len(plain) < len(present):
            yield f"{plain[0]}: not quantized, but {len(present) - len(plain)} others of {layer} are"
        for side, leaves in EXPERT_INPUTS.items():
            members = [n for n in present if _leaf(n) in leaves]
            yield from _check_equal(out, members, "input_scale", f"all {side} of {layer}")


def _check_equal(out: Checkpoint, modules: list[str], scale: str, why: str) -> Iterator[str]:
    """One finding when the bits of `<module>.<scale>` are not the same for all modules that have one."""
    names = [out.part(m, scale) for m in modules if out.part(m, scale) in out.tensors]
    bits: dict[bytes, str] = {}
    for name in names:
        bits.setdefault(out.raw(name).tobytes(), name)
    if len(bits) > 1:
        first, second = list(bits.values())[:2]
        values = [out.array(n).reshape(-1).tolist() for n in (first, second)]
        yield f"{second}: expected the value of {first} ({why}), found {values[1]} against {values[0]}"


def _check_tensors_against(out: Checkpoint, source: Checkpoint) -> Iterator[str]:
    quantized = set(out.quantized_linears())
    accounted = {out.part(name, suffix) for name in quantized for suffix in ("weight", *SCALES)}
    accounted |= {_join(layer, scale) for layer in _attention_layers(out) for scale in KV_SCALES}
    weights = {out.part(name): name for name in quantized}
    for name, entry in source.tensors.items():
        if name in weights:
            stored = out.tensors.get(name)
            if stored is None or stored.dtype != "U8" or len(stored.shape) not in (2, 3):
                continue  # a finding of its own
            if not _is_weight_of(source, weights[name], out):
                yield f"{name}: source {list(entry.shape)}, packed {list(stored.shape)}"
        elif name.endswith("." + FP8_SOURCE_SCALE) and _module(name, FP8_SOURCE_SCALE) in quantized:
            continue
        elif name not in out.tensors:
            yield f"{name}: in the source, lost in the output"
        elif (entry.dtype, entry.shape) != (out.tensors[name].dtype, out.tensors[name].shape):
            yield f"{name}: source {_describe(entry)}, output {_describe(out.tensors[name])}"
        elif not _same_bytes(out.raw(name), source.raw(name)):
            yield f"{name}: same dtype and shape as the source, different bytes"
    for name in sorted(set(out.tensors) - set(source.tensors) - accounted):
        yield f"{name}: not in the source, and no scale of a quantized linear or KV cache"
    for name in sorted(quantized):
        if out.part(name) not in source.tensors:
            yield f"{name}: quantized, but the source has no such weight"


def _check_weights_against(out: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Section 1 in values: weight_scale_2 is a group's amax / 2688 (or 1536), weights decode to the source's.

    Linears with bit-equal weight_scale_2 count as one group, so a group may be wider than what engines merge.
    """
    amaxes: dict[str, float] = {}
    for name in out.quantized_linears():
        if not _readable(out, name) or not _is_weight_of(source, name, out):
            continue
        parts = [(float(np.abs(w).max()), _energies(w, ours)) for w, ours in _pairs(out, source, name)]
        amaxes[name] = max(amax for amax, _ in parts)
        # Every expert of a fused parameter counts alone: one that was forgotten is lost in the sum.
        whole = [tuple(np.sum([energies for _, energies in parts], axis=0))]
        for signal, noise in [e for _, e in parts] if len(out.shape(name)) == 3 else whole:
            if signal > 0 and not _decibel(signal, noise) >= LEAST_SQNR_DB:
                decibel = _decibel(signal, noise)
                yield f"{name}: {decibel:.1f} dB from its source, expected {LEAST_SQNR_DB} and up"
                break
    sharing: dict[float, list[str]] = defaultdict(list)
    for name in amaxes:
        sharing[float(out.array(out.part(name, "weight_scale_2")).reshape(()))].append(name)
    for scale, names in sharing.items():
        largest = max(names, key=amaxes.__getitem__)
        wanted = [amaxes[largest] / (6 * top) for top in (448, 256)]
        if amaxes[largest] > 0 and not any(math.isclose(scale, w, rel_tol=SCALE_TOLERANCE) for w in wanted):
            where = out.part(largest, "weight_scale_2")
            yield f"{where}: expected amax / 2688 = {wanted[0]:.9g}, found {scale:.9g}"


def _check_files_against(out: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Section 4, source config: config.json plus quantization_config, and every side file byte for byte."""
    ours, theirs = dict(out.config or {}), dict(source.config or {})
    for config in (ours, theirs):
        config.pop("quantization_config", None)
    for key in sorted(set(ours) | set(theirs)):
        if (key in ours) != (key in theirs) or not _same(ours.get(key), theirs.get(key)):
            yield f"{CONFIG}: {key} is {ours.get(key, '-')!r}, in the source {theirs.get(key, '-')!r}"
    files = [*source.path.iterdir(), *source.path.glob("additional_chat_templates/*")]
    for file in sorted(p for p in files if p.is_file() and not NOT_SIDE_FILES.fullmatch(p.name)):
        relative = file.relative_to(source.path)
        copy = out.path / relative
        if not copy.is_file():
            yield f"{relative}: a file of the source, missing in the output"
        elif copy.read_bytes() != file.read_bytes() and not _samples_now(copy, file):
            yield f"{relative}: differs from the source's"


def _samples_now(copy: Path, file: Path) -> bool:
    """Whether a generation config only says now that its values for sampling are meant: `do_sample: true`."""
    if file.name != "generation_config.json":
        return False
    theirs = json.loads(file.read_text(encoding="utf-8"))
    ours = json.loads(copy.read_text(encoding="utf-8"))
    return not theirs.get("do_sample") and bool(ours == {**theirs, "do_sample": True})


def _is_weight_of(source: Checkpoint, name: str, out: Checkpoint) -> bool:
    entry = source.tensors.get(out.part(name))
    if entry is None:
        return False
    return out.shape(name) == (entry.shape[::-1] if _is_conv1d(source, name) else entry.shape)


def _is_conv1d(source: Checkpoint, name: str) -> bool:
    """Whether a source holds the linear `name` as [in, out]: a bias has `out` elements. Of a square one its
    fellows tell."""
    weight, bias = (source.tensors.get(f"{name}.{suffix}") for suffix in ("weight", "bias"))
    if weight is None or bias is None or len(weight.shape) != 2:
        return False
    rows, columns = weight.shape
    return bias.shape == (columns,) and (rows != columns or source.holds_transposed)


def _readable(out: Checkpoint, name: str) -> bool:
    """Whether the three weight tensors have the shapes and dtypes that `dequantize` needs."""
    entries = [out.tensors.get(out.part(name, s)) for s in ("weight", "weight_scale", "weight_scale_2")]
    if any(entry is None for entry in entries):
        return False
    weight, scale, scale_2 = (entry for entry in entries if entry is not None)
    kinds = (weight.dtype, scale.dtype, scale_2.dtype, scale_2.size)
    return (
        kinds == ("U8", "F8_E4M3", "F32", 1) and 0 not in weight.shape and out.packed_axis(name) is not None
    )


def _row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices over the rows of [N, K], about CHUNK_ELEMENTS each, multiples of an FP8 source's 128 rows; over
    the experts of [E, ., .], one each."""
    step = 1 if len(shape) == 3 else max(1, CHUNK_ELEMENTS // max(1, shape[1]) // 128) * 128
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _source_rows(source: Checkpoint, key: str, rows: slice) -> Array:
    """Some rows of a source's weight, as floats; FP8 sources times their 128 x 128 block scales."""
    part = source.array(key, rows)
    if source.tensors[key].dtype != "F8_E4M3":
        return part
    blocks = slice(rows.start // 128, -(-rows.stop // 128))
    inverse = source.array(f"{key}_scale_inv", blocks)
    spread = np.repeat(np.repeat(inverse, 128, axis=0), 128, axis=1)
    return reference.e4m3_decode(part) * spread[: part.shape[0], : part.shape[1]]


def _pairs(out: Checkpoint, source: Checkpoint, name: str) -> Iterator[tuple[Array, Array]]:
    """(the source's values, what was made of them) of one quantized linear, a chunk of rows at a time."""
    key = out.part(name)
    if _is_conv1d(source, name):
        yield source.array(key).T, out.dequantize(name)
        return
    for rows in _row_slices(source.tensors[key].shape):
        yield _source_rows(source, key, rows), out.dequantize(name, rows)


def _energies(w: Array, ours: Array) -> tuple[float, float]:
    """(sum w^2, sum (w - w')^2) in float64."""
    w = w.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # a broken scale gives inf or NaN noise
        return float(np.square(w).sum()), float(np.square(w - ours).sum())


def _signal_noise(out: Checkpoint, source: Checkpoint, name: str) -> tuple[float, float]:
    """(sum w^2, sum (w - w')^2) of one quantized linear."""
    signal, noise = np.sum([_energies(w, ours) for w, ours in _pairs(out, source, name)], axis=0)
    return float(signal), float(noise)


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _same_bytes(a: Array, b: Array) -> bool:
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    return all(np.array_equal(a[i : i + (1 << 26)], b[i : i + (1 << 26)]) for i in range(0, len(a), 1 << 26))


def _module(name: str, suffix: str) -> str:
    return name.removesuffix("." + suffix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _fusion_groups(modules: Iterable[str]) -> list[list[str]]:
    """Groups of two or more present siblings that engines merge."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for members in FUSED:
            if leaf in members:
                groups[parent, members].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _quantization_config(out: Checkpoint) -> Json:
    value = (out.config or {}).get("quantization_config")
    return value if isinstance(value, dict) else {}


def _quantization(out: Checkpoint) -> Json:
    value = (out.quant or {}).get("quantization")
    return value if isinstance(value, dict) else {}


def _config_values(out: Checkpoint, keys: tuple[str, ...]) -> list[int]:
    """The positive integers under any of `keys` in config.json or its text_config."""
    config = out.config or {}
    text = config.get("text_config")
    found = [c.get(key) for c in (config, text if isinstance(text, dict) else {}) for key in keys]
    return [v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0]


def _entries(value: Any) -> set[str]:
    return {e for e in value if isinstance(e, str) and e} if isinstance(value, list) else set()


def _describe(entry: Entry | None) -> str:
    return "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1, and the order of keys does not matter."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _has(value: Any, expected: Json) -> bool:
    return isinstance(value, dict) and all(k in value and _same(value[k], v) for k, v in expected.items())
