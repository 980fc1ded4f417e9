"""Views: what a value or a weight is behind operators that move numbers without changing them.

%t : bf16[32,64] = aten.t(%w)                 root(%t) is %w, swaps_matrix(%t)
%w_e3 : bf16[64,32] = fxq.slice(%experts, 3)  a pick: root(%w_e3) is the parameter behind %experts
%x_q : bf16[8,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')   value_of(%x_q) is %x
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.dialect import is_rounding, is_statistic

_ATEN = torch.ops.aten
VIEWS = frozenset(
    {
        _ATEN.view.default,
        _ATEN._unsafe_view.default,
        _ATEN.reshape.default,
        _ATEN.transpose.int,
        _ATEN.permute.default,
        _ATEN.t.default,
        _ATEN.squeeze.default,
        _ATEN.squeeze.dim,
        _ATEN.squeeze.dims,
        _ATEN.unsqueeze.default,
        _ATEN.clone.default,
        _ATEN.contiguous.default,
        _ATEN.alias.default,
        _ATEN.detach.default,
        _ATEN._to_copy.default,
        _ATEN.to.dtype,
        _ATEN.type_as.default,
        _ATEN.flatten.using_ints,
        _ATEN.unflatten.int,
    }
)
PICKS = frozenset({_ATEN.select.int, _ATEN.index.Tensor, _ATEN.slice.Tensor, dialect.SLICE})
# What leaves a weight where it lies in the checkpoint.
SAME_PLACE = VIEWS | {dialect.REWRITE}
_SAME_WEIGHT = SAME_PLACE | PICKS


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor at the example sizes; () if it has none."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def is_opaque_call(node: Node) -> bool:
    """Whether a trace left a call whole, so that nothing is known of its inside.

    %z : [bf16[4,32]] = fxq.opaque('module:layers.0.moe', [%x, %w], [], arguments='...')
    """
    return node.op == "call_function" and str(node.target) == "fxq.opaque.default"


def strip(node: Node, past: frozenset[object]) -> Node:
    """The node behind any chain of `past` operators (through their first argument)."""
    while node.op == "call_function" and node.target in past and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def swaps_matrix(view: Node) -> bool | None:
    """Whether one view swaps the last two dimensions and does nothing else; False if it leaves the matrix
    as it is, None if it does more.

    %a : bf16[4,32,64] = aten.transpose.int(%w, 1, 2)   True
    %b : bf16[4,64,32] = aten.clone(%w)                 False
    %c : bf16[4,2048] = aten.view(%w, [4, 2048])        None
    """
    before, after = shape_of(node_at(view, 0)), shape_of(view)
    if view.target in (_ATEN.t.default, _ATEN.numpy_T.default) and len(before) == 2:
        return True
    if view.target in (_ATEN.transpose.int, _ATEN.permute.default):
        order = list(range(len(before)))
        if view.target is _ATEN.permute.default:
            order = [int(d) % len(before) for d in view.args[1]]  # type: ignore[union-attr, arg-type]
        else:
            a, b = int_at(view, 1) % len(before), int_at(view, 2) % len(before)
            order[a], order[b] = order[b], order[a]
        plain = list(range(len(before)))
        turned = [*plain[:-2], *reversed(plain[-2:])]
        return None if order not in (plain, turned) else order != plain
    # Row-major views keep rows as long as the last dimension stays.
    return False if before[-1:] == after[-1:] else None


def value_of(node: Node) -> Node:
    """The node that produced these numbers: views, casts and roundings are looked through."""
    while node.op == "call_function" and (node.target in VIEWS or is_rounding(node)):
        node = node_at(node, 0)
    return node


def weight_of(node: Node) -> Node:
    """The parameter, or the pick or stack of one, that a weight operand is, behind views, roundings and
    rewrites.

    %w_e3 : bf16[64,32] = fxq.slice(%w, 3)            of %w_e3_q: %w_e3
    %w_e3_new : bf16[64,32] = fxq.rewrite(%w_e3, %scaled)
    %w_e3_q : bf16[64,32] = fxq.quantize(%w_e3_new, %w_e3_amax, format='nvfp4', scale='max')
    """
    while node.op == "call_function" and (node.target in SAME_PLACE or is_rounding(node)):
        node = node_at(node, 0)
    return node


def is_on_weight_path(node: Node) -> bool:
    """Whether a node is a view, pick, stack, rounding or rewrite of its (first) operand."""
    return node.target in _SAME_WEIGHT or node.target is dialect.STACK or is_rounding(node)


def weight_path(node: Node) -> Iterator[Node]:
    """The nodes from a weight operand down to what it is a view, pick, stack, rounding, rewrite or choice of.

    %w_e0 : bf16[64,32] = fxq.slice(%w, 0)                 of %w_q: %w_q, %w_e0_q, %w_e0, %w
    %w_e0_q : bf16[64,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
    %w_q : bf16[4,64,32] = fxq.stack([%w_e0_q, %w_e1_q, %w_e2_q, %w_e3_q])
    """
    while True:
        yield node
        if node.target in (dialect.STACK, dialect.CHOOSE):
            node = nodes_at(node, 0)[0]
        elif is_on_weight_path(node) and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            return


def varying(graph: Graph) -> set[Node]:
    """The nodes whose values differ by batch: all that depends on an input other than through a statistic."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            not is_statistic(node) and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def of_the_model(graph: Graph) -> set[Node]:
    """The nodes that the output is computed by; not those that only decide how weights are rounded or
    rewritten."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found:
            stands = node.target is dialect.REWRITE or is_rounding(node)
            found.update([node_at(node, 0)] if stands else node.all_input_nodes)
            found.add(node)
    return found


def statistics(graph: Graph) -> list[Node]:
    """The statistics of activations, which calibration data decides; those of weights follow from them."""
    varies = varying(graph)
    return [n for n in graph.nodes if is_statistic(n) and any(s in varies for s in n.all_input_nodes)]


def is_quantized(w: Node) -> bool:
    """Whether a weight operand is a rounding, or a stack of which the first slice is one."""
    w = strip(w, VIEWS)
    return is_rounding(strip(nodes_at(w, 0)[0], VIEWS) if w.target is dialect.STACK else w)


def root(node: Node) -> Node | None:
    """The parameter behind a weight operand, through views, picks, stacks, roundings and rewrites; None for
    an activation."""
    *_, last = weight_path(node)
    return last if last.op == "get_attr" else None


def parameter_name(node: Node) -> str:
    """The model's name of the parameter behind a weight operand."""
    parameter = root(node)
    assert parameter is not None, f"%{node.name} is no weight"
    return str(parameter.target)
