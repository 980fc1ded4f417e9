"""Amaxes from weights: when they are found, and how often a weight is read for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fxq
from fxq.checkpoint.shards import Shards
from fxq.graph import dialect
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.passes import PASSES
from fxq.pipeline.facts import Fact, amaxes_filled
from fxq.pipeline.spec import load
from fxq.run.bootstrap import is_own
from fxq.sources import Directory
from tests.families import EXPERTS, LAYERS, Zoo, samples, without_times, zoo

__all__ = ["zoo"]

WEIGHT_ONLY, DEFAULT = "nvfp4_weight_only_mse", "nvfp4_default-fp8_kv"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each parameter, and each expert of one, was read."""
    found: Counter[Any] = Counter()
    read, read_expert = Directory.read, Directory.read_expert

    def counted(self: Directory, name: str, *args: Any) -> Any:
        found[name] += 1
        return read(self, name, *args)

    def counted_expert(self: Directory, name: str, expert: int, *args: Any) -> Any:
        found[name, expert] += 1
        return read_expert(self, name, expert, *args)

    monkeypatch.setattr(Directory, "read", counted)
    monkeypatch.setattr(Directory, "read_expert", counted_expert)
    return found


def test_a_weight_with_an_amax_of_its_own_is_read_once_if_it_is_written_at_once(
    reads: Counter[Any], zoo: Zoo, tmp_path: Path
) -> None:
    compiled = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "out")
    experts = {name: count for name, count in reads.items() if isinstance(name, tuple)}
    assert len(experts) == LAYERS * 2 * EXPERTS
    assert set(experts.values()) == {1}
    once = {name.split(".")[-2] for name, count in reads.items() if isinstance(name, str) and count == 1}
    twice = {name.split(".")[-2] for name, count in reads.items() if isinstance(name, str) and count == 2}
    assert once == {"o_proj"}
    assert twice == {"q_proj", "k_proj", "v_proj"}
    assert compiled.report.bootstrapped == len(compiled.scales)  # these read the weights


def test_when_an_amax_is_found_changes_neither_scales_nor_bytes(zoo: Zoo, tmp_path: Path) -> None:
    at_once = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "at_once")
    own = [node.name for node in at_once.graph.nodes if node.target is dialect.AMAX and is_own(node)]
    assert len(own) == LAYERS * (2 * EXPERTS + 1)
    assert not set(own) & at_once.program.values.keys()
    before = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY)
    assert set(own) <= before.program.values.keys()
    before.save(tmp_path / "before")
    assert at_once.scales.keys() == before.scales.keys()
    assert all(torch.equal(before.scales[name], value) for name, value in at_once.scales.items())
    assert _files(tmp_path / "at_once") == _files(tmp_path / "before")


def test_a_dead_expert_s_amax_can_wait_and_perplexity_does_not_miss_it(zoo: Zoo, tmp_path: Path) -> None:
    texts = [[5] * 4]  # few experts are reached
    compiled = fxq.compile(zoo("qwen3_moe"), DEFAULT, calib=texts, out=tmp_path / "out")
    assert compiled.report.dead_experts
    assert any(map(compiled.program.is_later, compiled.program.bootstrapped))
    evaluated = fxq.compile(zoo("qwen3_moe"), DEFAULT, calib=texts, evaluate=samples(2))
    after = evaluated.report.perplexity_after
    assert after is not None
    assert compiled.perplexity(samples(2))[1] == after


@dataclass(frozen=True)
class Halve:
    """Clip every weight at half of its amax."""

    name: ClassVar[str] = "halve"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = ()

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        return iter(())

    def run(self, program: Program) -> int:
        for value in program.values.values():
            value /= 2
        return len(program.values)


def test_a_pass_after_bootstrap_sees_every_amax(zoo: Zoo, tmp_path: Path) -> None:
    spec = load(WEIGHT_ONLY, PASSES)
    halved = dataclasses.replace(spec, passes=(*spec.passes[:-1], Halve(), spec.passes[-1]))
    plain = fxq.compile(zoo("qwen3_moe"), spec).scales
    scales = fxq.compile(zoo("qwen3_moe"), halved, out=tmp_path / "out").scales
    assert scales.keys() == plain.keys()
    assert all(torch.equal(scales[name] * 2, value) for name, value in plain.items())


@pytest.mark.slow
def test_an_interrupted_run_can_be_resumed_with_an_evaluation(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "whole")
    plain, calls = Shards.write, itertools.count()

    def write(self: Shards, *args: Any) -> int:
        if next(calls) >= 100:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", write)
        with pytest.raises(KeyboardInterrupt):
            fxq.compile(zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "out")
    resumed = fxq.compile(
        zoo("qwen3_moe"), WEIGHT_ONLY, out=tmp_path / "out", resume=True, evaluate=samples(2)
    )
    assert resumed.report.perplexity_after == whole.perplexity(samples(2))[1]
    assert {name: data for name, data in _files(tmp_path / "out").items() if "report" not in name} == {
        name: data for name, data in _files(tmp_path / "whole").items() if "report" not in name
    }


def _files(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return without_times(files)
