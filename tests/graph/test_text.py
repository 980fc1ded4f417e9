"""dump and parse are inverse, and what cannot be parsed is named by its line."""

import math
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fxq.errors import VerifyError
from fxq.graph.text import SHORT, dump, format_argument, format_type, parse, parse_type

SHAPES = st.lists(st.integers(0, 9), max_size=4)
TENSORS = st.builds(
    lambda dtype, shape: torch.empty(shape, dtype=dtype, device="meta"), st.sampled_from(list(SHORT)), SHAPES
)
NUMBERS = st.one_of(st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False))
TYPES = st.recursive(
    st.one_of(st.none(), TENSORS, NUMBERS),
    lambda t: st.one_of(st.lists(t, max_size=3).map(tuple), st.lists(t, max_size=3)),
    max_leaves=5,
)
CONSTANTS = st.sampled_from(
    [
        torch.float32,
        torch.bfloat16,
        torch.bool,
        torch.strided,
        torch.contiguous_format,
        torch.device("cpu"),
        torch.device("cuda:1"),
    ]
)
LEAVES = st.one_of(st.none(), NUMBERS, st.text(max_size=12), CONSTANTS)
ARGUMENTS = st.recursive(
    LEAVES,
    lambda a: st.one_of(
        st.lists(a, max_size=3),
        st.lists(a, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), a, max_size=2),
    ),
    max_leaves=6,
)


def the_graph() -> Graph:
    return parse(
        textwrap.dedent("""\
        %x : bf16[3,17,64] = placeholder()
        %w : bf16[32,64] = @model.layers.0.mlp.up_proj.weight
        %y : bf16[3,17,32] = aten.linear(%x, %w)
        return [%y]
        """)
    )


def same(a: object, b: object) -> bool:
    """Equal values of equal types, tensors by dtype and shape."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return isinstance(a, list) == isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def test_the_example_of_the_docs_comes_back_word_for_word() -> None:
    text = dump(the_graph())
    assert dump(parse(text)) == text
    nodes = {node.name: node for node in parse(text).nodes}
    assert nodes["y"].args == (nodes["x"], nodes["w"])
    assert nodes["y"].target is torch.ops.aten.linear.default
    assert nodes["w"].target == "model.layers.0.mlp.up_proj.weight"
    assert nodes["w"].meta["val"].shape == (32, 64)
    assert nodes["w"].meta["val"].dtype is torch.bfloat16


@given(ARGUMENTS)
@settings(max_examples=150, deadline=None)
def test_any_argument_comes_back(value: object) -> None:
    graph = Graph()
    node = graph.create_node("call_function", torch.ops.aten.relu.default, (value,), {"key": value}, "n")  # type: ignore[arg-type, dict-item]
    node.meta["val"] = None
    graph.output((node,))
    text = dump(graph)
    back = next(iter(parse(text).nodes))
    assert same(back.args[0], value)
    assert same(back.kwargs["key"], value)
    assert dump(parse(text)) == text


@given(TYPES)
@settings(max_examples=150, deadline=None)
def test_any_type_comes_back(val: object) -> None:
    assert same(parse_type(format_type(val)), val)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_float_comes_back(value: float) -> None:
    graph = Graph()
    graph.output([value])
    back = next(iter(parse(dump(graph)).nodes)).args[0]
    assert isinstance(back, (list, tuple))
    assert same(back[0], value)


def test_nodes_nest_in_lists_tuples_and_dicts() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output([x, (x,), {"a": [x, None]}])
    text = dump(graph)
    assert text.endswith("return [%x, (%x,), {'a': [%x, None]}]\n")
    assert dump(parse(text)) == text


@pytest.mark.parametrize(
    "target",
    [
        "aten.add.Tensor",
        "aten.linear",
        "fxq.amax",
        "operator.getitem",
        "operator.floordiv",
        "math.ceil",
        "torch.sym_float",
    ],
)
def test_a_target_comes_back(target: str) -> None:
    text = f"%x : bf16[3] = placeholder()\n%y : bf16[3] = {target}(%x)\nreturn %y\n"
    assert dump(parse(text)) == text


def test_values_are_shown_as_comments_and_comments_are_not_read() -> None:
    text = "%x : f32[4] = placeholder()\n%a : f32[] = fxq.amax(%x)\nreturn [%a]\n"
    shown = dump(parse(text), {"a": 1.5})
    assert "fxq.amax(%x)  # = 1.5\n" in shown
    assert dump(parse("# a whole line, with %nodes and 'quotes\n\n" + shown)) == text


def test_a_string_may_hold_what_looks_like_a_comment_or_a_node() -> None:
    text = "%a : f32[] = fxq.value('a # %b \\' \"')\nreturn [%a]\n"
    node = next(iter(parse(text).nodes))
    assert node.args == ("a # %b ' \"",)
    assert dump(parse(text)) == dump(parse(dump(parse(text))))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y : bf16[3] = aten.relu(%z)", "%z is used before it is defined"),
        ("%y : bf16[3] = aten.no_such_op(%x)", "no operator is called aten.no_such_op"),
        ("%y : bf16[3] = aten.add.NoOverload(%x, %x)", "no operator is called aten.add.NoOverload"),
        ("%y : bf16[3] = nowhere.relu(%x)", "no operator is called nowhere.relu"),
        ("%y : q4[3] = aten.relu(%x)", "no dtype is called q4"),
        ("%y : banana = aten.relu(%x)", "expected a type such as"),
        ("%y = aten.relu(%x)", "expected `%name : type = target(arguments)`"),
        ("%y : bf16[3] = aten.relu", "expected a call"),
        ("%y : bf16[3] = aten.relu(%x", ""),
        ("%x : bf16[3] = placeholder()", "%x is taken"),
        ("%sum : bf16[3] = aten.relu(%x)", "%sum is taken, or is a word that torch.fx reserves"),
        ("%y : bf16[3] = aten.relu(open('f'))", ""),
        ("%y : bf16[3] = aten.relu(torch.load)", ""),
        ("y : bf16[3] = aten.relu(%x)", "expected `%name : type = target(arguments)`"),
        ("return", "expected"),
        ("return [%nobody]", "%nobody is used before it is defined"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str, reason: str) -> None:
    text = f"# a comment\n%x : bf16[3] = placeholder()\n\n{line}\nreturn [%x]\n"
    with pytest.raises(VerifyError) as caught:
        parse(text)
    assert str(caught.value).startswith("line 4: ")
    assert reason in str(caught.value)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "target",
    ["torch.os.getcwd", "torch.sys.exit", "torch.load", "torch.hub.load", "math.__loader__.load_module"],
)
def test_only_operators_can_be_called(target: str) -> None:
    """A dump is data: reading, verifying and running one may not reach the rest of python."""
    with pytest.raises(VerifyError, match="no operator is called"):
        parse(f"%y : none = {target}()\nreturn [%y]\n")


def test_nesting_without_end_is_an_error_and_no_crash() -> None:
    deep = "[" * 5000 + "]" * 5000
    with pytest.raises(VerifyError, match=r"^line 1: "):
        parse(f"return {deep}\n")


def test_a_node_fx_would_call_is_refused_by_dump() -> None:
    graph = Graph()
    graph.output(graph.call_method("relu", (graph.placeholder("x"),)))
    with pytest.raises(
        VerifyError, match="%relu: expected placeholder, get_attr, call_function or output, found call_method"
    ):
        dump(graph)


def test_a_tuple_of_one_keeps_its_comma() -> None:
    node: Node = Graph().placeholder("x")
    assert format_argument((node,)) == "(%x,)"
