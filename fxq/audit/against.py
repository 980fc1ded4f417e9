"""A checkpoint against the model that it was made from: what was left alone is the same to the byte, what
was quantized decodes to about the same values. What the report says that passes rewrote has the
same shape and dtype."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxq.audit import decoding
from fxq.audit.checkpoint import COMPRESSED, CONFIG, Checkpoint, Kind, Linear, packed_axis
from fxq.audit.experts import EXPERT
from fxq.audit.findings import Finding, fold
from fxq.audit.rewrites import REPORT, Rewrites, read_rewrites
from fxq.audit.store import FLOATS, Entry, Json, Store, model_files, open_store, read_json
from fxq.errors import SourceError

Array = NDArray[Any]
# Correct NVFP4 weights are at 18 to 22 dB, FP8 above 25; swapped nibbles or a scale off by two are below 7.
BROKEN_DB, LARGE_DB = 10.0, 15.0
_SIDE_FILES = re.compile(
    r"tokenizer.*|vocab.*|merges\.txt|chat_template.*|generation_config\.json|.*\.tiktoken"
)
_KV_SCALE = re.compile(r".*\.[kv]_scale")

# What a quantized base holds of a weight, besides itself: codes, scales, shapes; how codes are called.
_ENCODED = re.compile(
    r"(_blocks|_scales|\.weight_packed|\.(weight|input)_(global_)?scale(_inv|_2)?|\.weight_shape|\.scale)$"
)
_CODES = (".weight", ".weight_packed", "_blocks")
_WEIGHT_SCALES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class Place:
    """Where a linear's weight is in the base: rows of a tensor, or of one expert of it."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


def check(checkpoint: Checkpoint, base: Path, summary: dict[str, Any]) -> Iterator[Finding]:
    """All comparisons; adds `sqnr_db`, `worst_sqnr_db`, `worst` and `rewritten` to the summary."""
    if not base.is_dir() or not any(base.glob("*.safetensors")):
        raise SourceError(f"{base}: expected a model's directory with *.safetensors, found none")
    source = open_store(base, model_files(base))
    places = {name: _place(linear, source) for name, linear in checkpoint.linears.items()}
    used = {place.name for place in places.values() if place is not None}
    unusable: list[Finding] = []
    rewrites = read_rewrites(checkpoint.store.path, unusable)
    yield from unusable
    rewritten: list[str] = []
    yield from _untouched(checkpoint, source, used, rewrites, rewritten)
    yield from _errors(checkpoint, source, places, summary, rewrites, rewritten)
    if rewritten:
        count = summary["rewritten"] = len(rewritten)
        what = f"{count} tensor{'s' * (count > 1)} rewritten by a pass: not compared with the base"
        yield Finding("base-rewritten", REPORT, f"{what}: {fold(rewritten)}")
    untied = any(rewrites.is_untied(name) and name not in source.entries for name in checkpoint.store.entries)
    yield from _files(checkpoint, base, untied=untied)


def _place(linear: Linear, source: Store) -> Place | None:
    name = linear.name if linear.name in source.entries else f"{linear.name}.weight"
    if name in source.entries:
        return Place(name)
    match = EXPERT.fullmatch(linear.name)
    if match is None:
        return None
    leaf, expert = match["projection"], int(match["index"])
    joined = source.entries.get(f"{match['layer']}.gate_up_proj")
    if leaf in ("gate_proj", "up_proj") and joined is not None and len(joined.shape) == 3:
        half = joined.shape[1] // 2
        start = 0 if leaf == "gate_proj" else half
        return Place(f"{match['layer']}.gate_up_proj", expert, (start, start + half))
    stacked = f"{match['layer']}.{leaf}"
    return Place(stacked, expert) if stacked in source.entries else None


