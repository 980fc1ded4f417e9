"""Each kind of pattern fits, or says why not; rules report the miss that got furthest."""

import pytest
import torch
from torch.fx import Graph, Node

from fxq.graph.pattern import (
    Attempt,
    Bind,
    Call,
    Const,
    Listed,
    Match,
    Miss,
    PastViews,
    Pattern,
    Rule,
    Weight,
)
from fxq.graph.text import parse

aten = torch.ops.aten
LINEAR, BMM, INDEX = aten.linear.default, aten.bmm.default, aten.index.Tensor


@pytest.fixture
def nodes() -> dict[str, Node]:
    graph: Graph = parse(
        """\
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[3,16,32] = @experts.w
%picked : bf16[4,16,32] = aten.index.Tensor(%w, [%ids])
%column : bf16[4,32,1] = aten.unsqueeze(%x, -1)
%y : bf16[4,16,1] = aten.bmm(%picked, %column)
%v : bf16[16,32] = @plain.weight
%v32 : f32[16,32] = aten._to_copy(%v, dtype=torch.float32)
%x32 : f32[4,32] = aten._to_copy(%x, dtype=torch.float32)
%z : f32[4,16] = aten.linear(%x32, %v32)
%square : bf16[4,4] = aten.matmul(%x, %x)
return [%y, %z, %square]
"""
    )
    return {node.name: node for node in graph.nodes}


def miss(pattern: Pattern, value: object) -> str:
    reason = pattern.fit(value, Attempt())
    assert reason is not None
    return reason


def bound(pattern: Pattern, value: object) -> dict[str, Node]:
    attempt = Attempt()
    assert pattern.fit(value, attempt) is None
    return attempt.bound


def test_bind_takes_any_node(nodes: dict[str, Node]) -> None:
    assert bound(Bind("a"), nodes["x"]) == {"a": nodes["x"]}
    assert bound(Bind("a", rank=2), nodes["x"]) == {"a": nodes["x"]}


def test_bind_says_what_it_found(nodes: dict[str, Node]) -> None:
    assert miss(Bind("a"), 3) == "`a`: expected a node, found 3"
    assert miss(Bind("a"), [nodes["x"]]) == "`a`: expected a node, found [%x]"
    assert miss(Bind("a", rank=3), nodes["x"]) == "`a`: expected 3 dimensions, found [4, 32] at %x"


def test_a_name_used_twice_is_the_same_node(nodes: dict[str, Node]) -> None:
    twice = Call(aten.matmul.default, Bind("a"), Bind("a"))
    assert bound(twice, nodes["square"]) == {"a": nodes["x"]}
    other = Call(BMM, Bind("a"), Bind("a"))
    assert miss(other, nodes["y"]) == "`a` is both %picked and %column"


def test_weight_is_a_parameter_behind_views(nodes: dict[str, Node]) -> None:
    assert bound(Weight("w", rank=3), nodes["w"]) == {"w": nodes["w"]}
    assert bound(Weight("w", rank=2), nodes["v32"]) == {"w": nodes["v32"]}, (
        "bound as it is used, not the parameter"
    )


def test_weight_says_what_it_found(nodes: dict[str, Node]) -> None:
    assert miss(Weight("w", rank=2), nodes["x"]) == "`w`: expected a parameter, found %x"
    assert miss(Weight("w", rank=2), nodes["y"]) == "`w`: expected a parameter, found %y"
    assert miss(Weight("w", rank=2), None) == "`w`: expected a parameter, found None"
    assert miss(Weight("w", rank=2), nodes["w"]) == "`w`: expected a 2-D parameter, found [3, 16, 32] at %w"


def test_const_is_one_of_its_values(nodes: dict[str, Node]) -> None:
    assert Const((-1, 2)).fit(-1, Attempt()) is None
    assert miss(Const((-1, 2)), 1) == "expected -1 or 2, found 1"
    assert miss(Const((-1, 2)), nodes["x"]) == "expected -1 or 2, found %x"


def test_listed_wants_exactly_its_items(nodes: dict[str, Node]) -> None:
    ids = nodes["ids"]
    assert bound(Listed(Bind("ids")), [ids]) == {"ids": ids}
    assert bound(Listed(Bind("ids")), (ids,)) == {"ids": ids}
    assert miss(Listed(Bind("ids")), [ids, ids]) == "expected a list of 1, found [%ids, %ids]"
    assert miss(Listed(Bind("ids")), []) == "expected a list of 1, found []"
    assert miss(Listed(Bind("ids")), ids) == "expected a list of 1, found %ids"
    assert miss(Listed(Bind("ids")), [None]) == "`ids`: expected a node, found None"


