"""Segments of graphs: where they are cut, what flows between them, and that running them runs the graph."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fxq.graph import text
from fxq.run.segments import Segment, segments


def _blocks(count: int) -> Graph:
    """Residual blocks of two linears; between blocks only one value of 16 columns is alive."""
    lines = ["%h0 : f32[6,16] = placeholder()"]
    for i in range(count):
        lines += [
            f"%a{i} : f32[64,16] = @a{i}",
            f"%up{i} : f32[6,64] = aten.linear(%h{i}, %a{i})",
            f"%act{i} : f32[6,64] = aten.relu(%up{i})",
            f"%b{i} : f32[16,64] = @b{i}",
            f"%down{i} : f32[6,16] = aten.linear(%act{i}, %b{i})",
            f"%h{i + 1} : f32[6,16] = aten.add.Tensor(%h{i}, %down{i})",
        ]
    return text.parse("\n".join([*lines, f"return [%h{count}]"]))


def _names(nodes: tuple[Node, ...] | frozenset[Node]) -> list[str]:
    return sorted(node.name for node in nodes)


def test_with_many_tokens_a_segment_is_a_block() -> None:
    graph = _blocks(4)
    made = segments(graph, set(graph.nodes), 10)
    assert [_names(s.shared) for s in made] == [[f"a{i}", f"b{i}"] for i in range(4)]
    assert [_names(s.varying) for s in made] == [
        sorted([f"up{i}", f"act{i}", f"down{i}", f"h{i + 1}"]) for i in range(4)
    ]
    assert [_names(s.kept) for s in made] == [["h1"], ["h2"], ["h3"], []]


def test_with_few_tokens_a_segment_is_a_parameter() -> None:
    graph = _blocks(2)
    made = segments(graph, set(graph.nodes), 1)
    assert [_names(s.shared) for s in made] == [["a0"], ["b0"], ["a1"], ["b1"]]
    assert _names(made[0].kept) == ["h0", "up0"]


def test_what_is_not_wanted_is_in_no_segment_and_keeps_nothing_alive() -> None:
    graph = _blocks(3)
    wanted = {n for n in graph.nodes if n.name not in ("act2", "b2", "down2", "h3")}
    made = segments(graph, wanted, 10)
    assert [_names(s.varying) for s in made] == [
        ["act0", "down0", "h1", "up0"],
        ["act1", "down1", "h2", "up1"],
        ["up2"],
    ]
    assert not made[-1].kept


def test_a_parameter_of_two_segments_is_read_in_both() -> None:
    lines = ["%ids : i64[6] = placeholder()", "%w : f32[32,16] = @w"]
    lines += ["%h0 : f32[6,16] = aten.embedding(%w, %ids)", "%a : f32[16,16] = @a"]
    lines += ["%h1 : f32[6,16] = aten.linear(%h0, %a)", "%out : f32[6,32] = aten.linear(%h1, %w)"]
    graph = text.parse("\n".join([*lines, "return [%out]"]))
    made = segments(graph, set(graph.nodes), 1)
    assert ["w" in _names(s.shared) for s in made] == [True, True]


def test_a_shared_value_that_nothing_varying_reads_is_computed_where_it_stands() -> None:
    lines = ["%ids : i64[6] = placeholder()", "%w : f32[32,16] = @w"]
    lines += ["%h0 : f32[6,16] = aten.embedding(%w, %ids)", "%a : f32[16,16] = @a"]
    lines += ["%amax : f32[] = fxq.amax(%a)", "return [%h0]"]
    graph = text.parse("\n".join(lines))
    assert _names(segments(graph, set(graph.nodes), 1)[-1].shared) == ["a", "amax", "w"]


def _check(graph: Graph, wanted: set[Node], made: list[Segment]) -> None:
    """Run the plan on names: every input is there when a node runs, everything ends, all wanted nodes run."""
    batch = {n for n in graph.nodes if n.op == "placeholder"}
    ran: set[Node] = set()
    for segment in made:
        env: set[Node] = set()
        for node in segment.shared:
            assert set(node.all_input_nodes) <= env
            env.add(node)
            env -= set(segment.ends[node])
        env |= batch
        for node in segment.varying:
            assert set(node.all_input_nodes) <= env
            assert node not in ran
            env.add(node)
            assert set(segment.ends[node]) <= env
            env -= set(segment.ends[node])
        ran |= {*segment.shared, *segment.varying}
        batch = set(segment.kept)
        assert batch <= env
    assert not batch
    assert ran == {n for n in wanted if n.op not in ("placeholder", "output")}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0.0, 0.5, 3.0, 1e6]))
def test_any_graph_runs_in_segments(seed: int, count: int, scale: float) -> None:
    choose = random.Random(seed)
    lines = ["%n0 : f32[4,4] = placeholder()"]
    for i in range(1, count + 1):
        if choose.random() < 0.3:
            lines.append(f"%n{i} : f32[4,4] = @w{i}")
        else:
            a, b = (choose.randrange(max(0, i - 6), i) for _ in range(2))
            lines.append(f"%n{i} : f32[4,4] = aten.add.Tensor(%n{a}, %n{b})")
    graph = text.parse("\n".join([*lines, f"return [%n{count}]"]))
    roots = [n for n in graph.nodes if n.op != "output" and choose.random() < 0.5]
    wanted: set[Node] = set()
    while roots:
        node = roots.pop()
        wanted.add(node)
        roots += [n for n in node.all_input_nodes if n not in wanted]
    made = segments(graph, wanted, scale)
    _check(graph, wanted, made)


@pytest.mark.parametrize("count", [2, 30])
def test_no_segment_holds_two_blocks(count: int) -> None:
    graph = _blocks(count)
    assert len(segments(graph, set(graph.nodes), 10)) == count


def test_what_a_large_parameter_needs_anyway_joins_small_blocks() -> None:
    lines = [
        "%h0 : f32[6,16] = placeholder()",
        "%big : f32[16,1024] = @big",
        "%wide : f32[6,1024] = aten.mm(%h0, %big)",
    ]
    lines += ["%h1 : f32[6,16] = aten.slice.Tensor(%wide, 1, 0, 16)"]
    for i in range(1, 9):
        lines += [f"%w{i} : f32[16,16] = @w{i}", f"%h{i + 1} : f32[6,16] = aten.linear(%h{i}, %w{i})"]
    graph = text.parse("\n".join([*lines, "return [%h9]"]))
    made = segments(graph, set(graph.nodes), 1)
    assert [_names(s.shared) for s in made] == [["big"], [f"w{i}" for i in range(1, 9)]]
