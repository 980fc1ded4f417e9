"""Shards: safetensors files with headers before their data, written at any place in any order."""

import ctypes
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxq.checkpoint.workdir import PART
from fxq.errors import CheckpointError
from fxq.graph.hub import TensorInfo, natural_order

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"
_READ_BYTES = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Span(NamedTuple):
    """`runs` times `size` bytes of a tensor: the first at byte `start`, the next `stride` further."""

    key: str
    start: int
    size: int
    runs: int = 1
    stride: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the number of its shard, and its first byte there."""

    shard: int
    start: int


@dataclass(frozen=True)
class Block:
    """Values, and the bytes of a tensor that they are to fill."""

    span: Span
    values: Tensor


class Shards:
    """Safetensors files, called `*.part`, of which every tensor's place is known before it is written.

    version: differs if tensors lie elsewhere. Raises CheckpointError if a block does not fit its tensor, or
    if bytes are given twice or never.
    """

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        self.directory, self.infos = directory, infos
        groups = _split(infos, shard_bytes)
        total = len(groups)
        self.names = [
            f"model-{i + 1:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"
            for i in range(total)
        ]
        self._places: dict[str, _Place] = {}
        self._left = {key: info.nbytes for key, info in infos.items()}  # bytes that are yet to come
        self._headers = [self._layout(index, keys) for index, keys in enumerate(groups)]
        sizes = [sum(infos[key].nbytes for key in keys) for keys in groups]
        self.sizes = [len(header) + size for header, size in zip(self._headers, sizes, strict=True)]
        digest = hashlib.blake2b(digest_size=16)
        for header in self._headers:
            digest.update(header)
        self.version = digest.hexdigest()
        self.files: list[int] = []

    def _layout(self, index: int, keys: list[str]) -> bytes:
        """The header of one shard; it begins with its length."""
        header = bytearray(b'{"__metadata__":{"format":"pt"}')
        starts: dict[str, int] = {}
        offset = 0
        # Wide types first, so that every tensor is aligned.
        for key in sorted(keys, key=lambda k: (-self.infos[k].dtype.itemsize, k)):
            info, size = self.infos[key], self.infos[key].nbytes
            entry = {
                "dtype": _NAMES[info.dtype],
                "shape": info.shape,
                "data_offsets": (offset, offset + size),
            }
            header += f",{json.dumps(key)}:{json.dumps(entry, separators=(',', ':'))}".encode()
            starts[key] = offset
            offset += size
        header += b"}"
        header += b" " * (-len(header) % 8)
        self._places |= {key: _Place(index, 8 + len(header) + start) for key, start in starts.items()}
        return len(header).to_bytes(8, "little") + header

    def open(self) -> None:
        """Make the files, or take up those that an interrupted run left."""
        for name, header, size in zip(self.names, self._headers, self.sizes, strict=True):
            file = os.open(self.directory / f"{name}{PART}", os.O_RDWR | os.O_CREAT, 0o666)
            self.files.append(file)
            os.ftruncate(file, size)
            _reserve(file, size)
            _pwrite(file, memoryview(header), 0)
        self._headers = []

    def whole(self, key: str, tensor: Tensor) -> Block:
        """All of a tensor."""
        info = self.infos[key]
        if TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
            raise CheckpointError(f"{key}: expected {info} once, found {tuple(tensor.shape)} {tensor.dtype}")
        return self._block(Span(key, 0, tensor.nbytes), tensor)

    def part(self, key: str, first: int, tensor: Tensor) -> Block:
        """What a tensor has along its first dimension from `first` on."""
        info = self.infos[key]
        if tensor.dtype != info.dtype or tensor.shape[1:] != info.shape[1:]:
            raise CheckpointError(f"{key}: expected {info}, found {tuple(tensor.shape)} {tensor.dtype} in it")
        row = info.nbytes // max(1, info.shape[0]) if info.shape else 0
        return self._block(Span(key, first * row, tensor.nbytes), tensor)

    def rows(self, key: str, block: Tensor, rows: range, *, expert: int, experts: int) -> Block:
        """`block` [n, width] as rows `rows` of one expert of a tensor seen as [experts, ., width]."""
        info = self.infos[key]
        width = info.shape[-1]
        tall = torch.Size(info.shape).numel() // width // experts
        if block.shape != (len(rows), width) or block.dtype != info.dtype or rows[-1] >= tall:
            raise CheckpointError(
                f"{key}: expected {info}, found {tuple(block.shape)} {block.dtype} for {rows} of expert "
                f"{expert} of {experts}"
            )
        row = width * info.dtype.itemsize
        start = (expert * tall + rows.start) * row
        if rows.step == 1:
            return self._block(Span(key, start, block.nbytes), block)
        return self._block(Span(key, start, row, len(rows), rows.step * row), block)

    def _block(self, span: Span, values: Tensor) -> Block:
        self.claim(span)
        return Block(span, values)

    def claim(self, span: Span) -> None:
        """Count these bytes as given."""
        if span.size * span.runs > self._left[span.key]:
            raise CheckpointError(f"{span.key}: written more than once")
        self._left[span.key] -= span.size * span.runs

    def left(self, key: str) -> int:
        """The bytes of a tensor that are not given yet."""
        return self._left[key]

    def write(self, block: Block, crc: int = 0) -> int:
        """Write a block; returns the CRC-32 of its bytes after those that `crc` is of."""
        span = block.span
        data = block.values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        file, offset = self._at(span)
        for run in range(span.runs):
            _pwrite(file, data[run * span.size : (run + 1) * span.size], offset + run * span.stride)
        return zlib.crc32(data, crc)

    def checksum(self, span: Span, crc: int = 0) -> int:
        """The CRC-32 of what the file holds there, after the bytes that `crc` is of."""
        file, offset = self._at(span)
        for run in range(span.runs):
            for start in range(0, span.size, _READ_BYTES):
                size = min(_READ_BYTES, span.size - start)
                crc = zlib.crc32(os.pread(file, size, offset + run * span.stride + start), crc)
        return crc

    def _at(self, span: Span) -> tuple[int, int]:
        place = self._places[span.key]
        return self.files[place.shard], place.start + span.start

    def finish(self) -> None:
        """Bring all to the disk and write the index; CheckpointError if bytes of a tensor are missing."""
        if missing := [key for key in self.infos if self.left(key)]:
            raise CheckpointError(
                f"{missing[0]}: planned but not fully written ({len(missing)} such tensors)"
            )
        self.flush()
        if len(self.names) > 1:
            weight_map = {key: self.names[self._places[key].shard] for key in sorted(self.infos)}
            total = sum(info.nbytes for info in self.infos.values())
            write_json(
                self.directory / f"{INDEX}{PART}",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
            self.names.append(INDEX)

    def flush(self) -> None:
        """Bring all that is written to the disk."""
        for file in self.files:
            os.fsync(file)

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop())


def _reserve(file: int, size: int) -> None:
    """Take the disk space of a file where the file system can: a full disk or a quota shows now, not hours
    later. (`os.posix_fallocate` would write to every block where it cannot.)"""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file, 0, 0, size) != 0 and ctypes.get_errno() in _FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors, each module's together, filling shards of about `shard_bytes`."""
    groups: list[list[str]] = [[]]
    size, module = 0, ""
    for key in sorted(infos, key=natural_order):
        same = key.rpartition(".")[0] == module
        if groups[-1] and not same and size + infos[key].nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size, module = size + infos[key].nbytes, key.rpartition(".")[0]
    return groups


def parts(info: TensorInfo, most: int) -> Iterator[range | None]:
    """A tensor's first dimension in consecutive parts of about `most` bytes each; None for all of it."""
    if not info.shape or info.nbytes <= most:
        yield None
        return
    step = max(1, most * info.shape[0] // info.nbytes)
    for first in range(0, info.shape[0], step):
        yield range(first, min(first + step, info.shape[0]))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