def _untouched(
    checkpoint: Checkpoint, source: Store, used: set[str], rewrites: Rewrites, rewritten: list[str]
) -> Iterator[Finding]:
    """What is not quantized; names of rewritten tensors are added to `rewritten`."""
    ours, parts = checkpoint.store, checkpoint.parts
    gone = {f"{name}_scale_inv" for name in used} | {f"{name}_scale" for name in used}
    gone |= {f"{name.removesuffix('.weight')}.input_scale" for name in used}
    for name, entry in source.entries.items():
        if name in used or name in gone:
            continue
        found = ours.entries.get(name)
        if _is_decoded(name, entry, found, source):
            continue
        if found is None:
            yield Finding("base-lost", name, f"{entry} in the base, found nowhere")
        elif (found.dtype, found.shape) != (entry.dtype, entry.shape):
            yield Finding("base-changed", name, f"expected {entry}, found {found}")
        elif name in rewrites.names:
            rewritten.append(name)
        elif not _same(ours, source, name):
            yield Finding("base-changed", name, f"{entry}, other bytes")
    kinds = {(entry.dtype, entry.shape) for entry in source.entries.values()}
    for name, entry in ours.entries.items():
        if name in source.entries or name in parts or _KV_SCALE.fullmatch(name):
            continue
        if name.endswith(".weight") and f"{name}_packed" in source.entries:
            continue  # decoded
        if rewrites.is_untied(name) and (entry.dtype, entry.shape) in kinds:  # of what it was tied to
            rewritten.append(name)
        else:
            yield Finding("base-added", name, f"{entry} is not in the base")


def _is_decoded(name: str, entry: Entry, found: Entry | None, source: Store) -> bool:
    """Whether a tensor of the base is part of a quantized weight, of which the checkpoint has the values."""
    if found is None:
        stem = _ENCODED.sub("", name)
        return stem != name and any(f"{stem}{suffix}" in source.entries for suffix in _CODES)
    narrow = entry.dtype in ("F8_E4M3", "U8", "I8")
    return narrow and found.dtype in FLOATS and any(f"{name}{s}" in source.entries for s in _WEIGHT_SCALES)


def _same(ours: Store, source: Store, name: str) -> bool:
    pairs = ((ours.raw(name, *rows), source.raw(name, *rows)) for rows in ours.chunks(name))
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def _errors(
    checkpoint: Checkpoint,
    source: Store,
    places: dict[str, Place | None],
    summary: dict[str, Any],
    rewrites: Rewrites,
    rewritten: list[str],
) -> Iterator[Finding]:
    """What is quantized; names of rewritten weights are added to `rewritten`."""
    total_signal = total_noise = 0.0
    compared, worst = 0, (math.inf, "")
    for name, linear in checkpoint.linears.items():
        place, weight = places[name], linear.parts["weight"]
        reason = _unreadable(checkpoint, linear, source, place)
        if reason is not None:
            yield Finding("base-uncompared", weight, reason)
            continue
        assert place is not None
        if not _fits(checkpoint, linear, source, place):
            found = list(source.entries[place.name].shape)
            yield Finding(
                "base-shape", weight, f"expected the base's {found}, found {_shape(checkpoint, linear)}"
            )
            continue
        if (listed := rewrites.name_of(linear)) is not None:
            rewritten.append(listed)
            continue
        parts = _compare(checkpoint, linear, source, place)
        compared += 1
        total_signal += sum(signal for signal, _ in parts)
        total_noise += sum(noise for _, noise in parts)
        # Every expert of a stack counts alone: a forgotten one would be lost in the sum.
        decibels = [decoding.decibel(*pair) for pair in parts if pair[0] > 0 or pair[1] != 0]
        least = min(decibels, key=lambda d: -math.inf if math.isnan(d) else d, default=math.inf)
        if not least >= worst[0]:
            worst = (least, name)
        expert = f" (expert {decibels.index(least)})" if len(parts) > 1 and math.isfinite(least) else ""
        if not least >= BROKEN_DB:
            yield Finding("error-broken", weight, f"expected 18 dB and more, found {least:.1f} dB{expert}")
        elif least < LARGE_DB:
            yield Finding("error-large", weight, f"expected 18 dB and more, found {least:.1f} dB{expert}")
    summary["compared"] = compared
    if compared:
        summary["sqnr_db"] = _finite(decoding.decibel(total_signal, total_noise))
        summary["worst_sqnr_db"], summary["worst"] = _finite(worst[0]), worst[1]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unreadable(checkpoint: Checkpoint, linear: Linear, source: Store, place: Place | None) -> str | None:
    """Why a linear cannot be compared; None if it can."""
    if place is None:
        return "the base has no weight of this name"
    entry = source.entries[place.name]
    scaled = f"{place.name}_scale_inv" in source.entries or f"{place.name}_scale" in source.entries
    if entry.dtype not in FLOATS and not (entry.dtype == "F8_E4M3" and scaled and len(entry.shape) == 2):
        return f"the base holds {entry}"
    entries, parts = checkpoint.store.entries, linear.parts
    roles = ("weight", "scale", "global") if linear.kind is Kind.NVFP4 else ("weight", "scale")
    if any(parts[role] not in entries for role in roles):
        return "a scale is missing"
    if linear.kind is Kind.NVFP4:
        weight, scale = entries[parts["weight"]], entries[parts["scale"]]
        typed = (weight.dtype, scale.dtype) == ("U8", "F8_E4M3")
        if not typed or packed_axis(weight, scale) is None or entries[parts["global"]].size != 1:
            return "its tensors do not fit together"
    elif _spread(entries[parts["weight"]], entries[parts["scale"]]) is None:
        return "its scales are of another form"
    return None


