"""How little is alive while weights stream, and what the C library keeps of what was."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxq
from fxq import warmup
from fxq.checkpoint import writer as checkpoint
from fxq.run import loader as loading
from fxq.run import weights as cone
from tests.families import Zoo, zoo

__all__ = ["zoo"]


def test_a_weight_is_gone_before_the_next_but_one_is_read(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are larger than a batch: one in use, one being read."""
    monkeypatch.setattr(cone, "BATCH_BYTES", {"cpu": 1})
    monkeypatch.setattr(checkpoint, "PACKED_BYTES", {"cpu": 1})
    monkeypatch.setattr(loading, "AHEAD_BYTES", {"cpu": 1})
    made: list[weakref.ref[Tensor]] = []
    most = 0
    begin = loading._ToHost.start

    def lend(self: object, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.empty(tuple(shape), dtype=dtype)
        made.append(weakref.ref(memory))
        return memory

    def start(self: loading._ToHost, request: loading.Request[Any]) -> Callable[[], Tensor]:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        return begin(self, request)

    monkeypatch.setattr(cone._Memory, "lend", lend)
    monkeypatch.setattr(loading._ToHost, "start", start)
    fxq.compile(zoo("llama"), "nvfp4_weight_only_mse", out=tmp_path / "out")
    assert len(made) > 20
    assert most <= 2  # what will be used while the next is read, and for a moment what was packed
    assert not any(ref() is not None for ref in made)


_FREED = """
import sys
import torch
from fxq import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "returned":
    heap.return_large_buffers()
pins = []
before = resident()
for _ in range(6):  # each is freed with something small above it
    buffer = torch.ones(12 << 20, dtype=torch.uint8)
    pins.append(torch.ones(100))
    del buffer
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_large_buffers_go_back_to_the_system_when_they_are_freed() -> None:
    command = [sys.executable, "-c", _FREED]
    kept, returned = (
        int(subprocess.run([*command, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("as it is", "returned")
    )
    assert returned < 4 << 20 < kept


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_warming_up_never_fails(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to do on the CPU; without a GPU, what fails there is for others to say."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    before = set(threading.enumerate())
    warmup.begin(torch.device(device), "mse")
    started = [t for t in threading.enumerate() if t not in before]
    assert len(started) <= (device == "cuda")
    for thread in started:
        thread.join(timeout=60)
    assert not raised
