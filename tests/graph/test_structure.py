"""What the data flow says: routers, the output head, nearest matmuls, and what engines fuse."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from torch.fx import Graph, Node

from fxq.graph.structure.groups import fused_by_engines, head, routers
from fxq.graph.structure.matmuls import Frontiers, as_weight_matmul, weight_matmuls
from fxq.graph.structure.views import root, value_of
from fxq.graph.text import parse

LAYER = """\
%ids : i64[1,4] = placeholder()
%table : bf16[8,32] = @embed.weight
%x : bf16[1,4,32] = aten.embedding(%table, %ids)
%q : bf16[32,32] = @q.weight
%q_out : bf16[1,4,32] = aten.linear(%x, %q)
%q_view : bf16[1,4,2,16] = aten.view(%q_out, [1, 4, 2, 16])
%q_heads : bf16[1,2,4,16] = aten.transpose.int(%q_view, 1, 2)
%k : bf16[16,32] = @k.weight
%x_cast : bf16[1,4,32] = aten._to_copy(%x, dtype=torch.bfloat16)
%k_out : bf16[1,4,16] = aten.linear(%x_cast, %k)
%k_view : bf16[1,4,1,16] = aten.view(%k_out, [1, 4, 1, 16])
%k_one : bf16[1,1,4,16] = aten.transpose.int(%k_view, 1, 2)
%k_heads : bf16[1,2,4,16] = aten.expand(%k_one, [1, 2, 4, 16])
%v : bf16[16,32] = @v.weight
%v_out : bf16[1,4,16] = aten.linear(%x, %v)
%v_view : bf16[1,4,1,16] = aten.view(%v_out, [1, 4, 1, 16])
%v_one : bf16[1,1,4,16] = aten.transpose.int(%v_view, 1, 2)
%v_heads : bf16[1,2,4,16] = aten.expand(%v_one, [1, 2, 4, 16])
%attention : bf16[1,2,4,16] = aten.scaled_dot_product_attention(%q_heads, %k_heads, %v_heads)
%heads : bf16[1,4,2,16] = aten.transpose.int(%attention, 1, 2)
%merged : bf16[1,4,32] = aten.reshape(%heads, [1, 4, 32])
%o : bf16[32,32] = @o.weight
%o_out : bf16[1,4,32] = aten.linear(%merged, %o)
%h : bf16[1,4,32] = aten.add.Tensor(%x, %o_out)
%router : bf16[3,32] = @router.weight
%r : bf16[1,4,3] = aten.linear(%h, %router)
%scores : bf16[1,4,3] = aten.softmax.int(%r, -1)
%top : (bf16[1,4,1], i64[1,4,1]) = aten.topk(%scores, 1)
%chosen : i64[1,4,1] = operator.getitem(%top, 1)
%which : i64[4] = aten.reshape(%chosen, [-1])
%flat : bf16[4,32] = aten.view(%h, [4, 32])
%experts : bf16[3,32,32] = @experts.weight
%e : bf16[4,32] = fxq.expert_linear(%flat, %experts, %which)
%routed : bf16[1,4,32] = aten.view(%e, [1, 4, 32])
%gate : bf16[16,32] = @gate.weight
%g : bf16[1,4,16] = aten.linear(%h, %gate)
%act : bf16[1,4,16] = aten.silu(%g)
%up : bf16[16,32] = @up.weight
%u : bf16[1,4,16] = aten.linear(%h, %up)
%gu : bf16[1,4,16] = aten.mul.Tensor(%act, %u)
%down : bf16[32,16] = @down.weight
%d : bf16[1,4,32] = aten.linear(%gu, %down)
%single : bf16[1,32] = @single.weight
%s : bf16[1,4,1] = aten.linear(%h, %single)
%sigmoid : bf16[1,4,1] = aten.sigmoid(%s)
%shared : bf16[1,4,32] = aten.mul.Tensor(%sigmoid, %d)
%y : bf16[1,4,32] = aten.add.Tensor(%routed, %shared)
%norm : bf16[32] = @norm.weight
%last : bf16[1,4,32] = aten.mul.Tensor(%y, %norm)
%lm : bf16[8,32] = @lm_head.weight
%logits : bf16[1,4,8] = aten.linear(%last, %lm)
%capped : bf16[1,4,8] = aten.tanh(%logits)
return [%capped]
"""


@pytest.fixture
def graph() -> Graph:
    return parse(LAYER)


def named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def names(nodes: object) -> list[str]:
    return [node.name for node in nodes]  # type: ignore[attr-defined]


def test_weight_matmuls_are_those_with_a_parameter(graph: Graph) -> None:
    found = {m.node.name: m.parameter.target for m in weight_matmuls(graph)}
    assert found == {
        "q_out": "q.weight",
        "k_out": "k.weight",
        "v_out": "v.weight",
        "o_out": "o.weight",
        "r": "router.weight",
        "e": "experts.weight",
        "g": "gate.weight",
        "u": "up.weight",
        "d": "down.weight",
        "s": "single.weight",
        "logits": "lm_head.weight",
    }


def test_a_router_is_what_a_choice_reads(graph: Graph) -> None:
    found = routers(graph, Frontiers(graph))
    assert {matmul.name: choice.name for matmul, choice in found.items()} == {"r": "top"}


def test_the_head_is_the_single_matmul_behind_the_output(graph: Graph) -> None:
    found = head(graph, Frontiers(graph))
    assert found is not None
    assert found.name == "logits"


def test_a_graph_with_two_heads_has_no_single_one() -> None:
    graph = parse(LAYER.replace("return [%capped]", "return [%capped, %d]"))
    assert head(graph, Frontiers(graph)) is None


def test_frontiers_stop_at_the_nearest_matmuls_and_go_around_none(graph: Graph) -> None:
    frontiers = Frontiers(graph)
    assert sorted(names(frontiers.of(named(graph, "attention")))) == ["k_out", "q_out", "v_out"]
    assert names(frontiers.of(named(graph, "h"))) == ["o_out"]
    assert sorted(names(frontiers.of(named(graph, "gu")))) == ["g", "u"]
    assert names(frontiers.of(named(graph, "g"))) == ["g"], "a matmul is its own frontier"
    assert names(frontiers.of(named(graph, "x"))) == []
    assert sorted(names(frontiers.of(named(graph, "y")))) == ["d", "e", "s"]


def test_engines_fuse_q_k_v_and_gate_up_and_nothing_else(graph: Graph) -> None:
    found = [(kind, names(group)) for kind, group in fused_by_engines(graph, Frontiers(graph))]
    assert found == [("q/k/v", ["q_out", "k_out", "v_out"]), ("gate/up", ["g", "u"])]


def test_keys_of_another_value_leave_no_group() -> None:
    keys = "%k_out : bf16[1,4,16] = aten.linear(%{}, %k)"
    negated = "%k_neg : bf16[1,4,32] = aten.neg(%x)\n" + keys.format("k_neg")
    assert keys.format("x_cast") in LAYER
    other = LAYER.replace(keys.format("x_cast"), negated)
    graph = parse(other)
    assert [kind for kind, _ in fused_by_engines(graph, Frontiers(graph))] == ["gate/up"]


# What looks like gate and up: two linears of one input that meet in a product.
LOOK_ALIKES = {
    "taps of a short convolution": """\
