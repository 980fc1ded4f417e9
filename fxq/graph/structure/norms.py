"""Norms: vectors of parameters that scale activations, as the model reads them.

%g : bf16[64] = @norm.weight
%g_new : bf16[64] = fxq.rewrite(%g, %divided)
%y : bf16[8,64] = aten.mul.Tensor(%g_new, %x)      norm_weights: %g_new, read by %y
"""

from collections.abc import Container

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.structure.views import VIEWS, of_the_model, shape_of, varying

_ATEN = torch.ops.aten
_SCALES = frozenset({_ATEN.mul.Tensor, _ATEN.layer_norm.default, _ATEN.rms_norm.default})


def norm_weights(graph: Graph, constants: Container[object]) -> dict[Node, list[Node]]:
    """Vector of parameters, or its last rewrite -> what reads it; those that do nothing but scale
    activations, maybe cast or with 1 added before, or that are the weight or bias of a norm's call."""
    model, varies = of_the_model(graph), varying(graph)
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in constants or len(shape_of(node)) != 1:
            continue
        while rewrite := _rewrite(node):
            node = rewrite
        readers = [user for user in node.users if user in model]
        if readers and node.meta["val"].is_floating_point() and _scales(node, model, varies):
            found[node] = readers
    return found


def _rewrite(node: Node) -> Node | None:
    rewrites = (u for u in node.users if u.target is dialect.REWRITE and node_at(u, 0) is node)
    return next(rewrites, None)


def _scales(node: Node, model: Container[Node], varies: Container[Node]) -> bool:
    """Whether all of the model that reads a vector scales activations by it."""
    for user in (user for user in node.users if user in model):
        is_one_more = user.target is _ATEN.add.Tensor and user.args[1] == 1
        passes = (user.target in VIEWS or is_one_more) and user not in varies
        if not (_scales(user, model, varies) if passes else user.target in _SCALES and user in varies):
            return False
    return True
