"""Journal: what an interrupted run had done, in a file of lines that is only ever appended to.

Each line is the CRC-32 of a JSON value, then the value. A line that a crash tore, or that reads back
otherwise than it was written, counts as never written; so nothing has to reach the disk in any order.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """The lines of a file, and room for more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._torn = not _ends_a_line(self._file)

    def __iter__(self) -> Iterator[Any]:
        """The values of all lines that are as they were written, in order."""
        with self.path.open("rb") as lines:
            for line in lines:
                if (value := _value(line)) is not None:
                    yield value[0]

    def append(self, value: Any, *, sync: bool = False) -> None:
        """Add one value; with `sync` it is on the disk when this returns."""
        text = json.dumps(value, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        rest = memoryview(b"\n" + line if self._torn else line)
        while rest:
            self._torn = True
            rest = rest[os.write(self._file, rest) :]
        self._torn = False
        if sync:
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _ends_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"


def _value(line: bytes) -> tuple[Any] | None:
    crc, _, text = line.rstrip(b"\n").partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        return (json.loads(text),)
    except (ValueError, RecursionError):
        return None
