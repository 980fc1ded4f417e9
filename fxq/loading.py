"""Loading ahead: the next tensors are read, and copied to the GPU, while the current one is used."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

# Tensors that are loaded beside the one in use take so many bytes at most, or are one.
AHEAD_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
# One thread reads as fast as a CPU can use what it reads; a GPU is faster.
_READERS = {"cpu": 1, "cuda": 4}


def loaded(
    items: Iterable[Item],
    read: Callable[[Item], Tensor],
    *,
    nbytes: Callable[[Item], int],
    device: torch.device,
    concurrent: bool = False,
) -> Generator[tuple[Item, Tensor]]:
    """Every item in order with the tensor that `read` makes of it, on `device`.

    `read` runs on another thread, on several at once if `concurrent`. What it raises is raised where its item
    would have come; nothing more is read after that, or once the iterator is closed.
    """
    copies = _Copies(device)
    limit = AHEAD_BYTES[device.type]
    source = iter(items)
    upcoming = next(source, None)
    waiting: deque[tuple[Item, Future[Tensor]]] = deque()
    held = 0
    with ThreadPoolExecutor(
        _READERS[device.type] if concurrent else 1, thread_name_prefix="fxq-read"
    ) as pool:

        def start() -> None:
            nonlocal upcoming, held
            while upcoming is not None and (not waiting or held + nbytes(upcoming) <= limit):
                waiting.append((upcoming, pool.submit(lambda item: copies.start(read(item)), upcoming)))
                held += nbytes(upcoming)
                upcoming = next(source, None)

        try:
            start()
            while waiting:
                item, future = waiting.popleft()
                ready = [copies.finish(future.result())]
                del future
                held -= nbytes(item)
                start()
                yield item, ready.pop()  # nothing here keeps it alive
        finally:
            for _, future in waiting:
                future.cancel()


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory for a tensor that goes to `device` next: pinned if that is a GPU."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


class _Copies:
    """Copies to a GPU on a stream of their own, through pinned memory; on the CPU there is nothing to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, value: Tensor) -> Tensor:
        """Begin to copy; on any thread."""
        if self.stream is None or value.device.type == "cuda":
            return value
        pinned = value if value.is_pinned() else value.pin_memory()
        with torch.cuda.stream(self.stream):
            return pinned.to(self.device, non_blocking=True)

    def finish(self, value: Tensor) -> Tensor:
        """Let what the calling thread launches next wait for all copies begun so far."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            value.record_stream(current)
        return value
