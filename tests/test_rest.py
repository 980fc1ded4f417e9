"""Graphs at rest are the same when they wake, and gone while weights stream."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph

import fxq
from fxq import rest
from fxq.checkpoint import writer as checkpoint
from fxq.graph import dialect
from fxq.graph.program import Program
from fxq.graph.text import dump, format_node, parse
from fxq.graph.verify import verify
from fxq.rest import Rest
from fxq.run import loader as loading
from tests.families import Zoo, zoo

__all__ = ["zoo"]

SPEC = "nvfp4_default-fp8_kv"
TEXT = [list(range(1, 20)), list(range(5, 40))]


@pytest.fixture
def compiled(zoo: Zoo) -> fxq.Compiled:
    return fxq.compile(zoo("qwen3_moe"), SPEC, calib=TEXT)


def _lines(graph: Graph) -> list[str]:
    return [format_node(node) for node in graph.nodes]


def test_graphs_wake_as_they_were(compiled: fxq.Compiled) -> None:
    program = compiled.program
    assert program.calibrated is not None
    before, lowered = dump(program.calibrated), sorted(_lines(program.graph))
    program.rest()
    assert dump(program.calibrated) == before
    assert sorted(_lines(program.graph)) == lowered
    verify(program.calibrated)
    verify(program.graph)
    assert program.graph is program.graph  # awake now


def test_parts_share_no_node_and_what_packs_nothing_comes_first(
    compiled: fxq.Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "PART_NODES", 4)
    program = compiled.program
    whole = [line for line in _lines(program.graph) if not line.startswith("return")]
    program.rest()
    parts = list(program.parts())
    assert len(parts) > 10
    assert sorted(line for part in parts for line in _lines(part)) == sorted(whole)
    packs = [any(node.target is dialect.PACK for node in part.nodes) for part in parts]
    assert packs == sorted(packs)
    assert 0 < sum(packs) < len(packs)


def test_a_program_that_is_awake_is_one_part(compiled: fxq.Compiled) -> None:
    assert list(compiled.program.parts()) == [compiled.program.graph]


def test_a_graph_without_nodes_rests_too() -> None:
    kept = Rest.of(parse("return []\n"), apart=True)
    assert list(kept.graphs()) == []
    assert dump(kept.graph()) == "return []\n"


def test_a_program_needs_a_graph_and_has_none_that_is_calibrated_at_first() -> None:
    with pytest.raises(TypeError, match="graph"):
        Program()  # type: ignore[call-arg]
    program = Program(parse("return []\n"))
    assert program.calibrated is None
    program.rest()
    assert program.calibrated is None
    assert dataclasses.replace(program, notes=["other"]).graph is program.graph


def test_no_graph_is_alive_while_weights_are_packed(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "PART_NODES", 4)
    monkeypatch.setitem(loading.AHEAD_BYTES, "cpu", 1)
    graphs: list[weakref.ref[Graph]] = []
    parts: list[weakref.ref[Graph]] = []
    most = [0, 0]
    plan, awake, keep = checkpoint.plan, Rest.graphs, checkpoint._Writer._keep

    def planning(program: Program) -> Any:
        for graph in (program.graph, program.calibrated):
            assert graph is not None
            graphs.append(weakref.ref(graph))
            del graph
        return plan(program)

    def waking(self: Rest) -> Iterator[Graph]:
        for graph in awake(self):
            parts.append(weakref.ref(graph))
            yield graph
            del graph

    def keeping(self: checkpoint._Writer, *args: Any) -> None:
        for i, held in enumerate((graphs, parts)):
            most[i] = max(most[i], sum(ref() is not None for ref in held))
        keep(self, *args)

    monkeypatch.setattr(checkpoint, "plan", planning)
    monkeypatch.setattr(Rest, "graphs", waking)
    monkeypatch.setattr(checkpoint._Writer, "_keep", keeping)
    fxq.compile(zoo("qwen3_moe"), SPEC, calib=TEXT, out=tmp_path / "out")
    assert len(graphs) == 2
    assert len(parts) > 10
    assert most[0] == 0
    assert most[1] < len(parts) / 2


def test_what_was_saved_can_still_be_looked_at(compiled: fxq.Compiled, tmp_path: Path) -> None:
    text, before = dump(compiled.graph), compiled.perplexity(TEXT)
    compiled.save(tmp_path / "a")
    assert compiled.perplexity(TEXT) == before
    assert dump(compiled.graph) == text
    compiled.save(tmp_path / "b")
    for path in sorted((tmp_path / "a").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert torch.is_tensor(next(iter(compiled.scales.values())))