def _shape(checkpoint: Checkpoint, linear: Linear) -> tuple[int, ...]:
    """The shape of a quantized linear before it was packed."""
    entries = checkpoint.store.entries
    shape = list(entries[linear.parts["weight"]].shape)
    if linear.kind is Kind.NVFP4:
        axis = packed_axis(entries[linear.parts["weight"]], entries[linear.parts["scale"]])
        shape[-1 if axis is None else axis] *= 2
    return tuple(shape)


def _fits(checkpoint: Checkpoint, linear: Linear, source: Store, place: Place) -> bool:
    """Whether a linear has the shape of its weight in the base, or that turned."""
    ours, theirs = _shape(checkpoint, linear), source.entries[place.name].shape
    if place.expert is None:
        return ours in (theirs, theirs[::-1])
    if len(theirs) != 3 or place.expert >= theirs[0]:
        return False
    rows = place.rows or (0, theirs[1])
    return ours == (rows[1] - rows[0], theirs[2])


def _compare(
    checkpoint: Checkpoint, linear: Linear, source: Store, place: Place
) -> list[tuple[float, float]]:
    """(energy, squared error) of a linear that fits, or of each of its experts."""
    ours, theirs = _shape(checkpoint, linear), source.entries[place.name].shape
    if place.expert is not None:
        rows = place.rows or (0, theirs[1])
        w = source.values(place.name, place.expert, place.expert + 1)[0, rows[0] : rows[1]]
        return [decoding.squares(w, _decoded(checkpoint, linear, 0, ours[0]))]
    straight = None
    if ours == theirs:
        straight = [
            decoding.squares(_base_rows(source, place.name, *rows), _decoded(checkpoint, linear, *rows))
            for rows in _ranges(checkpoint, linear, ours)
        ]
        if len(ours) == 3:
            return straight
        straight = [(sum(s for s, _ in straight), sum(n for _, n in straight))]
        if ours != ours[::-1] or decoding.decibel(*straight[0]) >= BROKEN_DB:
            return straight
    # Some families (GPT-2) keep linears as [in, out]; of a square one only the values tell.
    w = _base_rows(source, place.name, 0, theirs[0]).T
    turned = [decoding.squares(w, _decoded(checkpoint, linear, 0, ours[0]))]
    return straight if straight and not decoding.decibel(*turned[0]) >= BROKEN_DB else turned


