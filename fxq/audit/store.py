"""Safetensors shards and JSON files of a directory, read without any library that writes them.

Format: https://github.com/huggingface/safetensors#format (u64 little endian length, JSON header, data).
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxq.audit import decoding
from fxq.audit.findings import Finding

Array = NDArray[Any]
Json = dict[str, Any]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
CHUNK_BYTES = 32 << 20
# safetensors dtype -> numpy type of its elements; BF16 and F8 are bit patterns.
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "F8_E8M0": "u1",
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
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Entry:
    """One tensor: its shard, dtype, shape, and where its bytes [begin, end) lie in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Store:
    """The tensors of a directory by name, and what is wrong with its shards and index."""

    path: Path
    entries: dict[str, Entry]
    findings: list[Finding] = field(default_factory=list)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements of rows [start, stop) of the first axis (all of them by default), as stored."""
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        row = math.prod(entry.shape[1:])
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else min(stop, rows)
        flat = np.fromfile(
            self.path / entry.shard,
            dtype=dtype,
            count=(stop - start) * row,
            offset=entry.begin + start * row * dtype.itemsize,
        )
        return flat.reshape((stop - start, *entry.shape[1:]) if entry.shape else ())

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """The same as float32 (float64 stays); integers as they are."""
        return decoding.decode(self.raw(name, start, stop), self.entries[name].dtype)

    def scalar(self, name: str) -> float | None:
        """The value of a tensor with one element; None of any other."""
        entry = self.entries.get(name)
        return float(self.values(name).reshape(())) if entry is not None and entry.size == 1 else None

    def chunks(self, name: str, *, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the first axis, each of about CHUNK_BYTES and a multiple of `multiple`."""
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row = max(1, (entry.end - entry.begin) // max(1, rows))
        step = max(1, CHUNK_BYTES // row // multiple) * multiple
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def read_json(path: Path, findings: list[Finding]) -> Json | None:
    """The object in a file; None if there is none, or none that can be read (a finding)."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        findings.append(Finding("json-invalid", path.name, f"expected JSON, found {error}"))
        return None
    if isinstance(value, dict):
        return value
    findings.append(Finding("json-invalid", path.name, f"expected an object, found a {type(value).__name__}"))
    return None


def model_files(path: Path) -> set[str]:
    """The safetensors files that loaders take for the model: those that the index lists, else
    model.safetensors, else all."""
    listed = (read_json(path / INDEX, []) or {}).get("weight_map")
    if isinstance(listed, dict):
        return {name for name in listed.values() if isinstance(name, str)}
    names = {file.name for file in path.glob("*.safetensors")}
    return {SINGLE} if SINGLE in names else names


def open_store(path: Path, only: Container[str] | None = None) -> Store:
    """Every tensor of the directory's safetensors files, or of some of them; only headers are read."""
    findings: list[Finding] = []
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(path.glob("*.safetensors")):
        if only is not None and file.name not in only:
            continue
        try:
            headers[file.name] = _header(file)
            findings += _layout(file, headers[file.name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            findings.append(Finding("header-invalid", file.name, str(error)))
            headers[file.name] = {}
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    sizes = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    entries = {name: e for name, e in entries.items() if e.end <= sizes[e.shard]}
    counts = Counter(name for header in headers.values() for name in header)
    for name, count in counts.items():
        if count > 1:
            shards = ", ".join(shard for shard, header in headers.items() if name in header)
            findings.append(Finding("tensor-twice", name, f"expected in one shard, found in {shards}"))
    index = read_json(path / INDEX, findings)
    if index is not None:
        findings += _against_index(index, headers)
    elif len(headers) > 1 and not (path / INDEX).is_file():
        findings.append(
            Finding("index-missing", INDEX, f"expected for {len(headers)} shards, found no such file")
        )
    return Store(path, entries, findings)


def _header(path: Path) -> dict[str, Entry]:
    """Tensors of one file; ValueError, KeyError or TypeError if its header makes no sense."""
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
        if length > min(total - 8, MAX_HEADER):
            raise ValueError(f"expected a safetensors header, found a file of {total} bytes without one")
        text = file.read(length)
    header = json.loads(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError(f"expected a header that is an object, found a {type(header).__name__}")
    return {
        name: _entry(path.name, name, value, 8 + length)
        for name, value in header.items()
        if name != "__metadata__"
    }


def _entry(shard: str, name: str, value: Json, data: int) -> Entry:
    dtype, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected a dtype of safetensors, found {dtype!r}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: expected sizes that are counts, found {value}")
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{name}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return Entry(shard, dtype, shape, data + begin, data + end)


def _layout(path: Path, entries: dict[str, Entry]) -> Iterator[Finding]:
    """Tensors must follow one another without holes up to the end of the file; one finding a file."""
    total = path.stat().st_size
    spans = sorted(((e.begin, e.end, name) for name, e in entries.items()), key=lambda s: s[:2])
    for (_, end, _), (begin, _, name) in pairwise(spans):
        if begin != end:
            kind = "a hole before" if begin > end else "an overlap at"
            yield Finding("header-invalid", path.name, f"{kind} {name}: byte {begin}, expected {end}")
            return
    if spans and spans[-1][1] != total:
        verb = "cut off" if spans[-1][1] > total else "too long"
        yield Finding(
            "header-invalid", path.name, f"{verb}: tensors end at byte {spans[-1][1]}, the file at {total}"
        )


def _against_index(index: Json, headers: dict[str, dict[str, Entry]]) -> Iterator[Finding]:
    places = index.get("weight_map")
    if not isinstance(places, dict):
        yield Finding("index-wrong", INDEX, "expected a weight_map, found none")
        return
    for name, shard in places.items():
        if name not in headers.get(str(shard), {}):
            actual = next((s for s, header in headers.items() if name in header), "no shard")
            missing = "" if str(shard) in headers else ", which does not exist"
            yield Finding("index-wrong", name, f"expected in {shard}{missing}; found in {actual}")
    for shard, header in headers.items():
        if shard not in places.values():
            yield Finding("shard-orphan", shard, f"{len(header)} tensors, none of them in the index")
            continue
        for name in header:
            if name not in places:
                yield Finding("index-unlisted", name, f"expected in {INDEX}, found only in {shard}")
    sizes = {n: e.end - e.begin for header in headers.values() for n, e in header.items() if n in places}
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is not None and stated != sum(sizes.values()):
        yield Finding("index-size", INDEX, f"expected total_size {sum(sizes.values())}, found {stated}")
