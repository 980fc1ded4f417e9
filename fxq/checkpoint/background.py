"""Writing on a thread of its own while the next weights are computed, and a record of what is written, from
which an interrupted run goes on.
"""

import zlib
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any, Self

from fxq.checkpoint.journal import Journal
from fxq.checkpoint.shards import Block, Shards, Span

# After so many bytes those written so far are brought to the disk, so that little is left to do at the end.
FLUSH_BYTES = 1 << 30
# Batches that wait to be written while the next is computed: so many, beside that one, are alive.
BATCHES_BEHIND = 1


@dataclass(frozen=True)
class Piece:
    """What is done or not done as one: blocks of tensors.

    name: one of a kind in the run. note: what to remember of it, JSON. last: whether these blocks complete
    it; those of a large tensor come a few at a time.
    """

    name: str
    blocks: Sequence[Block]
    note: Any = None
    last: bool = True


class WriteBehind:
    """Writes pieces into shards, at most BATCHES_BEHIND batches later.

    finished: name -> note of the pieces that an interrupted run wrote and that read back as they were
    written; their bytes count as given. version: differs if the same pieces would have other bytes. threads:
    how many write; the blocks of a piece are always written in order. What fails on a thread is raised by the
    next `put`, or at the end of the `with` block.
    """

    def __init__(self, shards: Shards, journal: Journal, version: str, threads: int = 1) -> None:
        self.shards, self.journal = shards, journal
        self.finished = dict[str, Any]()
        self._begun: dict[str, tuple[int, list[Span]]] = {}
        self._pending: deque[list[Future[None]]] = deque()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="fxq-write") for _ in range(threads)]
        self._lock = Lock()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="fxq-flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0
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

    def put(self, batch: Sequence[Piece]) -> None:
        """Have a batch of pieces written; returns as soon as few enough are waiting."""
        while len(self._pending) >= BATCHES_BEHIND:
            self._wait()
        self._flush_some(batch)
        lots: dict[int, list[Piece]] = defaultdict(list)
        for piece in batch:
            lots[zlib.crc32(piece.name.encode()) % len(self._threads)].append(piece)
        self._pending.append([self._threads[i].submit(self._write, lot) for i, lot in lots.items()])

    def _wait(self) -> None:
        """Until the oldest batch is written."""
        for future in self._pending.popleft():
            future.result()

    def _flush_some(self, batch: Sequence[Piece]) -> None:
        """Begin to bring earlier batches to the disk if they are many; raises what that failed with."""
        self._unflushed += sum(block.values.nbytes for piece in batch for block in piece.blocks)
        if self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._flusher.submit(self.shards.flush)
            self._unflushed = 0

    def _write(self, lot: Sequence[Piece]) -> None:
        for piece in lot:
            crc, spans = self._begun.pop(piece.name, (0, []))
            for block in piece.blocks:
                crc = self.shards.write(block, crc)
                spans.append(block.span)
            if piece.last:
                with self._lock:
                    self.journal.append({"piece": [piece.name, crc, spans, piece.note]})
            else:
                self._begun[piece.name] = crc, spans

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._pending:
                self._wait()
            if error is None and self._flushing is not None:
                self._flushing.result()
        finally:
            for thread in [*self._threads, self._flusher]:
                thread.shutdown(cancel_futures=True)
