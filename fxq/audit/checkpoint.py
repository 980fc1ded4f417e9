"""What a directory declares and holds: the quantization configs, and the tensors of each quantized linear."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from fxq.audit.store import FLOATS, Entry, Json, Store, open_store, read_json
from fxq.errors import CheckpointError

CONFIG, NESTED = "config.json", "hf_quant_config.json"
MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
PACKED = "nvfp4-pack-quantized"


class Kind(StrEnum):
    """How a linear is quantized, as its tensors show."""

    NVFP4 = "NVFP4"
    FP8 = "FP8"
    FP8_ROWS = "FP8 by rows"
    FP8_BLOCKS = "FP8 in blocks"
    MXFP8 = "MXFP8"


# The ModelOpt algorithms under which engines read each.
ALGORITHMS: Mapping[Kind, tuple[str, ...]] = {
    Kind.NVFP4: ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"),
    Kind.FP8: ("FP8",),
    Kind.FP8_ROWS: ("FP8_PER_CHANNEL_PER_TOKEN",),
    Kind.FP8_BLOCKS: ("FP8_PB_WO", "FP8_BLOCK_SCALES"),
    Kind.MXFP8: ("MXFP8",),
}
# Scales of blocks of FP8 under the name that DeepSeek-V3 gave them.
INVERSE = "weight_scale_inv"


# role -> the tensor's suffix
_MODELOPT_PARTS = {
    "weight": "weight",
    "scale": "weight_scale",
    "global": "weight_scale_2",
    "input": "input_scale",
}
_COMPRESSED_PARTS = {
    "weight": "weight_packed",
    "scale": "weight_scale",
    "global": "weight_global_scale",
    "input": "input_global_scale",
}
_FP8_PARTS = {"weight": "weight", "scale": "weight_scale", "input": "input_scale"}


@dataclass(frozen=True)
class Linear:
    """A quantized linear, or all experts of a layer in one tensor (`fused`).

    parts: role (weight, scale, global, input) -> the name its tensor has if it is there.
    """

    name: str
    kind: Kind
    parts: Mapping[str, str]
    fused: bool = False


@dataclass(frozen=True)
class Declared:
    """What the configs say, config.json first as engines do.

    algorithm: ModelOpt's `quant_algo`; for compressed-tensors its equivalent. layers: module -> algorithm
    (MIXED_PRECISION). excluded: the exclude list. targets: compressed-tensors' targets. kv: whether an FP8
    KV cache is declared.
    """

    format: str
    algorithm: str
    layers: Mapping[str, str]
    excluded: tuple[str, ...]
    targets: tuple[str, ...]
    kv: bool

    def algorithm_of(self, linear: Linear) -> str | None:
        """The algorithm that the configs give a linear; None if they give none."""
        if self.algorithm != "MIXED_PRECISION":
            return self.algorithm
        parts = linear.name.split(".")
        ancestors = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        return next((self.layers[name] for name in ancestors if name in self.layers), None)


@dataclass(frozen=True)
class Checkpoint:
    """A directory with everything that the checks look at."""

    store: Store
    config: Json
    quantization: Json
    nested: Json | None
    declared: Declared

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Quantized linears and fused experts by name, complete or not. FP8 with `weight_scale_inv` is one
        where the configs list it as such; else the source left it."""
        found = sorted(_linears(self.store.entries), key=lambda i: i.name)
        return {linear.name: linear for linear in found if self._is_declared(linear)}

    def _is_declared(self, linear: Linear) -> bool:
        is_source_s = linear.parts["scale"].endswith(INVERSE)
        return not is_source_s or self.declared.algorithm_of(linear) in ALGORITHMS[Kind.FP8_BLOCKS]

    @cached_property
    def matrices(self) -> dict[str, Entry]:
        """Modules with an unquantized floating-point `.weight` of two or more dimensions, and unquantized
        parameters of three or more."""
        found = {}
        for name, entry in self.store.entries.items():
            if entry.dtype not in FLOATS or len(entry.shape) < 2 or name in self.parts:
                continue
            if name.endswith(".weight"):
                found[name.removesuffix(".weight")] = entry
            elif len(entry.shape) > 2:
                found[name] = entry
        return found

    @cached_property
    def parts(self) -> dict[str, Linear]:
        """Tensor name -> the quantized linear that it belongs to."""
        return {
            name: linear
            for linear in self.linears.values()
            for name in linear.parts.values()
            if name in self.store.entries
        }

    def number(self, *keys: str) -> list[int]:
        """The positive integers under any of `keys` in config.json or its text_config."""
        text = self.config.get("text_config")
        configs = (self.config, text if isinstance(text, dict) else {})
        found = [config.get(key) for config in configs for key in keys]
        return [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0]

    def summary(self) -> dict[str, Any]:
        """What was looked at."""
        kinds = [linear.kind for linear in self.linears.values()]
        return {
            "directory": str(self.store.path),
            "format": self.declared.format,
            "algorithm": self.declared.algorithm,
            "tensors": len(self.store.entries),
            "linears": {str(kind): kinds.count(kind) for kind in Kind if kind in kinds},
            "bytes": sum(entry.end - entry.begin for entry in self.store.entries.values()),
        }


