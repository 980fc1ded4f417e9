"""Loading ahead: the next tensors are read, and copied to the GPU, while the current one is used."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

Item = TypeVar("Item")
Fill = Callable[[Tensor], object]

# Tensors that are loaded beside the one in use take so many bytes at most, or are one.
AHEAD_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
# One thread reads as fast as a CPU can use what it reads. A GPU is faster: so many threads read for it, each
# into pinned memory of so many bytes (or of what one fill needs).
_READERS, _PINNED_BYTES = 8, 32 << 20


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


def loaded(
    requests: Iterable[Request[Item]],
    device: torch.device,
    *,
    concurrent: bool,
    allocate: Callable[[Request[Item]], Tensor] = lambda request: torch.empty(
        request.shape, dtype=request.dtype
    ),
) -> Generator[tuple[Item, Tensor]]:
    """Every item in order with its tensor, on `device`.

    Fills run on another thread, for a GPU on several at once if `concurrent`. What they raise is raised where
    the item would have come; nothing more is loaded after that, or once the iterator is closed. allocate:
    where a tensor that stays on the CPU is read into.
    """
    loader = _ToGpu(device, concurrent) if device.type == "cuda" else _ToHost(allocate)
    limit = AHEAD_BYTES[device.type]
    source = iter(requests)
    upcoming = next(source, None)
    waiting: deque[tuple[Request[Item], Callable[[], Tensor]]] = deque()
    held = 0

    def start() -> None:
        nonlocal upcoming, held
        while upcoming is not None and (not waiting or held + upcoming.nbytes <= limit):
            waiting.append((upcoming, loader.start(upcoming)))
            held += upcoming.nbytes
            upcoming = next(source, None)

    try:
        start()
        while waiting:
            request, wait = waiting.popleft()
            ready = [wait()]
            del wait
            held -= request.nbytes
            start()
            yield request.item, ready.pop()  # nothing here keeps it alive
    finally:
        waiting.clear()
        loader.close()


def on_host(value: Tensor) -> Tensor:
    """The values in host memory: from a GPU by way of pinned memory, which is several times faster."""
    if value.device.type != "cuda":
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value)


class _ToHost:
    """Loads whole requests, one after the other."""

    def __init__(self, allocate: Callable[[Request[Any]], Tensor]) -> None:
        self.allocate = allocate
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="fxq-read")

    def start(self, request: Request[Any]) -> Callable[[], Tensor]:
        """Begin to load; the result waits for the end."""
        return self.reader.submit(self._load, request).result

    def _load(self, request: Request[Any]) -> Tensor:
        value = self.allocate(request)
        for fill, part in zip(request.fills, value, strict=True):
            fill(part)
        return value

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)


class _ToGpu:
    """Loads pieces of requests on several threads, each through pinned memory of its own, and copies them on
    one stream."""

    def __init__(self, device: torch.device, concurrent: bool) -> None:
        self.device, self.stream, self.pinned = device, torch.cuda.Stream(device), local()
        self.readers = ThreadPoolExecutor(_READERS if concurrent else 1, thread_name_prefix="fxq-read")

    def start(self, request: Request[Any]) -> Callable[[], Tensor]:
        """Begin to load; the result has what the caller launches next wait for the copies."""
        with torch.cuda.stream(self.stream):
            value = torch.empty(request.shape, dtype=request.dtype, device=self.device)
        step = max(1, _PINNED_BYTES * len(value) // max(1, request.nbytes))
        parts = [
            self.readers.submit(self._load, part, request.fills[i * step : (i + 1) * step])
            for i, part in enumerate(value.split(step))
        ]

        def wait() -> Tensor:
            for part in parts:
                part.result()
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            value.record_stream(current)
            return value

        return wait

    def _load(self, part: Tensor, fills: Sequence[Fill]) -> None:
        host = self._memory(part.nbytes).view(part.dtype).view(part.shape)
        for fill, out in zip(fills, host, strict=True):
            fill(out)
        with torch.cuda.stream(self.stream):
            part.copy_(host, non_blocking=True)
            self.stream.record_event().synchronize()  # then the memory is free again

    def _memory(self, nbytes: int) -> Tensor:
        """This thread's pinned memory."""
        if not hasattr(self.pinned, "memory") or len(self.pinned.memory) < nbytes:
            self.pinned.memory = torch.empty(max(nbytes, _PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
        return cast(Tensor, self.pinned.memory)[:nbytes]

    def close(self) -> None:
        self.readers.shutdown(cancel_futures=True)
