"""Segments of graphs: where they are cut, what flows between them, and that running them runs the graph."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fxq.graph import text
from fxq.graph.dialect import is_statistic
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
    made = segments(graph, 10)
    assert [_names(s.shared) for s in made] == [[f"a{i}", f"b{i}"] for i in range(4)]
    assert [_names(s.varying) for s in made] == [
        sorted([f"up{i}", f"act{i}", f"down{i}", f"h{i + 1}"]) for i in range(4)
    ]
    assert [_names(s.kept) for s in made] == [["h1"], ["h2"], ["h3"], []]


def test_with_few_tokens_a_segment_is_a_parameter() -> None:
    graph = _blocks(2)
    made = segments(graph, 1)
    assert [_names(s.shared) for s in made] == [["a0"], ["b0"], ["a1"], ["b1"]]
    assert _names(made[0].kept) == ["h0", "up0"]


def _far(layers: int) -> Graph:
    """A table that the first of many layers reads, and the last again."""
    lines = ["%ids : i64[6] = placeholder()", "%w : f32[32,16] = @w"]
    lines += ["%h0 : f32[6,16] = aten.embedding(%w, %ids)"]
    for i in range(layers):
        lines += [f"%a{i} : f32[16,16] = @a{i}", f"%h{i + 1} : f32[6,16] = aten.linear(%h{i}, %a{i})"]
    lines += [f"%out : f32[6,32] = aten.linear(%h{layers}, %w)"]
    return text.parse("\n".join([*lines, "return [%out]"]))


def test_a_parameter_of_two_segments_far_apart_is_read_in_both() -> None:
    made = segments(_far(20), 1)
    assert len(made) > 15
    assert [i for i, s in enumerate(made) if "w" in _names(s.shared)] == [0, len(made) - 1]
    assert not any(s.carried for s in made)


def test_a_parameter_that_the_next_segment_needs_too_is_read_once_and_handed_on() -> None:
    made = segments(_far(1), 1)
    assert ["w" in _names(s.shared) for s in made] == [True, False]
    assert [_names(s.carried) for s in made] == [["w"], []]


def test_a_shared_value_that_nothing_varying_reads_is_computed_where_it_stands() -> None:
    lines = ["%ids : i64[6] = placeholder()", "%w : f32[32,16] = @w"]
    lines += ["%h0 : f32[6,16] = aten.embedding(%w, %ids)", "%a : f32[16,16] = @a"]
    lines += ["%amax : f32[] = fxq.amax(%a)", "return [%h0]"]
    graph = text.parse("\n".join(lines))
    assert _names(segments(graph, 1)[-1].shared) == ["a", "amax", "w"]


def test_what_reads_a_statistic_begins_when_all_batches_have_passed_it() -> None:
    lines = [
        "%x : f32[6,16] = placeholder()",
        "%x_amax : f32[] = fxq.amax(%x)",
        "%x_q : f32[6,16] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')",
        "%x_twice : f32[6,16] = aten.add.Tensor(%x_q, %x_q)",
        "%y_amax : f32[] = fxq.amax(%x_twice)",
        "%half : f32[] = aten.mul.Tensor(%y_amax, 0.5)",
        "%y : f32[6,16] = aten.mul.Tensor(%x_twice, %half)",
    ]
    made = segments(text.parse("\n".join([*lines, "return [%y]"])), 10)
    assert [_names(s.varying) for s in made] == [["x_amax"], ["x_q", "x_twice", "y_amax"], ["y"]]
    assert [_names(s.shared) for s in made] == [[], [], ["half"]]
    assert [_names(s.kept) for s in made] == [["x"], ["x_twice"], []]


def test_rows_picked_for_experts_are_picked_again_behind_a_statistic() -> None:
    lines = [
        "%x : f32[6,16] = placeholder()",
        "%at : i64[48] = placeholder()",
        "%rows : f32[48,16] = aten.index_select(%x, 0, %at)",
        "%rows_amax : f32[] = fxq.amax(%rows)",
        "%rows_q : f32[48,16] = fxq.quantize(%rows, %rows_amax, format='nvfp4', scale='dynamic')",
        "%gram : f32[16,16] = fxq.gram(%rows_q)",
        "%new : f32[48,16] = aten.matmul(%rows_q, %gram)",
    ]
    made = segments(text.parse("\n".join([*lines, "return [%new]"])), 10)
    assert [_names(s.varying) for s in made] == [
        ["rows", "rows_amax"],
        ["gram", "rows", "rows_q"],
        ["new", "rows", "rows_q"],
    ]
    assert [_names(s.kept) for s in made] == [["at", "x"], ["at", "x"], []]


def test_a_weight_of_what_waits_for_a_statistic_is_not_read_again_and_again() -> None:
    """Between the statistics of one layer, what is made of its weights is handed on."""
    lines = ["%h0 : f32[6,16] = placeholder()", "%w : f32[16,16] = @w"]
    for i in range(4):
        lines += [f"%amax{i} : f32[] = fxq.amax(%h{i})"]
        lines += [f"%q{i} : f32[6,16] = fxq.quantize(%h{i}, %amax{i}, format='nvfp4', scale='dynamic')"]
        lines += [f"%h{i + 1} : f32[6,16] = aten.linear(%q{i}, %w)"]
    made = segments(text.parse("\n".join([*lines, "return [%h4]"])), 1e6)
    assert len(made) == 5
    assert sum("w" in _names(s.shared) for s in made) == 1


def _check(graph: Graph, made: list[Segment]) -> None:
    """Run the plan on names: every input is there when a node runs, a statistic only when all batches have
    passed it, everything ends, and all nodes run."""
    batch = {n for n in graph.nodes if n.op == "placeholder"}
    folds = {n for segment in made for n in segment.varying if is_statistic(n)}
    complete: set[Node] = set()
    carried: set[Node] = set()
    ran: set[Node] = set()
    for segment in made:
        env = set(carried)
        for node in segment.shared:
            assert set(node.all_input_nodes) <= env | complete
            env.add(node)
            env -= set(segment.ends[node])
        carried = set(segment.carried)
        assert carried <= env
        env |= batch
        for node in segment.varying:
            assert set(node.all_input_nodes) - folds <= env
            assert set(node.all_input_nodes) & folds <= complete
            assert node not in ran
            env.add(node)
            assert set(segment.ends[node]) <= env
            env -= set(segment.ends[node])
        complete |= folds & set(segment.varying)
        ran |= {*segment.shared, *segment.varying}
        batch = set(segment.kept)
        assert batch <= env
    assert not batch
    assert not carried
    assert ran == {n for n in graph.nodes if n.op not in ("placeholder", "output")}


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.0, 0.5, 3.0, 1e6]),
)
def test_any_graph_runs_in_segments(seed: int, count: int, statistics: float, scale: float) -> None:
    choose = random.Random(seed)
    lines = ["%n0 : f32[4,4] = placeholder()"]
    for i in range(1, count + 1):
        kind = choose.random()
        a, b = (choose.randrange(max(0, i - 6), i) for _ in range(2))
        if kind < 0.3:
            lines.append(f"%n{i} : f32[4,4] = @w{i}")
        elif kind < 0.3 + statistics:
            lines.append(f"%amax{i} : f32[] = fxq.amax(%n{a})")
            lines.append(f"%n{i} : f32[4,4] = aten.mul.Tensor(%n{b}, %amax{i})")
        else:
            lines.append(f"%n{i} : f32[4,4] = aten.add.Tensor(%n{a}, %n{b})")
    graph = text.parse("\n".join([*lines, f"return [%n{count}]"]))
    _check(graph, segments(graph, scale))


@pytest.mark.parametrize("count", [2, 30])
def test_no_segment_holds_two_blocks(count: int) -> None:
    graph = _blocks(count)
    assert len(segments(graph, 10)) == count


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
    made = segments(graph, 1)
    assert [_names(s.shared) for s in made] == [["big"], [f"w{i}" for i in range(1, 9)]]