def packed_axis(weight: Entry, scale: Entry) -> int | None:
    """The axis along which blocks lie: the last, or (experts kept as [.., in, out]) the one before it; None
    if the shapes fit neither."""
    if len(weight.shape) not in (2, 3) or len(weight.shape) != len(scale.shape):
        return None
    for axis in (-1, -2):
        expected = list(weight.shape)
        if expected[axis] % 8 == 0:
            expected[axis] //= 8
            if tuple(expected) == scale.shape:
                return axis
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read headers and configs; CheckpointError if this is no NVFP4 checkpoint at all."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected an NVFP4 checkpoint")
    store = open_store(path)
    config, nested = (read_json(path / name, store.findings) for name in (CONFIG, NESTED))
    if config is None and nested is None:
        raise CheckpointError(f"{path}: expected {CONFIG}, found none that can be read")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: expected *.safetensors files, found none")
    config = config or {}
    flat, inner = config.get("quantization_config"), (nested or {}).get("quantization")
    quantization = flat if isinstance(flat, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    if not quantization and not inner and not list(_linears(store.entries)):
        raise CheckpointError(
            f"{path}: not a quantized checkpoint: neither {CONFIG} nor {NESTED} declares a quantization, and "
            "no tensor is packed"
        )
    return Checkpoint(store, config, quantization, nested, _declared(path, quantization, inner))


def _declared(path: Path, flat: Json, nested: Json) -> Declared:
    method = flat.get("quant_method")
    if flat and method == COMPRESSED:
        return _declared_compressed(path, flat)
    if flat and not str(method).startswith(MODELOPT) and method is not None:
        raise CheckpointError(
            f"{path}: not an NVFP4 checkpoint: quant_method is {method!r}; "
            f"expected {MODELOPT} or {COMPRESSED}"
        )
    chosen = flat or nested
    algorithm = str(chosen.get("quant_algo"))
    groups = _groups(flat)
    if algorithm == "NVFP4" and groups and all(g.get("input_activations") is None for g in groups.values()):
        algorithm = "W4A16_NVFP4"
    layers = chosen.get("quantized_layers")
    layers = layers if isinstance(layers, dict) else {}
    excluded = flat.get("ignore", flat.get("exclude_modules")) if flat else nested.get("exclude_modules")
    return Declared(
        MODELOPT,
        algorithm,
        {name: str(layer.get("quant_algo")) for name, layer in layers.items() if isinstance(layer, dict)},
        names(excluded),
        (),
        bool(
            flat.get("kv_cache_scheme")
            or flat.get("kv_cache_quant_algo")
            or nested.get("kv_cache_quant_algo")
        ),
    )


def _declared_compressed(path: Path, flat: Json) -> Declared:
    groups = _groups(flat)
    formats = {str(flat.get("format")), *(str(g.get("format")) for g in groups.values())}
    if PACKED not in formats:
        raise CheckpointError(
            f"{path}: not an NVFP4 checkpoint: compressed-tensors format {flat.get('format')!r}; "
            f"expected {PACKED}"
        )
    inputs = any(group.get("input_activations") is not None for group in groups.values())
    targets = tuple(t for group in groups.values() for t in names(group.get("targets")))
    algorithm = "NVFP4" if inputs else "W4A16_NVFP4"
    if any((g.get("weights") or {}).get("num_bits") == 8 for g in groups.values()):
        algorithm = "MIXED_PRECISION"
    return Declared(
        COMPRESSED, algorithm, {}, names(flat.get("ignore")), targets, bool(flat.get("kv_cache_scheme"))
    )


def _groups(flat: Json) -> dict[str, Json]:
    groups = flat.get("config_groups")
    return {k: g for k, g in groups.items() if isinstance(g, dict)} if isinstance(groups, dict) else {}


def names(value: Any) -> tuple[str, ...]:
    """The strings of a list from a config; nothing if it is none."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _linears(entries: Mapping[str, Entry]) -> Iterator[Linear]:
    """Whatever has packed weights or the scales of some; by the names of its tensors."""
    seen: set[str] = set()
    for name in entries:
        for suffix, kinds in _SIGNS.items():
            if not name.endswith(suffix) or len(name) <= len(suffix) + 1:
                continue
            separator, owner = name[-len(suffix) - 1], name[: -len(suffix) - 1]
            if separator not in "._" or owner in seen:
                continue
            linear = _linear(owner, separator == "_", kinds, entries)
            if linear is not None:
                seen.add(owner)
                yield linear


# A tensor's suffix -> what its linear may be.
_SIGNS = {
    "weight_packed": COMPRESSED,
    "weight_global_scale": COMPRESSED,
    "weight_scale_2": MODELOPT,
    "weight_scale": MODELOPT,
    INVERSE: MODELOPT,
    "weight": "bare",
}


def _linear(owner: str, fused: bool, sign: str, entries: Mapping[str, Entry]) -> Linear | None:
    """The linear whose tensors begin with `owner`, if the one that was found makes it a quantized one."""
    if f"{owner}.weight_packed" in entries or sign == COMPRESSED:
        return Linear(owner, Kind.NVFP4, {r: f"{owner}.{s}" for r, s in _COMPRESSED_PARTS.items()})
    if fused:
        if sign == "bare" or owner not in entries:
            return None
        parts = {role: owner if role == "weight" else f"{owner}_{s}" for role, s in _MODELOPT_PARTS.items()}
        return Linear(owner, Kind.NVFP4, parts, fused=True)
    weight = entries.get(f"{owner}.weight")
    if sign == "bare" and (weight is None or weight.dtype != "U8"):
        return None
    if weight is not None and weight.dtype == "F8_E4M3":
        parts = {role: f"{owner}.{s}" for role, s in _FP8_PARTS.items()}
        if parts["scale"] not in entries and f"{owner}.{INVERSE}" in entries:
            parts["scale"] = f"{owner}.{INVERSE}"
        return Linear(owner, _eight_bits(weight, entries.get(parts["scale"])), parts)
    if f"{owner}.{INVERSE}" in entries:
        return None
    parts = {role: f"{owner}.{s}" for role, s in _MODELOPT_PARTS.items()}
    return Linear(owner, Kind.NVFP4, parts, fused=weight is not None and len(weight.shape) == 3)


def _eight_bits(weight: Entry, scale: Entry | None) -> Kind:
    """What kind of FP8 a weight is, by the scales that it has."""
    if scale is None or (scale.size == 1 and len(scale.shape) < 4):
        return Kind.FP8
    if scale.dtype in ("U8", "F8_E8M0"):
        return Kind.MXFP8
    return Kind.FP8_ROWS if scale.shape in (weight.shape[:1], (*weight.shape[:1], 1)) else Kind.FP8_BLOCKS
