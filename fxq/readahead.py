"""Asking the system to read a model's files while there is other work: importing, tracing."""

import contextlib
import os
import threading
from pathlib import Path

# Of the memory that is free, so much at most: what does not stay until it is used is read twice.
_SHARE = 0.5
THREAD = "fxq-readahead"


def read_ahead(model: Path) -> None:
    """Have the first safetensors files of a directory read into the page cache, on another thread.

    A hint: where the system takes none, or a file cannot be opened, nothing happens here, and whoever reads
    the file for its contents says what is wrong with it.
    """
    if hasattr(os, "posix_fadvise"):
        args = model, _free_memory()
        threading.Thread(target=_hint, args=args, daemon=True, name=THREAD).start()


def _hint(model: Path, most: float) -> None:
    with contextlib.suppress(OSError):
        for path in sorted(model.glob("*.safetensors")):
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                size = min(os.fstat(file).st_size, int(most))
                os.posix_fadvise(file, 0, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
            most -= size
            if most <= 0:
                return


def _free_memory() -> float:
    """Bytes that can be had without swapping, times _SHARE; 0 if the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return _SHARE * 1024 * int(line.split()[1])
    return 0
