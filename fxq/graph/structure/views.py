"""Views: what a value or a weight is behind operators that move numbers without changing them.

%t : bf16[32,64] = aten.t(%w)                 root(%t) is %w, swaps_matrix(%t)
%w_e3 : bf16[64,32] = fxq.slice(%experts, 3)  a pick: root(%w_e3) is the parameter behind %experts
%x_q : bf16[8,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')   value_of(%x_q) is %x
"""

from collections.abc import Iterator

import torch
from torch.fx import Node

from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at, nodes_at

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
SAME_VALUE = VIEWS | {dialect.QUANTIZE}
_SAME_WEIGHT = SAME_VALUE | PICKS


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
    """The node that produced these numbers: views, casts and fake-quantization are looked through."""
    return strip(node, SAME_VALUE)


def weight_path(node: Node) -> Iterator[Node]:
    """The nodes from a weight operand down to what it is a view, pick, stack or fake-quantization of.

    %w_e0 : bf16[64,32] = fxq.slice(%w, 0)                 of %w_q: %w_q, %w_e0_q, %w_e0, %w
    %w_e0_q : bf16[64,32] = fxq.quantize(%w_e0, %w_e0_amax, format='nvfp4', scale='max')
    %w_q : bf16[4,64,32] = fxq.stack([%w_e0_q, %w_e1_q, %w_e2_q, %w_e3_q])
    """
    while True:
        yield node
        if node.target is dialect.STACK:
            node = nodes_at(node, 0)[0]
        elif node.op == "call_function" and node.target in _SAME_WEIGHT and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            return


def root(node: Node) -> Node | None:
    """The parameter behind a weight operand, through views, picks, quantize and stack; None for an
    activation."""
    *_, last = weight_path(node)
    return last if last.op == "get_attr" else None


def parameter_name(node: Node) -> str:
    """The model's name of the parameter behind a weight operand."""
    parameter = root(node)
    assert parameter is not None, f"%{node.name} is no weight"
    return str(parameter.target)
