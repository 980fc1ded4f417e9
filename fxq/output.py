"""Output files: safetensors shards with headers before their data, in a directory that appears whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fxq.errors import CheckpointError
from fxq.program import TensorInfo

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


class Shards:
    """Safetensors files whose headers are written before their data."""

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        self.directory, self.infos = directory, infos
        groups = _split(infos, shard_bytes)
        total = len(groups)
        self.names = [
            f"model-{i + 1:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"
            for i in range(total)
        ]
        self.place: dict[str, tuple[int, int]] = {}
        self.files: list[BinaryIO] = []
        for index, keys in enumerate(groups):
            self.files.append(self._start(index, keys))
        self.left = {key: nbytes(info) for key, info in infos.items()}

    def _start(self, index: int, keys: list[str]) -> BinaryIO:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # Wide types first, so that every tensor is aligned.
        offset = 0
        for key in sorted(keys, key=lambda k: (-self.infos[k].dtype.itemsize, k)):
            info, size = self.infos[key], nbytes(self.infos[key])
            header[key] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + size],
            }
            self.place[key] = (index, offset)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self.directory / self.names[index]).open("w+b")
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        self.place.update({k: (index, self.place[k][1] + start) for k in keys})
        return file

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor where the header says it is."""
        info = self.infos[key]
        if TensorInfo(tuple(tensor.shape), tensor.dtype) != info or self.left[key] != nbytes(info):
            raise CheckpointError(f"{key}: expected {info} once, found {tuple(tensor.shape)} {tensor.dtype}")
        self._write(key, 0, tensor)

    def put_rows(self, key: str, block: Tensor, rows: range, *, expert: int, experts: int) -> None:
        """Write `block` [n, width] as rows `rows` of one expert of a tensor seen as [experts, ., width]."""
        info = self.infos[key]
        width = info.shape[-1]
        tall = torch.Size(info.shape).numel() // width // experts
        if block.shape != (len(rows), width) or block.dtype != info.dtype or rows[-1] >= tall:
            raise CheckpointError(
                f"{key}: expected {info}, found {tuple(block.shape)} {block.dtype} for {rows} of expert "
                f"{expert} of {experts}"
            )
        row = width * info.dtype.itemsize
        first = expert * tall
        if rows.step == 1:
            self._write(key, (first + rows.start) * row, block)
        else:
            for number, values in zip(rows, block, strict=True):
                self._write(key, (first + number) * row, values)

    def _write(self, key: str, start: int, values: Tensor) -> None:
        index, offset = self.place[key]
        self.files[index].seek(offset + start)
        self.files[index].write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.left[key] -= values.nbytes
        if self.left[key] < 0:
            raise CheckpointError(f"{key}: written more than once")

    def finish(self) -> None:
        """Flush to the disk and write the index; CheckpointError if a promised tensor is not all there."""
        if missing := [key for key, left in self.left.items() if left]:
            raise CheckpointError(
                f"{missing[0]}: planned but not fully written ({len(missing)} such tensors)"
            )
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if len(self.names) > 1:
            weight_map = {key: self.names[self.place[key][0]] for key in self.infos}
            total = sum(nbytes(info) for info in self.infos.values())
            write_json(
                self.directory / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )


def _split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors, each module's together, filling shards of about `shard_bytes`."""
    groups: list[list[str]] = [[]]
    size, module = 0, ""
    for key in sorted(infos, key=_natural):
        same = key.rpartition(".")[0] == module
        if groups[-1] and not same and size + nbytes(infos[key]) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size, module = size + nbytes(infos[key]), key.rpartition(".")[0]
    return groups


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def nbytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A work directory beside `out` that becomes `out` when the block succeeds and vanishes when it fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write there: {error.strerror}") from error
    try:
        yield work
        _sync_directory(work)
        os.chmod(work, 0o777 & ~_umask())
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        os.rename(work, out)
        _sync_directory(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
