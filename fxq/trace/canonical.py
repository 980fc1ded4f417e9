"""Canonical form of a traced graph: a matmul by a matrix of weights is `aten.linear(x, w [out, in])`.

It can be written in many ways; passes then know one operator. `F.linear` runs the same kernels on the same
strides, so results keep their bits.
"""

import torch
from torch.fx import Graph, Node

from fxq.graph import edit
from fxq.graph.arguments import node_at
from fxq.graph.structure.views import root, shape_of

aten = torch.ops.aten


def linears(graph: Graph) -> None:
    """Rewrite `x @ w`, `mm(x, w)`, `addmm(bias, x, w)`, w a weight [in, out], as `linear(x, w.t(), bias)`."""
    for node in list(graph.nodes):
        operands = _operands(node)
        if operands is not None:
            x, w, bias = operands
            args = (x, edit.transposed(w)) if bias is None else (x, edit.transposed(w), bias)
            edit.replace(node, edit.call(graph, f"{node.name}_linear", aten.linear.default, *args))
    edit.tidy(graph)


def _operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(x, w [in, out], bias) of a matmul by a 2-D weight that is no `linear` yet."""
    if node.target in (aten.mm.default, aten.matmul.default):
        x, w, bias = node_at(node, 0), node_at(node, 1), None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, w = (node_at(node, i) for i in range(3))
        if len(shape_of(bias)) != 1:
            return None
    else:
        return None
    is_weight = root(w) is not None and len(shape_of(w)) == 2 and root(x) is None and len(shape_of(x)) > 1
    return (x, w, bias) if is_weight else None
