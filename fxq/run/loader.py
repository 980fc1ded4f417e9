"""Loader: the next tensors are read, and copied to the GPU, while the current one is used."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter
from threading import local
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from fxq.run.stages import AHEAD, stage

Item = TypeVar("Item")
Fill = Callable[[Tensor], object]

# One thread reads as fast as a CPU can use what it reads; a GPU is faster.
READERS = {"cpu": 1, "cuda": 8}
# Each thread that reads for a GPU does so into pinned memory of so many bytes, or of what one fill needs.
PINNED_BYTES = 32 << 20


@dataclass(frozen=True)
class Request(Generic[Item]):
    """A tensor to load: `fills[i]` puts the values of `value[i]` into the host memory that it is given."""

    item: Item
    shape: tuple[int, ...]
    dtype: torch.dtype
    fills: Sequence[Fill]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Part(Generic[Item]):
    """Rows [start, end) of a requested tensor, which `value` will hold."""

    request: Request[Item]
    value: Tensor
    start: int
    end: int

    @property
    def rows(self) -> Tensor:
        return self.value[self.start : self.end]

    @property
    def is_last(self) -> bool:
        return self.end == len(self.value)


def loaded(
    requests: Iterable[Request[Item]], device: torch.device, *, concurrent: bool
) -> Generator[tuple[Item, Tensor]]:
    """Every item in order with its tensor, on `device`.

    Fills run on another thread, for a GPU on several at once if `concurrent`. What they raise is raised where
    the item would have come; nothing more is begun after that, or once the iterator is closed.
    """
    to = _Gpu(device) if device.type == "cuda" else _Host()
    parts = (part for request in requests for part in to.parts(request))
    threads = READERS[device.type] if concurrent else 1
    with closing(
        stage(to.load, parts, threads=threads, ahead=AHEAD[device.type], size=lambda part: part.rows.nbytes)
    ) as done:
        yield from map(to.hand_over, filter(attrgetter("is_last"), done))


class _Host:
    """Loads whole tensors into host memory."""

    def parts(self, request: Request[Item]) -> Iterator[_Part[Item]]:
        value = torch.empty(request.shape, dtype=request.dtype)
        yield _Part(request, value, 0, len(value))

    def load(self, part: _Part[Item]) -> _Part[Item]:
        for fill, row in zip(part.request.fills, part.value, strict=True):
            fill(row)
        return part

    def hand_over(self, last: _Part[Item]) -> tuple[Item, Tensor]:
        return last.request.item, last.value


class _Gpu:
    """Loads tensors part by part, each through pinned memory of the thread that reads it, and copies them on
    a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pinned = device, torch.cuda.Stream(device), local()

    def parts(self, request: Request[Item]) -> Iterator[_Part[Item]]:
        with torch.cuda.stream(self.stream):
            value = torch.empty(request.shape, dtype=request.dtype, device=self.device)
        step = max(1, PINNED_BYTES * len(value) // max(1, request.nbytes))
        for start in range(0, max(1, len(value)), step):
            yield _Part(request, value, start, min(start + step, len(value)))

    def load(self, part: _Part[Item]) -> _Part[Item]:
        rows = part.rows
        host = self._memory(rows.nbytes).view(rows.dtype).view(rows.shape)
        for fill, row in zip(part.request.fills[part.start : part.end], host, strict=True):
            fill(row)
        with torch.cuda.stream(self.stream):
            rows.copy_(host, non_blocking=True)
            self.stream.record_event().synchronize()  # then the memory is free again
        return part

    def hand_over(self, last: _Part[Item]) -> tuple[Item, Tensor]:
        """What the caller launches next waits for the copies."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        last.value.record_stream(current)
        return last.request.item, last.value

    def _memory(self, nbytes: int) -> Tensor:
        """This thread's pinned memory."""
        if not hasattr(self.pinned, "memory") or len(self.pinned.memory) < nbytes:
            self.pinned.memory = torch.empty(max(nbytes, PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
        return cast(Tensor, self.pinned.memory)[:nbytes]


def on_host(value: Tensor) -> Tensor:
    """The values in host memory: from a GPU by way of pinned memory, which is several times faster."""
    if value.device.type != "cuda":
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value)
