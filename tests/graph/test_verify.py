"""Each rule of a graph, broken once."""

import textwrap

import pytest
import torch
from torch.fx import Graph, Node

from fxq.errors import VerifyError
from fxq.graph import edit
from fxq.graph.arguments import joined
from fxq.graph.text import parse
from fxq.graph.verify import infer, verify

GOOD = """\
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,16,32] = @experts.w
%w_e0 : bf16[16,32] = fxq.slice(%w, 0)
%w_e0_amax : f32[] = fxq.amax(%w_e0)
%w_e1 : bf16[16,32] = fxq.slice(%w, 1)
%w_e1_amax : f32[] = fxq.amax(%w_e1)
%amax : f32[] = fxq.sync([%w_e0_amax, %w_e1_amax])
%w_e0_q : bf16[16,32] = fxq.quantize(%w_e0, %amax, format='nvfp4', scale='mse')
%w_e1_q : bf16[16,32] = fxq.quantize(%w_e1, %amax, format='nvfp4', scale='max')
%w_q : bf16[2,16,32] = fxq.stack([%w_e0_q, %w_e1_q])
%y : bf16[4,16] = fxq.expert_linear(%x, %w_q, %ids)
%half : bf16[4,8] = aten.slice.Tensor(%y, 1, 0, 8)
%parts : (bf16[4,1], i64[4,1]) = aten.topk(%half, 1)
%best : i64[4,1] = operator.getitem(%parts, 1)
%packed : [u8[16,16], f8e4m3[16,2], f32[]] = fxq.pack(%w_e0, %amax, format='nvfp4', scale='max')
%stored : none = fxq.store_linear('experts.0', %packed, None, start=0, end=16)
return [%half, %best]
"""


def test_a_graph_with_every_operator_verifies() -> None:
    verify(parse(GOOD))


