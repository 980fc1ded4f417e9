"""The hint to read a model's files: how much is asked for, and that nothing is ever raised."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fxq import readahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")


def _wait() -> None:
    for thread in threading.enumerate():
        if thread.name == readahead.THREAD:
            thread.join(timeout=30)


@pytest.mark.parametrize(
    ("free", "asked"), [(0, []), (70, [70]), (100, [100]), (150, [100, 50]), (999, [100, 100])]
)
def test_no_more_is_asked_for_than_fits(
    free: int, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(100))
    (tmp_path / "other.bin").write_bytes(bytes(100))
    found: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: found.append(size))
    monkeypatch.setattr(readahead, "_free_memory", lambda: free)
    readahead.read_ahead(tmp_path)
    _wait()
    assert [size for size in found if size] == asked


def test_free_memory_is_known() -> None:
    assert readahead._free_memory() > 0


def test_whatever_is_there_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.safetensors")
    for model in (tmp_path, tmp_path / "missing", tmp_path / "c.safetensors"):
        readahead.read_ahead(model)
    _wait()
    assert not raised
