"""Prefetch of a model's files: read into the page cache while there is other work, such as tracing."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

# Of the memory that is free, so much at most: what does not stay until it is used is read twice.
_SHARE = 0.5
# A disk is asked for so many stretches of so many bytes at a time.
_THREADS, _STRETCH = 4, 32 << 20
THREAD = "fxq-prefetch"

# A file, the first byte and how many.
Stretch = tuple[Path, int, int]


def prefetch(model: Path, *, most: float | None = None, stretch: int = _STRETCH) -> contextlib.ExitStack:
    """Begin to read the first safetensors files of a directory into the page cache, on other threads.

    most: so many bytes; half of the memory that is free by default. stretch: so many at once. In
    `with prefetch(model):` the threads end with the block, each after its stretch; else when all is read.

    `sendfile` to the null device reads as any reader does, but copies nothing: what is cached already costs
    next to nothing. (Linux cuts `posix_fadvise(WILLNEED)` to one read-ahead window of the device, often 128
    KiB, without a word.) Where the system cannot do that, or a file cannot be opened, nothing happens here,
    and whoever reads the file for its contents says what is wrong with it.
    """
    stop = threading.Event()
    if hasattr(os, "sendfile"):
        stretches = SimpleQueue[Stretch]()
        for piece in _stretches(model, free_memory() if most is None else most, stretch):
            stretches.put(piece)
        for _ in range(_THREADS):
            threading.Thread(target=_read, args=(stretches, stop), daemon=True, name=THREAD).start()
    end = contextlib.ExitStack()
    end.callback(stop.set)
    return end


def _stretches(model: Path, most: float, stretch: int) -> Iterator[Stretch]:
    """What is to be read, in order: `most` bytes."""
    with contextlib.suppress(OSError):
        files = sorted(model.glob("model*.safetensors")) or sorted(model.glob("*.safetensors"))
        for path in files:  # beside a model of the usual names others are seldom part of it
            size = min(path.stat().st_size, int(most))
            for start in range(0, size, stretch):
                yield path, start, min(stretch, size - start)
            most -= size


def _read(stretches: SimpleQueue[Stretch], stop: threading.Event) -> None:
    with contextlib.suppress(OSError, Empty):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            while not stop.is_set():
                path, start, size = stretches.get_nowait()
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    while size > 0 and (sent := os.sendfile(null, file, start, size)):
                        start, size = start + sent, size - sent
                finally:
                    os.close(file)
        finally:
            os.close(null)


def free_memory() -> float:
    """Half of the bytes that can be had without swapping; 0 if the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return _SHARE * 1024 * int(line.split()[1])
    return 0