@pytest.mark.parametrize(
    ("old", "new", "node", "reason"),
    [
        ("%half : bf16[4,8]", "%half : bf16[4,9]", "half", "expected type bf16[4,8], found bf16[4,9]"),
        ("%half : bf16[4,8]", "%half : f32[4,8]", "half", "expected type bf16[4,8], found f32[4,8]"),
        ("%best : i64[4,1]", "%best : i64[4]", "best", "expected type i64[4,1], found i64[4]"),
        (
            "%w_e0 : bf16[16,32]",
            "%w_e0 : bf16[32,16]",
            "w_e0",
            "expected type bf16[16,32], found bf16[32,16]",
        ),
        ("slice(%w, 1)", "slice(%w, 2)", "w_e1", "the expert index is out of range"),
        ("slice(%w, 0)", "slice(%w, -1)", "w_e0", "the expert index is out of range"),
        ("slice(%w, 0)", "slice(%x, 0)", "w_e0", "expected a fused weight w [E, out, in]"),
        ("slice(%w, 0)", "slice(%w)", "w_e0", ""),
        ("slice(%w, 0)", "slice(%w, %ids)", "w_e0", ""),
        ("slice(%w, 0)", "slice(%w, 'zero')", "w_e0", ""),
        (
            "format='nvfp4', scale='mse'",
            "format='int4', scale='mse'",
            "w_e0_q",
            "format is one of nvfp4, fp8",
        ),
        (
            "format='nvfp4', scale='mse'",
            "format='nvfp4', scale='median'",
            "w_e0_q",
            "scale is one of max, mse, dynamic",
        ),
        ("format='nvfp4', scale='mse'", "scale='mse'", "w_e0_q", "format is one of nvfp4, fp8"),
        ("quantize(%w_e0, %amax", "quantize(%w_e0, %w_e0", "w_e0_q", "expected an amax of type f32[]"),
        ("quantize(%w_e0, %amax", "quantize(%w_e0, 1.0", "w_e0_q", "expected an amax of type f32[]"),
        ("quantize(%w_e0, %amax, ", "quantize(", "w_e0_q", ""),
        ("sync([%w_e0_amax, %w_e1_amax])", "sync([])", "amax", "expected amaxes, f32[] each"),
        (
            "sync([%w_e0_amax, %w_e1_amax])",
            "sync([%w_e0_amax, %w_e1])",
            "amax",
            "expected amaxes, f32[] each",
        ),
        ("sync([%w_e0_amax, %w_e1_amax])", "sync(%w_e0_amax)", "amax", "expected amaxes, f32[] each"),
        ("stack([%w_e0_q, %w_e1_q])", "stack([%w_e0_q, %x])", "w_q", "the slices differ in shape"),
        ("stack([%w_e0_q, %w_e1_q])", "stack([])", "w_q", "the slices differ in shape"),
        ("expert_linear(%x, %w_q, %ids)", "expert_linear(%w, %w_q, %ids)", "y", "expected tokens x [T, in]"),
        (
            "expert_linear(%x, %w_q, %ids)",
            "expert_linear(%x, %x, %ids)",
            "y",
            "expected a fused weight w [E, out, in]",
        ),
        ("expert_linear(%x, %w_q, %ids)", "expert_linear(%x, %w_q)", "y", ""),
        ("expert_linear(%x, %w_q, %ids)", "expert_linear(%x, %w_q, %x)", "y", ""),
        ("aten.topk(%half, 1)", "aten.topk(%half, 1, 7)", "parts", "aten.topk rejects its arguments"),
        ("getitem(%parts, 1)", "getitem(%parts, 2)", "best", ""),
        ("pack(%w_e0, %amax", "pack(%w_e0, %w_e0", "packed", "expected an amax of type f32[]"),
    ],
)
def test_a_broken_rule_names_the_node(old: str, new: str, node: str, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(VerifyError) as caught:
        verify(parse(GOOD.replace(old, new)))
    assert str(caught.value).startswith(f"%{node}: ")
    assert reason in str(caught.value)


def test_tokens_and_weight_must_agree_on_in() -> None:
    with pytest.raises(VerifyError, match="%y: x and w disagree on `in`"):
        verify(parse(GOOD.replace("%x : bf16[4,32]", "%x : bf16[4,48]")))


def test_nvfp4_needs_whole_blocks() -> None:
    text = textwrap.dedent("""\
        %w : bf16[16,24] = @w
        %a : f32[] = fxq.amax(%w)
        %q : bf16[16,24] = fxq.quantize(%w, %a, format='FORMAT', scale='max')
        return [%q]
        """)
    verify(parse(text.replace("FORMAT", "fp8")))
    with pytest.raises(VerifyError, match="%q: nvfp4 needs a last dimension that is a multiple of 16"):
        verify(parse(text.replace("FORMAT", "nvfp4")))


def test_rows_of_any_format_fit_a_tensor_of_their_width() -> None:
    text = textwrap.dedent("""\
        %a : f32[] = fxq.value('a')
        %w : bf16[16,32] = @w
        %p : PACKED = fxq.pack(%w, %a, format='FORMAT', scale='max')
        %s : none = fxq.store_rows('both', %p, None, start=0, end=16, rows=[16, 32, 1], shape=[32, WIDTH], \
expert=0, experts=1, transposed=False)
        return ()
        """)
    packed = {"nvfp4": "[u8[16,16], f8e4m3[16,2], f32[]]", "fp8": "[f8e4m3[16,32], f32[]]"}
    for format, type_ in packed.items():
        filled = text.replace("PACKED", type_).replace("FORMAT", format)
        verify(parse(filled.replace("WIDTH", "32")))
        with pytest.raises(VerifyError, match="%s: the rows lie outside of the tensor"):
            verify(parse(filled.replace("WIDTH", "64")))


@pytest.mark.parametrize(("format", "scale"), [("fp8", "mse"), ("fp8", "dynamic"), ("nvfp4", "static")])
def test_a_format_has_scales_of_its_own(format: str, scale: str) -> None:
    text = "%w : bf16[16,32] = @w\n%a : f32[] = fxq.amax(%w)\n"
    for target, type_ in [("quantize", "bf16[16,32]"), ("pack", "[bf16[16,32]]")]:
        call = f"%q : {type_} = fxq.{target}(%w, %a, format='{format}', scale='{scale}')\nreturn [%q]\n"
        with pytest.raises(
            VerifyError, match="%q: scale is one of max, mse, dynamic for nvfp4; of max, static"
        ):
            verify(parse(text + call))


def test_a_node_must_come_before_its_users() -> None:
    graph = parse(GOOD)
    nodes = {node.name: node for node in graph.nodes}
    nodes["half"].append(nodes["y"])
    with pytest.raises(VerifyError, match="%half: reads %y, which comes later"):
        verify(graph)


def test_an_input_from_another_graph_is_refused() -> None:
    graph, other = parse(GOOD), parse(GOOD)
    stranger = next(node for node in other.nodes if node.name == "y")
    half = next(node for node in graph.nodes if node.name == "half")
    half.args = (stranger, *half.args[1:])
    with pytest.raises(VerifyError, match="%half: reads %y, which comes later or is not in the graph"):
        verify(graph)


@pytest.mark.parametrize("returns", [0, 2])
def test_a_graph_has_one_output(returns: int) -> None:
    text = GOOD.replace("return [%half, %best]\n", "return [%half]\n" * returns)
    with pytest.raises(VerifyError, match="return"):
        verify(parse(text))


def test_nothing_follows_the_output() -> None:
    with pytest.raises(VerifyError):
        verify(parse(GOOD + "%late : bf16[4,16] = aten.relu(%y)\n"))


def test_a_node_without_a_type_is_refused() -> None:
    graph = parse(GOOD)
    next(node for node in graph.nodes if node.name == "w").meta.clear()
    with pytest.raises(VerifyError, match="%w: has no type"):
        verify(graph)


def test_a_call_of_something_that_is_no_operator_is_refused_without_calling_it() -> None:
    called: list[object] = []

    def spy(t: torch.Tensor) -> torch.Tensor:
        called.append(t)
        return t

    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, device="meta")
    y = graph.call_function(spy, (x,))
    y.meta["val"] = x.meta["val"]
    graph.output([y])
    with pytest.raises(VerifyError):
        verify(graph)
    assert not called


