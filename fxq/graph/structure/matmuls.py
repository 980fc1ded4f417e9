"""Matmuls by a weight, and the nearest of them upstream of a node.

%y : bf16[8,64] = aten.linear(%x, %w)         WeightMatmul(node=%y, x=%x, w=%w, parameter=%w)
%g : bf16[8,64] = aten.silu(%y)
%z : bf16[8,64] = aten.mul.Tensor(%g, %u)     Frontiers.of(%z): %y and the matmuls behind %u
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import nodes_at
from fxq.graph.structure.views import VIEWS, root, shape_of, strip, value_of
from fxq.numbers.formats import FORMATS

_ATEN = torch.ops.aten
MATMULS = frozenset(
    {
        _ATEN.linear.default,
        _ATEN.matmul.default,
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN.einsum.default,
        _ATEN._grouped_mm.default,
        dialect.EXPERT_LINEAR,
    }
)
# An attention reads three projections, an indexer's choice about as many; more are a residual stream.
_MOST = 8


@dataclass(frozen=True)
class WeightMatmul:
    """A matmul one of whose operands is a parameter: `node(x, w)` with `parameter` the `@fqn` node behind
    `w`.

    %t : bf16[64,32] = aten.t(%p)
    %y : bf16[8,32] = aten.mm(%x, %t)   WeightMatmul(node=%y, x=%x, w=%t, parameter=%p)
    """

    node: Node
    x: Node
    w: Node
    parameter: Node


def weight_matmuls(graph: Graph) -> Iterator[WeightMatmul]:
    """Every matmul of an activation by a parameter of two or more dimensions."""
    for node in graph.nodes:
        if (found := as_weight_matmul(node)) is not None:
            yield found


def as_weight_matmul(node: Node) -> WeightMatmul | None:
    """The node as a WeightMatmul, or None."""
    if node.op != "call_function" or not (node.target in MATMULS or "grouped_mm" in str(node.target)):
        return None
    if node.target is _ATEN.einsum.default:
        operands = list(nodes_at(node, 1))
    else:
        operands = [a for a in node.args if isinstance(a, Node) and len(shape_of(a)) >= 2]
    weights = [(a, r) for a in operands if (r := root(a)) is not None and len(shape_of(r)) >= 2]
    others = [a for a in operands if root(a) is None]
    if not weights or not others:
        return None
    w, parameter = weights[0]
    return WeightMatmul(node, others[0], w, parameter)


def input_quantize(x: Node) -> Node | None:
    """The node that quantizes a linear's input on the way to it; None if only a cache upstream is.

    %x_q : bf16[2,8,64] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
    %flat : bf16[16,64] = aten.view(%x_q, [-1, 64])   input_quantize(%flat) is %x_q
    """
    x = strip(x, VIEWS)
    return x if quantizes_input(x) else None


def quantizes_input(node: Node) -> bool:
    """Whether a node quantizes what a linear reads; that of a weight or a cache chooses its scale otherwise.

    %x_q : bf16[8,64] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')   yes
    %w_q : bf16[64,64] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')      no
    """
    if node.target is not dialect.QUANTIZE:
        return False
    return node.kwargs["scale"] == FORMATS[str(node.kwargs["format"])].input_scale


class Frontiers:
    """The nearest weight matmuls upstream of a node, in graph order."""

    def __init__(self, graph: Graph) -> None:
        self.matmuls = {m.node: m for m in weight_matmuls(graph)}

    def of(self, *starts: Node, most: int = _MOST) -> tuple[Node, ...]:
        """The first weight matmuls met on each way up from `starts` (themselves included), nearest first.

        () if there are more than `most`: everything is upstream of a residual stream, which says nothing.
        """
        seen, found, queue = set(starts), dict[Node, None](), deque(starts)
        while queue:
            node = queue.popleft()
            if node in self.matmuls:
                found[node] = None
                if len(found) > most:
                    return ()
                continue
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            queue.extend(new)
        return tuple(found)

    def input_of(self, matmul: Node) -> Node:
        """What produced the activations that a weight matmul reads."""
        return value_of(self.matmuls[matmul].x)
