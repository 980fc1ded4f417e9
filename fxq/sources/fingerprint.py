"""Fingerprints of what decides the bytes of a run: a few words about each, which tell two runs apart."""

import hashlib
import inspect
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxq.errors import SourceError
from fxq.graph.hub import WeightSource
from fxq.sources.safetensors_file import LARGEST_HEADER


def of_directory(path: Path) -> dict[str, str]:
    """A model's directory: size, time and header of each safetensors file, and the files that say what they
    are."""
    found = {}
    try:
        for file in sorted(path.iterdir()):
            if file.suffix == ".safetensors":
                state = file.stat()
                words = f"{state.st_size} bytes, changed at {state.st_mtime_ns} ns"
                found[file.name] = f"{words}, header {_digest(_header(file))}"
            elif file.name == "config.json" or file.name.endswith(".index.json"):
                found[file.name] = _digest(file.read_bytes())
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return found


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = opened.read(8)
        return opened.read(min(int.from_bytes(length, "little"), LARGEST_HEADER))


def of_config(config: Mapping[str, Any]) -> str:
    """A config.json, read."""
    return _digest(repr(sorted(config.items())).encode())


def of_live(source: WeightSource) -> str:
    """A model in memory: a checksum of its parameters, each of which is read once for it."""
    crc = 0
    for name in sorted(source.hub.stored):
        values = source.read(name).contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(values.numpy().data, zlib.crc32(name.encode(), crc))
    return f"in memory, {crc:08x}"


def of_samples(samples: Sequence[Sequence[int]] | None) -> str:
    """The calibration samples, token by token."""
    if samples is None:
        return "none"
    content = _digest(repr([list(ids) for ids in samples]).encode())
    return f"{len(samples)} samples of {sum(map(len, samples))} tokens in all, {content}"


def of_code(classes: Iterable[type]) -> dict[str, str]:
    """Classes that do not come with fxq: the file that defines each, which may change under the same name."""
    found = {}
    for cls in classes:
        if not cls.__module__.startswith("fxq."):
            try:
                found[cls.__name__] = _digest(Path(inspect.getfile(cls)).read_bytes())
            except (OSError, TypeError):  # made in a session
                found[cls.__name__] = "of no file"
    return found


def of_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.uname().machine}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