%x : bf16[1,8,32] = placeholder()
%values : bf16[64,32] = @values
%v : bf16[1,8,64] = aten.linear(%x, %values)
%steps : bf16[1,64,8] = aten.transpose.int(%v, 1, 2)
%padded : bf16[1,64,11] = aten.constant_pad_nd(%steps, [3, 0])
%unfolded : bf16[1,64,8,4] = aten.unfold(%padded, -1, 4, 1)
%windows : bf16[1,8,64,4] = aten.transpose.int(%unfolded, 1, 2)
%taps : bf16[256,32] = @taps
%t : bf16[1,8,256] = aten.linear(%x, %taps)
%weights : bf16[1,8,64,4] = aten.view(%t, [1, 8, 64, 4])
%weighed : bf16[1,8,64,4] = aten.mul.Tensor(%windows, %weights)
%summed : bf16[1,8,64] = aten.sum.dim_IntList(%weighed, [-1])
%out : bf16[32,64] = @out
%y : bf16[1,8,32] = aten.linear(%summed, %out)
return [%y]
""",
    "a gate a head": """\
%x : bf16[1,8,32] = placeholder()
%values : bf16[64,32] = @values
%v : bf16[1,8,64] = aten.linear(%x, %values)
%heads : bf16[1,8,4,16] = aten.view(%v, [1, 8, 4, 16])
%gates : bf16[4,32] = @gates
%g : bf16[1,8,4] = aten.linear(%x, %gates)
%wide : bf16[1,8,4,1] = aten.unsqueeze(%g, -1)
%spread : bf16[1,8,4,16] = aten.expand(%wide, [1, 8, 4, 16])
%opened : bf16[1,8,4,16] = aten.sigmoid(%spread)
%gated : bf16[1,8,4,16] = aten.mul.Tensor(%heads, %opened)
%flat : bf16[1,8,64] = aten.view(%gated, [1, 8, 64])
%out : bf16[32,64] = @out
%y : bf16[1,8,32] = aten.linear(%flat, %out)
return [%y]
""",
    "a normalised gate": """\
