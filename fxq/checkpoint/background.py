"""Background writer: writes pieces while the next weights are computed, and keeps a record of what is
written, from which an interrupted run goes on.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from fxq.checkpoint.journal import Journal
from fxq.checkpoint.shards import Block, Shards, Span
from fxq.run.stages import AHEAD, stage

# Threads that write: one keeps up with a CPU that packs.
WRITERS = {"cpu": 1, "cuda": 4}
# After so many bytes those written so far are brought to the disk, so that little is left to do at the end.
FLUSH_BYTES = 1 << 30


@dataclass(frozen=True)
class Piece:
    """What is done or not done as one: blocks of tensors.

    name: one of a kind in the run. note: what to remember of it, JSON.
    """

    name: str
    blocks: Sequence[Block]
    note: Any = None

    @property
    def nbytes(self) -> int:
        return sum(block.values.nbytes for block in self.blocks)


class BackgroundWriter:
    """Writes pieces into shards and notes each in the journal once it is written.

    finished: name -> note of the pieces that an interrupted run wrote and that read back as they were
    written; their bytes count as given. version: differs if the same pieces would have other bytes.
    """

    def __init__(self, shards: Shards, journal: Journal, version: str) -> None:
        self.shards, self.journal = shards, journal
        self.finished = dict[str, Any]()
        self._lock = Lock()
        self._take_over(version)
        journal.append({"version": version})

    def _take_over(self, version: str) -> None:
        current, found = None, dict[str, tuple[int, list[Span], Any]]()
        for record in self.journal:
            current = record.get("version", current)
            if current == version and "piece" in record:
                name, crc, spans, note = record["piece"]
                found[name] = crc, [Span(*span) for span in spans], note
        for name, (expected, spans, note) in found.items():
            crc = 0
            for span in spans:
                crc = self.shards.checksum(span, crc)
            if crc == expected:
                self.finished[name] = note
                for span in spans:
                    self.shards.claim(span)

    def write(self, pieces: Iterable[Piece], device: torch.device) -> None:
        """Write all pieces, each while the next are made on `device`; raises what fails in either."""
        kind, unflushed = device.type, 0
        flushing: Future[None] | None = None
        written = stage(
            self._write, pieces, threads=WRITERS[kind], ahead=AHEAD[kind], size=lambda piece: piece.nbytes
        )
        with ThreadPoolExecutor(1, thread_name_prefix="fxq-flush") as flusher, closing(written):
            for nbytes in written:
                unflushed += nbytes
                if unflushed >= FLUSH_BYTES and (flushing is None or flushing.done()):
                    if flushing is not None:
                        flushing.result()
                    flushing, unflushed = flusher.submit(self.shards.flush), 0
        if flushing is not None:
            flushing.result()

    def _write(self, piece: Piece) -> int:
        crc = 0
        for block in piece.blocks:
            crc = self.shards.write(block, crc)
        with self._lock:
            spans = [block.span for block in piece.blocks]
            self.journal.append({"piece": [piece.name, crc, spans, piece.note]})
        return piece.nbytes
