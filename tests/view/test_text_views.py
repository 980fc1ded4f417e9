"""Folded text, selections, reasons and differences of a graph that fits a page."""

import json

import pytest

from fxq.errors import SpecError
from fxq.graph.program import Program
from fxq.graph.text import dump, parse
from fxq.passes import PASSES
from fxq.view.explain import difference, explain
from fxq.view.folded import fold
from fxq.view.select import as_dot, as_json, select

LAYER = """\
%w{i} : bf16[32,32] = @layers.{i}.up.weight
%y{i} : bf16[4,32] = aten.linear(%{x}, %w{i})
"""
TEXT = (
    "%x : bf16[4,32] = placeholder()\n"
    + "".join(LAYER.format(i=i, x="x" if i == 0 else f"y{i - 1}") for i in range(4))
    + "%gate : bf16[1,32] = @gate.weight\n%g : bf16[4,1] = aten.linear(%y3, %gate)\n"
    + "%head : bf16[8,32] = @head.weight\n%logits : bf16[4,8] = aten.linear(%y3, %head)\n"
    + "return [%logits, %g]\n"
)


def test_layers_that_repeat_are_printed_once() -> None:
    lines = fold(parse(TEXT)).splitlines()
    assert lines[1] == "4 x {"
    assert lines[2] == "  %y0 : bf16[4,32] = aten.linear(%x, @layers.0.up.weight)"
    assert len(lines) == 7


def test_alike_reasons_are_counted_and_what_fires_comes_first() -> None:
    lines = explain(PASSES["quantize-linears"]().sites(Program(parse(TEXT)))).splitlines()
    assert lines[0] == "fires       5 x  %y0 (@layers.0.up.weight)"
    assert lines[1] == "misses      1 x  %g (@gate.weight): a gate: it has a single output"
    assert len(lines) == 2


def test_a_pass_without_sites_says_so() -> None:
    assert explain([]).startswith("no candidate")


def test_a_difference_names_its_stages_and_nothing_differs_from_itself() -> None:
    changed = TEXT.replace("@gate.weight", "@other.weight")
    lines = difference(TEXT, changed, "trace", "later").splitlines()
    assert lines[:2] == ["--- trace", "+++ later"]
    assert [line for line in lines[2:] if line[0] in "+-"] == [
        "-%gate : bf16[1,32] = @gate.weight",
        "+%gate : bf16[1,32] = @other.weight",
    ]
    assert difference(TEXT, TEXT, "trace", "later") == ""


def test_a_cone_is_a_graph_of_its_own() -> None:
    graph = parse(TEXT)
    names = [node.name for node in select(graph, cone="%y1")]
    assert names == ["x", "w0", "y0", "w1", "y1"]
    cut = "".join(line + "\n" for line in dump(graph).splitlines()[:5]) + "return [%y1]\n"
    assert dump(parse(cut)) == cut


@pytest.mark.parametrize(
    ("glob", "names"),
    [("w[01]", ["w0", "w1"]), ("layers.3.*", ["w3"]), ("placeholder", ["x"]), ("*gate*", ["gate"])],
)
def test_a_glob_fits_names_operators_and_parameters(glob: str, names: list[str]) -> None:
    assert [node.name for node in select(parse(TEXT), only=glob)] == names


def test_a_node_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"no node is called 'logit'; the nearest are logits"):
        select(parse(TEXT), cone="logit")


def test_json_and_dot_hold_the_nodes_and_edges_that_are_asked_for() -> None:
    graph = parse(TEXT)
    nodes = select(graph, cone="y0")
    found = json.loads(json.dumps(as_json(graph, nodes)))
    assert {node["id"] for node in found["nodes"]} == {"x", "w0", "y0"}
    assert {(edge["source"], edge["target"]) for edge in found["edges"]} == {("x", "y0"), ("w0", "y0")}
    assert '"w0" -> "y0";' in as_dot(graph, nodes)