%x : bf16[1,8,32] = placeholder()
%values : bf16[64,32] = @values
%v : bf16[1,8,64] = aten.linear(%x, %values)
%gates : bf16[64,32] = @gates
%g : bf16[1,8,64] = aten.linear(%x, %gates)
%shares : bf16[1,8,64] = aten.softmax.int(%g, -1)
%gated : bf16[1,8,64] = aten.mul.Tensor(%v, %shares)
%out : bf16[32,64] = @out
%y : bf16[1,8,32] = aten.linear(%gated, %out)
return [%y]
""",
    "a gate of the residual stream": """\
%x : bf16[1,8,32] = placeholder()
%values : bf16[32,32] = @values
%v : bf16[1,8,32] = aten.linear(%x, %values)
%gates : bf16[32,32] = @gates
%g : bf16[1,8,32] = aten.linear(%x, %gates)
%opened : bf16[1,8,32] = aten.sigmoid(%g)
%gated : bf16[1,8,32] = aten.mul.Tensor(%v, %opened)
%y : bf16[1,8,32] = aten.add.Tensor(%x, %gated)
return [%y]
""",
    "a gate of values": """\
%x : bf16[1,8,32] = placeholder()
%queries : bf16[32,32] = @queries
%q : bf16[1,8,32] = aten.linear(%x, %queries)
%values : bf16[32,32] = @values
%v : bf16[1,8,32] = aten.linear(%x, %values)
%gates : bf16[32,32] = @gates
%g : bf16[1,8,32] = aten.linear(%x, %gates)
%opened : bf16[1,8,32] = aten.sigmoid(%g)
%gated : bf16[1,8,32] = aten.mul.Tensor(%v, %opened)
%seen : bf16[1,8,32] = aten.scaled_dot_product_attention(%q, %q, %gated)
%out : bf16[32,32] = @out
%y : bf16[1,8,32] = aten.linear(%seen, %out)
return [%y]
""",
}


@pytest.mark.parametrize("what", LOOK_ALIKES)
def test_look_alikes_of_gate_and_up_are_no_group(what: str) -> None:
    graph = parse(LOOK_ALIKES[what])
    assert list(fused_by_engines(graph, Frontiers(graph))) == []


@pytest.mark.parametrize(
    "act",
    [
        "%act : bf16[1,8,32] = aten.hardswish(%g)",
        "%a : bf16[1,8,32] = aten.mul.Tensor(%g, 1.702)\n%act : bf16[1,8,32] = aten.mul.Tensor(%g, %a)",
        "%act : bf16[1,8,32] = aten.clamp(%g, None, 7.0)",
    ],
)
def test_gate_and_up_are_a_pair_whatever_lies_around_their_product(act: str) -> None:
    graph = parse(
        f"""\
