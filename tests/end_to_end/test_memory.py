"""How little is alive while weights stream, and what happens beside them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fxq
from fxq.numbers import kernels
from fxq.run import stages
from fxq.sources import Directory
from tests.families import FAMILIES, random_model


def test_few_weights_are_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are larger than a batch: some are read, packed and written, the others not there."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 6
    random_model(config).save_pretrained(tmp_path / "model")
    for limits in (stages.AT_ONCE, stages.AHEAD):
        monkeypatch.setitem(limits, "cpu", 1)
    alive: list[Any] = []
    most, plain = 0, Directory.read

    def read(self: Directory, name: str, out: Tensor | None = None) -> Tensor:
        nonlocal most
        value = plain(self, name, out)
        alive.append(StorageWeakRef(value.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))
        return value

    monkeypatch.setattr(Directory, "read", read)
    fxq.compile(tmp_path / "model", "nvfp4_weight_only_mse", out=tmp_path / "out")
    assert len(alive) >= 42
    assert most <= 10  # up to three that share an amax: twice packed, once read, and the next
    assert all(ref.expired() for ref in alive)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_preparing_never_fails(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to do on the CPU; without a GPU, what fails there is for others to say."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    before: Sequence[threading.Thread] = threading.enumerate()
    kernels.prepare(torch.device(device))
    started = [t for t in threading.enumerate() if t not in before]
    assert len(started) <= (device == "cuda")
    for thread in started:
        thread.join(timeout=60)
    assert not raised