def test_call_matches_its_targets_and_first_arguments(nodes: dict[str, Node]) -> None:
    assert bound(Call(BMM), nodes["y"]) == {}
    assert bound(Call((LINEAR, BMM), Bind("a")), nodes["y"]) == {"a": nodes["picked"]}


def test_call_says_what_it_found(nodes: dict[str, Node]) -> None:
    assert miss(Call(LINEAR), nodes["y"]) == "expected aten.linear, found aten.bmm at %y"
    assert miss(Call((LINEAR, BMM)), nodes["w"]) == "expected aten.bmm or aten.linear, found get_attr at %w"
    assert miss(Call(LINEAR), 1.5) == "expected aten.linear, found 1.5"
    assert (
        miss(Call(BMM, Bind("a"), Bind("b"), Bind("c")), nodes["y"])
        == "expected 3 arguments of aten.bmm, found 2 at %y"
    )
    inner = Call(BMM, Call(INDEX, Weight("w", rank=2)))
    assert miss(inner, nodes["y"]) == "`w`: expected a 2-D parameter, found [3, 16, 32] at %w"


def test_past_views_looks_behind_casts_and_views(nodes: dict[str, Node]) -> None:
    assert bound(PastViews(Bind("x")), nodes["x32"]) == {"x": nodes["x"]}
    assert bound(PastViews(Call(INDEX)), nodes["picked"]) == {}
    assert miss(PastViews(Const((1,))), 2) == "expected 1, found 2"


def test_a_rule_matches_with_what_it_bound(nodes: dict[str, Node]) -> None:
    rule = Rule("picked", Call(BMM, Call(INDEX, Weight("w", rank=3), Listed(Bind("ids"))), Bind("x")))
    found = rule.match(nodes["y"])
    assert isinstance(found, Match)
    assert (found.rule, found.node, found["w"], found["ids"], found["x"]) == (
        "picked",
        nodes["y"],
        nodes["w"],
        nodes["ids"],
        nodes["column"],
    )


def test_a_rule_that_misses_names_itself_the_node_and_the_reason(nodes: dict[str, Node]) -> None:
    found = Rule("a linear", Call(LINEAR)).match(nodes["y"])
    assert isinstance(found, Miss)
    assert found.depth == 0
    assert str(found) == "%y: a linear: expected aten.linear, found aten.bmm at %y"


def test_depth_counts_the_parts_that_fitted(nodes: dict[str, Node]) -> None:
    shallow = Rule("shallow", Call(LINEAR)).match(nodes["y"])
    middle = Rule("middle", Call(BMM, Call(LINEAR))).match(nodes["y"])
    deep = Rule("deep", Call(BMM, Call(INDEX, Weight("w", rank=3), Listed(Bind("ids", rank=2))))).match(
        nodes["y"]
    )
    assert isinstance(shallow, Miss)
    assert isinstance(middle, Miss)
    assert isinstance(deep, Miss)
    assert shallow.depth < middle.depth < deep.depth


def test_rules_report_the_deepest_miss_whatever_the_order(nodes: dict[str, Node]) -> None:
    shallow = Rule("shallow", Call(LINEAR))
    deep = Rule("deep", Call(BMM, Call(INDEX, Weight("w", rank=2))))
    for rules in (shallow + deep, deep + shallow):
        found = rules.match(nodes["y"])
        assert isinstance(found, Miss)
        assert found.rule == "deep"


def test_the_first_rule_that_fires_wins(nodes: dict[str, Node]) -> None:
    never, first, second = Rule("never", Call(LINEAR)), Rule("first", Call(BMM)), Rule("second", Bind("y"))
    assert (never + first + second).match(nodes["y"]).rule == "first"
    assert (never + (second + first)).match(nodes["y"]).rule == "second"


def test_a_match_keeps_nothing_from_a_rule_that_missed(nodes: dict[str, Node]) -> None:
    broken = Rule("broken", Call(BMM, Bind("a"), Const((1,))))
    found = (broken + Rule("whole", Call(BMM, Bind("b")))).match(nodes["y"])
    assert isinstance(found, Match)
    assert dict(found.bound) == {"b": nodes["picked"]}


def test_matching_changes_nothing_in_the_graph(nodes: dict[str, Node]) -> None:
    before = {name: (node.args, dict(node.meta)) for name, node in nodes.items()}
    (Rule("a", Call(BMM, Call(LINEAR))) + Rule("b", PastViews(Bind("x")))).match(nodes["y"])
    assert {name: (node.args, dict(node.meta)) for name, node in nodes.items()} == before