%x : bf16[1,8,32] = placeholder()
%gate : bf16[32,32] = @gate
%g : bf16[1,8,32] = aten.linear(%x, %gate)
%up : bf16[32,32] = @up
%u : bf16[1,8,32] = aten.linear(%x, %up)
{act}
%gu : bf16[1,8,32] = aten.mul.Tensor(%act, %u)
%mean : bf16[1,8,1] = aten.mean.dim(%gu, [-1], True)
%normed : bf16[1,8,32] = aten.div.Tensor(%gu, %mean)
%both : bf16[1,8,64] = aten.cat([%x, %normed], -1)
%down : bf16[32,64] = @down
%y : bf16[1,8,32] = aten.linear(%both, %down)
return [%y]
"""
    )
    assert [(kind, names(group)) for kind, group in fused_by_engines(graph, Frontiers(graph))] == [
        ("gate/up", ["g", "u"])
    ]


def test_one_linear_for_keys_and_values_is_in_the_group_once() -> None:
    graph = parse(
        LAYER.replace("attention(%q_heads, %k_heads, %v_heads)", "attention(%q_heads, %k_heads, %k_heads)")
    )
    assert names(next(fused_by_engines(graph, Frontiers(graph)))[1]) == ["q_out", "k_out"]


def test_value_of_looks_through_views_casts_and_quantize() -> None:
    graph = parse(
        """\
%x : bf16[4,32] = placeholder()
%a : f32[] = fxq.amax(%x)
%q : bf16[4,32] = fxq.quantize(%x, %a, format='nvfp4', scale='dynamic')
%view : bf16[2,2,32] = aten.view(%q, [2, 2, 32])
%cast : f32[2,2,32] = aten._to_copy(%view, dtype=torch.float32)
%relu : f32[2,2,32] = aten.relu(%cast)
return [%relu]
"""
    )
    assert value_of(named(graph, "cast")).name == "x"
    assert value_of(named(graph, "relu")).name == "relu"


def test_root_looks_through_slices_quantize_and_stack() -> None:
    graph = parse(
        """\
%x : bf16[4,32] = placeholder()
%ids : i64[4] = placeholder()
%w : bf16[2,32,16] = @w
%t : bf16[2,16,32] = aten.transpose.int(%w, 1, 2)
%e : bf16[16,32] = fxq.slice(%t, 0)
%a : f32[] = fxq.amax(%e)
%q : bf16[16,32] = fxq.quantize(%e, %a, format='nvfp4', scale='max')
%s : bf16[1,16,32] = fxq.stack([%q])
%y : bf16[4,16] = fxq.expert_linear(%x, %s, %ids)
return [%y]
"""
    )
    w = named(graph, "w")
    assert all(root(named(graph, name)) is w for name in ("w", "t", "e", "q", "s"))
    assert root(named(graph, "x")) is None
    assert root(named(graph, "y")) is None
    matmul = as_weight_matmul(named(graph, "y"))
    assert matmul is not None
    assert (matmul.x.name, matmul.w.name, matmul.parameter.name) == ("x", "s", "w")


@pytest.mark.parametrize(
    ("call", "x", "parameter"),
    [
        ("aten.linear(%x, %w)", "x", "w"),
        ("aten.mm(%x, %w)", "x", "w"),
        ("aten.addmm(%b, %x, %w)", "x", "w"),
        ("aten.matmul(%x, %t)", "x", "w"),
        ("aten.einsum('ab,bc->ac', [%x, %w])", "x", "w"),
        ("aten.mm(%w, %x)", "x", "w"),
    ],
)
def test_every_matmul_by_a_parameter_is_seen(call: str, x: str, parameter: str) -> None:
    graph = parse(
        f"""\