def _ranges(checkpoint: Checkpoint, linear: Linear, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows to decode at a time: an expert of a stack, else about a chunk; all where blocks lie along rows."""
    entries = checkpoint.store.entries
    if len(shape) == 3:
        yield from ((i, i + 1) for i in range(shape[0]))
    elif (
        linear.kind is Kind.NVFP4
        and packed_axis(entries[linear.parts["weight"]], entries[linear.parts["scale"]]) == -2
    ):
        yield 0, shape[0]
    else:
        step = max(1, (1 << 22) // shape[1] // 128) * 128
        yield from ((i, min(i + step, shape[0])) for i in range(0, shape[0], step))


def _decoded(checkpoint: Checkpoint, linear: Linear, start: int, stop: int) -> Array:
    """float32 rows of a quantized linear, by verify's own arithmetic."""
    store, parts = checkpoint.store, linear.parts
    if linear.kind is not Kind.NVFP4:
        values = store.values(parts["weight"], start, stop)
        spread = _spread(store.entries[parts["weight"]], store.entries[parts["scale"]])
        assert spread is not None
        shape, (tall, wide) = spread
        scale = decoding.scales(store.raw(parts["scale"]), store.entries[parts["scale"]].dtype).reshape(shape)
        lines = np.arange(start, start + len(values)) // tall
        return values * np.repeat(scale[lines], wide, axis=1)[:, : values.shape[1]]
    weight, scale_entry = store.entries[parts["weight"]], store.entries[parts["scale"]]
    value = store.scalar(parts["global"]) or math.nan
    multiplier = 1 / value if checkpoint.declared.format == COMPRESSED else value
    if packed_axis(weight, scale_entry) == -1:
        packed, scales = (store.raw(parts[role], start, stop) for role in ("weight", "scale"))
        return decoding.nvfp4(packed, scales, multiplier)
    rows = (start, stop) if len(weight.shape) == 3 else (0, None)
    packed, scales = (
        np.ascontiguousarray(np.swapaxes(store.raw(parts[role], *rows), -1, -2))
        for role in ("weight", "scale")
    )
    return np.swapaxes(decoding.nvfp4(packed, scales, multiplier), -1, -2)


def _spread(weight: Entry, scale: Entry) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(a grid of the scales of an FP8 matrix, rows and columns that each is for); None if they do not fit."""
    if len(weight.shape) != 2 or 0 in weight.shape:
        return None
    rows, columns = weight.shape
    if scale.size == 1:
        return (1, 1), (rows, columns)
    if scale.shape in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    if scale.shape == (rows, columns // 32) and scale.dtype in ("U8", "F8_E8M0"):
        return (rows, columns // 32), (1, 32)
    grid = -(-rows // 128), -(-columns // 128)
    return (grid, (128, 128)) if scale.shape in (grid, (grid[0], 1, grid[1], 1)) else None


def _base_rows(source: Store, name: str, start: int, stop: int) -> Array:
    """float32 rows of the base's weight; FP8 times its scales: one, one a row, or one a square block."""
    values = source.values(name, start, stop)
    if source.entries[name].dtype != "F8_E4M3":
        return values
    inverse = f"{name}_scale_inv"
    scale = source.values(inverse if inverse in source.entries else f"{name}_scale")
    if scale.size == 1:
        return values * scale.reshape(())
    rows, columns = source.entries[name].shape
    scale = scale.reshape(len(scale), -1)
    tall, wide = (-(-n // m) for n, m in zip((rows, columns), scale.shape, strict=True))
    if scale.shape[1] > 1 or len(scale) < rows:
        tall, wide = (1 << (n - 1).bit_length() for n in (tall, wide))
    spread = scale[np.arange(start, stop) // tall][:, np.arange(columns) // wide]
    return values * spread


def _files(checkpoint: Checkpoint, base: Path, *, untied: bool) -> Iterator[Finding]:
    theirs = dict(read_json(base / CONFIG, []) or {})
    if untied:
        theirs = _untied(theirs)
    ours = dict(checkpoint.config)
    for config in (ours, theirs):
        config.pop("quantization_config", None)
    for key in sorted(set(ours) | set(theirs)):
        if json.dumps(ours.get(key), sort_keys=True) != json.dumps(theirs.get(key), sort_keys=True):
            yield Finding(
                "base-config", f"{CONFIG}: {key}", f"expected {theirs.get(key)!r}, found {ours.get(key)!r}"
            )
    for file in sorted(base.iterdir()):
        if (
            file.is_file()
            and _SIDE_FILES.fullmatch(file.name)
            and not (checkpoint.store.path / file.name).is_file()
        ):
            yield Finding("base-file", file.name, "expected as the base has it, found none")


def _untied(config: Json) -> Json:
    """A base's config as that of a checkpoint must be whose head has a tensor of its own."""
    off = {"tie_word_embeddings": False}
    ties = {k: v for k, v in config.items() if isinstance(v, dict) and v.get("tie_word_embeddings")}
    return {**config, **{name: {**part, **off} for name, part in ties.items()}, **off}
