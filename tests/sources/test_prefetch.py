"""Reading a model's files ahead: how much is read, when it ends, and that nothing is ever raised."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fxq.sources.prefetch import THREAD, free_memory, prefetch

pytestmark = pytest.mark.skipif(not hasattr(os, "sendfile"), reason="no sendfile here")


def _wait() -> None:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(timeout=30)


@pytest.mark.parametrize(
    ("free", "asked"), [(0, []), (70, [70]), (100, [100]), (150, [100, 50]), (999, [100, 100])]
)
def test_no_more_is_read_than_fits(
    free: int, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(100))
    (tmp_path / "other.bin").write_bytes(bytes(100))
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(300))
    found: list[int] = []

    def sendfile(out: int, file: int, start: int, size: int) -> int:
        assert os.fstat(file).st_size == 100
        found.append(size)
        return size

    monkeypatch.setattr(os, "sendfile", sendfile)
    prefetch(tmp_path, most=free)
    _wait()
    assert sorted(found, reverse=True) == asked


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files a stretch at a time, by whichever thread comes first, also where the system sends less."""
    sizes = {"a.safetensors": 1000, "b.safetensors": 7, "c.safetensors": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    found: list[tuple[int, int]] = []

    def sendfile(out: int, file: int, start: int, size: int) -> int:
        found.extend((os.fstat(file).st_size, start + i) for i in range(min(size, 5)))
        return min(size, 5)

    monkeypatch.setattr(os, "sendfile", sendfile)
    prefetch(tmp_path, stretch=64)
    _wait()
    assert sorted(found) == sorted((size, byte) for size in sizes.values() for byte in range(size))


def test_what_is_read_lies_in_the_page_cache(tmp_path: Path) -> None:
    """By the real system call; the file's pages are dropped before, where the file system can."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        prefetch(tmp_path)
        _wait()
        try:
            cached = os.preadv(file.fileno(), [bytearray(1 << 20)], 0, os.RWF_NOWAIT)
        except OSError as error:
            pytest.skip(f"this file system cannot say what is cached: {error}")
    assert cached == 1 << 20


def test_free_memory_is_known() -> None:
    assert free_memory() > 0


def test_whatever_is_there_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.safetensors")
    for model in (tmp_path, tmp_path / "missing", tmp_path / "c.safetensors"):
        prefetch(model)
    _wait()
    assert not raised


def test_reading_ends_with_what_it_was_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    asked, go_on = threading.Semaphore(0), threading.Event()
    found: list[int] = []

    def sendfile(out: int, file: int, start: int, size: int) -> int:
        found.append(start)
        asked.release()
        go_on.wait(timeout=30)
        return size

    monkeypatch.setattr(os, "sendfile", sendfile)
    with prefetch(tmp_path, stretch=100):
        for _ in range(4):
            asked.acquire(timeout=30)
    go_on.set()
    _wait()
    assert sorted(found) == [0, 100, 200, 300]
