"""Safetensors file: its header, believed only after every check, and plain reads of its bytes.

The format: 8 bytes little-endian length n, n bytes of JSON, then the tensors end to end
(https://github.com/huggingface/safetensors#format). Bytes are read with `preadv` into fresh memory: nothing
is mapped and no position is shared, so several threads may read at once and memory is what was asked for.
"""

import json
import math
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.graph.hub import TensorInfo

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_ENTRY = {"dtype", "shape", "data_offsets"}
_LONGEST_NAME = 500  # characters
_AT_ONCE = 1 << 30  # bytes a read; the kernel's own limit is just below 2**31


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: what it is, and where its first byte lies, counted from the start of the file."""

    info: TensorInfo
    offset: int


class SafetensorsFile:
    """An open safetensors file; SourceError if its header says anything that cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            size = os.fstat(self._file).st_size
            text = self._header(size)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self.entries = _entries(text, size)
        except _Malformed as error:
            raise SourceError(f"{path}: not a safetensors file that can be trusted: {error}") from None

    def _header(self, size: int) -> bytes:
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise SourceError(
                f"{self.path}: not a safetensors file, or cut short: it has {size} bytes, and its first 8 "
                f"announce a header of {length}"
            )
        return os.pread(self._file, length, 8)

    def read(self, key: str, out: Tensor, start: int = 0) -> None:
        """Fill `out` (contiguous, on the CPU) with the bytes of a tensor from byte `start` of it on."""
        left = out.reshape(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        offset = self.entries[key].offset + start
        while left:
            try:
                count = os.preadv(self._file, [left[:_AT_ONCE]], offset)
            except OSError as error:
                raise SourceError(f"{self.path}: cannot read {key}: {error.strerror}") from error
            if count == 0:
                raise SourceError(
                    f"{self.path}: cannot read {key}: the file ends at byte {offset}, {len(left)} bytes early"
                )
            left, offset = left[count:], offset + count


class _Malformed(Exception):
    """What is wrong with a header."""


# safetensors' own check (safe_open) cannot stand in for these: it gives no offsets, takes a name twice, names
# with control characters and sizes such as [0, 2**62], and does not name the tensor whose size is wrong.
def _entries(text: bytes, size: int) -> dict[str, Entry]:
    header = _json(text)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _Malformed("its __metadata__ is no mapping from text to text")
    data = 8 + len(text)
    entries = {key: _entry(key, value, data) for key, value in header.items()}
    end, before = data, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if entry.offset != end:
            how = "overlaps" if entry.offset < end else "leaves a hole behind"
            raise _Malformed(
                f"{key} begins at byte {entry.offset} of the file, which {how} {before}, ending at {end}"
            )
        end, before = entry.offset + entry.info.nbytes, key
    if end != size:
        raise _Malformed(f"its tensors end at byte {end}, the file has {size}")
    return entries


def _json(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its header is no JSON: {type(error).__name__} {str(error)[:100]}") from None
    if not isinstance(header, dict):
        raise _Malformed("its header is no JSON object")
    return header


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Malformed(f"its header has {key[:200]!r} twice")
        found[key] = value
    return found


def _entry(key: str, value: Any, data: int) -> Entry:
    if not key.isprintable() or len(key) > _LONGEST_NAME:
        raise _Malformed(f"{key[:60]!r} is no name of a tensor")
    if not isinstance(value, dict) or value.keys() != _ENTRY:
        raise _Malformed(f"{key} is not described by {', '.join(sorted(_ENTRY))}")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise _Malformed(f"{key} has dtype {str(name)[:40]}; fxq reads {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _Malformed(
            f"{key} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}; expected lists "
            "of natural numbers"
        )
    info = TensorInfo.of(tuple(shape), DTYPES[name])
    if math.prod(max(n, 1) for n in shape) * info.dtype.itemsize >= 2**63:  # zero rows of 2**62 columns
        raise _Malformed(f"{key} has shape {str(shape)[:60]}, larger than any memory")
    begin, end = offsets
    if end - begin != info.nbytes:
        raise _Malformed(
            f"{key} is {name} {shape}, {info.nbytes} bytes, but its data_offsets span {end - begin}"
        )
    return Entry(info, data + begin)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)
