"""The search for cycles: where it is off, and that streaming does not need it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxq
from fxq import gc_paused as collector
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


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_off_runs_no_search_and_restores_what_was() -> None:
    with collector.off():
        assert not gc.isenabled()
        with collector.off():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_swept_looks_at_what_the_block_made_and_at_nothing_older(garbage: list[object]) -> None:
    frozen = gc.get_freeze_count()
    older = Cycle()
    with collector.swept():
        del older
        newer = Cycle()
        del newer
    assert sum(isinstance(found, Cycle) for found in garbage) == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_swept_restores_what_was_when_the_block_fails() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError), collector.swept():
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("spec", ["nvfp4_default_mse-fp8_cast_kv", "nvfp4_weight_only_mse"])
def test_no_weight_or_activation_waits_for_a_search(
    spec: str, garbage: list[object], zoo: Zoo, tmp_path: Path
) -> None:
    """A compilation runs with the search off: memory must be freed by counting references alone."""
    fxq.compile(zoo("qwen3_moe"), spec, calib=samples(4), out=tmp_path / "out")
    gc.collect()
    held = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in garbage
        if type(found) is torch.Tensor and found.device.type == "cpu"
    }
    assert not held
