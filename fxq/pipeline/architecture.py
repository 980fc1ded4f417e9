"""Architecture: what a graph computes once every rounding and rewrite gives way to what it stands for.

A checkpoint is loaded into the model's own class, so passes may round and rewrite weights, and nothing else:

    %w_q : bf16[64,64] = fxq.quantize(%w, %w_amax, format='nvfp4', scale='max')
    %y : bf16[8,64] = aten.linear(%x, %w_q)         stands for aten.linear(%x, %w)
    %s : bf16[8,64,32] = fxq.stack([%e0_q, ...])    of all slices of %w in order: stands for %w
    %half : bf16[64] = aten.mul.Tensor(%norm, 0.5)  what reads it would compute something else
    %new : bf16[64] = fxq.rewrite(%norm, %half)     stands for %norm, and is written under its name
    %c : bf16[64,64] = fxq.choose([%w_q, %w], %i)   of values that stand for one: stands for it
"""

from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.structure.views import shape_of
from fxq.graph.text import format_argument, format_target

# Node -> (op, target, arguments, named arguments) without roundings.
Architecture = dict[Node, tuple[str, Any, Any, Any]]


def architecture(graph: Graph) -> Architecture:
    """The nodes that the graph's output needs, with what each reads, when roundings and rewrites give way."""
    without: dict[Node, Node] = {}
    for node in graph.nodes:
        without[node] = _unrounded(node, without)
    needed: set[Node] = set()
    found: Architecture = {}
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            args, kwargs = map_arg((node.args, node.kwargs), without.__getitem__)
            found[node] = node.op, node.target, args, kwargs
            needed.update(without[source] for source in node.all_input_nodes)
    return dict(reversed(found.items()))


def difference(before: Architecture, after: Architecture) -> str | None:
    """The first line of two architectures that differs; None if they are one."""
    for node, line in after.items():
        if before.get(node) != line:
            was = f"; it was `{_line(node, before[node])}`" if node in before else ""
            return f"`{_line(node, line)}`{was}"
    gone = next((node for node in before if node not in after), None)
    return f"`{_line(gone, before[gone])}` is gone" if gone is not None else None


def _unrounded(node: Node, without: dict[Node, Node]) -> Node:
    """What a node stands for: itself, unless it rounds, rewrites, chooses between such, or stacks all slices
    of a weight again."""
    if node.target is dialect.REWRITE or is_rounding(node):
        return without[node_at(node, 0)]
    if node.target is dialect.CHOOSE:
        stands = {without[value] for value in nodes_at(node, 0)}
        return stands.pop() if len(stands) == 1 else node
    if node.target is dialect.STACK:
        slices = [without[piece] for piece in nodes_at(node, 0)]
        weights = {node_at(piece, 0) for piece in slices if piece.target is dialect.SLICE}
        if len(weights) == 1 and all(piece.target is dialect.SLICE for piece in slices):
            (w,) = weights
            if [int_at(piece, 1) for piece in slices] == list(range(shape_of(w)[0])):
                return without[w]
    return node


def _line(node: Node, line: tuple[str, Any, Any, Any]) -> str:
    op, target, args, kwargs = line
    if op != "call_function":
        kinds = {"placeholder": f"%{node.name} = placeholder()", "get_attr": f"%{node.name} = @{target}"}
        return kinds.get(op) or f"return {format_argument(args[0])}"
    arguments = [format_argument(a) for a in args]
    arguments += [f"{name}={format_argument(value)}" for name, value in kwargs.items()]
    return f"%{node.name} = {format_target(target)}({', '.join(arguments)})"
