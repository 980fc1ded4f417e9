"""Pausing the search for cycles, and that no weight waits for one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxq
from fxq.gc_paused import gc_paused
from tests.families import Zoo, samples, zoo

__all__ = ["zoo"]


@pytest.fixture
def garbage() -> Iterator[list[object]]:
    """What searches find unreachable."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()


def test_no_search_runs_within_and_what_was_is_restored() -> None:
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_block_that_fails_restores_what_was() -> None:
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.parametrize("spec", ["nvfp4_default_mse-fp8_cast_kv", "nvfp4_weight_only_mse"])
def test_no_weight_or_activation_waits_for_a_search(
    spec: str, garbage: list[object], zoo: Zoo, tmp_path: Path
) -> None:
    """Memory must be freed by counting references alone: the command line pauses the search throughout."""
    fxq.compile(zoo("qwen3_moe"), spec, calib=samples(4), out=tmp_path / "out")
    gc.collect()
    held = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in garbage
        if type(found) is torch.Tensor and found.device.type == "cpu"
    }
    assert not held