@pytest.mark.parametrize("op", ["call_method", "call_module"])
def test_calls_of_methods_and_modules_are_refused(op: str) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, device="meta")
    graph.output([graph.create_node(op, "relu", (x,), {}, "y")])
    with pytest.raises(
        VerifyError, match=f"%y: expected placeholder, get_attr, call_function or output, found {op}"
    ):
        verify(graph)


def test_inference_agrees_with_running_on_real_tensors() -> None:
    graph = parse(GOOD)
    values = {
        "x": torch.zeros(4, 32),
        "ids": torch.zeros(4, dtype=torch.long),
        "w": torch.ones(2, 16, 32),
    }
    compared = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.name in ("packed", "stored", "best", "parts"):
            continue
        args = torch.fx.node.map_aggregate(node.args, lambda a: values[a.name] if isinstance(a, Node) else a)
        values[node.name] = node.target(*args, **node.kwargs)  # type: ignore[operator, misc]
        inferred = infer(node)
        assert isinstance(inferred, torch.Tensor)
        assert inferred.shape == values[node.name].shape
        compared += 1
    assert compared > 8


def test_an_edit_is_typed_when_it_is_made() -> None:
    graph = parse("%w : bf16[16,32] = @w\nreturn [%w]\n")
    w = next(iter(graph.nodes))
    assert edit.call(graph, "a", torch.ops.fxq.amax.default, w).meta["val"].shape == ()
    with pytest.raises(VerifyError, match=r"%b: aten\.mm rejects its arguments"):
        edit.call(graph, "b", torch.ops.aten.mm.default, w, w)


def test_sets_that_overlap_are_joined_in_order_of_first_appearance() -> None:
    assert joined([]) == []
    assert joined(["ab", "cd", "e", "ce", "fb", ""]) == [["a", "b", "f"], ["c", "d", "e"]]
    assert joined(["zy", "xw", "wz"]) == [["z", "y", "x", "w"]]


def test_a_weight_is_transposed_once_and_back_again() -> None:
    graph = parse("%w : bf16[16,32] = @w\n%e : bf16[2,16,32] = @e\nreturn [%w, %e]\n")
    for w, shape in zip(list(graph.nodes)[:2], ([32, 16], [2, 32, 16]), strict=True):
        turned = edit.transposed(w)
        assert list(turned.meta["val"].shape) == shape
        assert edit.transposed(w) is turned
        assert edit.transposed(turned) is w


def test_tidy_orders_nodes_and_drops_every_unused_one() -> None:
    graph = parse(
        "%x : bf16[4,32] = placeholder()\n%w : bf16[16,32] = @w\n"
        "%y : bf16[4,16] = aten.linear(%x, %w)\nreturn [%y]\n"
    )
    nodes = {node.name: node for node in graph.nodes}
    a = edit.call(graph, "a", torch.ops.aten.relu.default, nodes["x"])
    dead = edit.call(graph, "dead", torch.ops.aten.relu.default, a)
    nodes["w"].append(edit.call(graph, "deader", torch.ops.aten.relu.default, dead))
    late = edit.call(graph, "late", torch.ops.aten.neg.default, nodes["x"])
    nodes["y"].replace_input_with(nodes["x"], late)
    edit.tidy(graph)
    verify(graph)
    assert [node.name for node in graph.nodes][:-1] == ["x", "late", "w", "y"]