%x : bf16[32,32] = placeholder()
%b : bf16[32] = @b
%w : bf16[32,32] = @w
%t : bf16[32,32] = aten.t(%w)
%y : bf16[32,32] = {call}
return [%y]
"""
    )
    found = as_weight_matmul(named(graph, "y"))
    assert found is not None
    assert (found.x.name, found.parameter.name) == (x, parameter)


@pytest.mark.parametrize(
    "call", ["aten.mm(%x, %x)", "aten.mul.Tensor(%x, %w)", "aten.mm(%w, %w)", "aten.matmul(%x, %v)"]
)
def test_what_is_no_matmul_by_a_matrix_of_weights_is_not(call: str) -> None:
    graph = parse(
        f"%x : bf16[32,32] = placeholder()\n%w : bf16[32,32] = @w\n"
        f"%v : bf16[32] = @v\n%y : bf16[32,32] = {call}\nreturn [%y]\n"
    )
    assert as_weight_matmul(named(graph, "y")) is None


def chain(layers: int, *, stream: bool = False) -> Graph:
    """A gate/up MLP and a choice a layer; `stream`: products and choices read the residual stream itself."""
    lines = ["%x0 : bf16[4,16] = placeholder()"]
    for i in range(layers):
        lines += [
            f"%scaled{i} : bf16[4,16] = aten." + (f"mul.Tensor(%x{i}, %x{i})" if stream else f"relu(%x{i})"),
            f"%gate{i} : bf16[16,16] = @gate{i}",
            f"%g{i} : bf16[4,16] = aten.linear(%scaled{i}, %gate{i})",
            f"%up{i} : bf16[16,16] = @up{i}",
            f"%u{i} : bf16[4,16] = aten.linear(%scaled{i}, %up{i})",
            f"%h{i} : bf16[4,16] = aten.mul.Tensor(%g{i}, %u{i})",
            f"%down{i} : bf16[16,16] = @down{i}",
            f"%d{i} : bf16[4,16] = aten.linear(%h{i}, %down{i})",
            f"%top{i} : (bf16[4,1], i64[4,1]) = aten.topk(%{'x' if stream else 'u'}{i}, 1)",
            f"%x{i + 1} : bf16[4,16] = aten.add.Tensor(%x{i}, %d{i})",
        ]
    return parse("\n".join([*lines, f"return [%x{layers}]"]))


def work(function: Callable[[], object]) -> int:
    """How many calls python makes: a count of visits that no clock disturbs."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def fused(graph: Graph) -> object:
    return list(fused_by_engines(graph, Frontiers(graph)))


def heads(graph: Graph) -> object:
    return head(graph, Frontiers(graph))


def chosen(graph: Graph) -> object:
    return routers(graph, Frontiers(graph))


def test_groups_of_a_deep_chain_are_found() -> None:
    graph = chain(2000)
    groups = [names(group) for kind, group in fused_by_engines(graph, Frontiers(graph)) if kind == "gate/up"]
    assert groups == [[f"g{i}", f"u{i}"] for i in range(2000)]


@pytest.mark.parametrize("stream", [False, True], ids=["after matmuls", "on the residual stream"])
@pytest.mark.parametrize("question", [fused, heads, chosen])
def test_twice_the_layers_is_twice_the_work(question: Callable[[Graph], object], stream: bool) -> None:
    small, large = chain(150, stream=stream), chain(300, stream=stream)
    assert work(lambda: question(large)) < 2.6 * work(lambda: question(small))
