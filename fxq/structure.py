"""What the data flow of a model says about its parameters: who multiplies what, what feeds a choice, what meets where.

Nothing here reads a name. Walks are memoised, so that each question is linear in the size of the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxq import dialect

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
# Repeating a value (grouped-query attention) does not change what it holds.
REPEATS = frozenset({_ATEN.expand.default, _ATEN.repeat_interleave.self_int})
PICKS = frozenset({_ATEN.select.int, _ATEN.index.Tensor, _ATEN.slice.Tensor, dialect.SLICE})
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
ATTENTIONS = frozenset({_ATEN.scaled_dot_product_attention.default})
CHOICES = frozenset(
    {_ATEN.topk.default, _ATEN.argmax.default, _ATEN.sort.default, _ATEN.sort.stable, _ATEN.argsort.default}
)


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor at the example sizes; () if it has none."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def strip(node: Node, past: frozenset[object]) -> Node:
    """The node behind any chain of `past` operators (through their first argument)."""
    while node.op == "call_function" and node.target in past and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def value_of(node: Node) -> Node:
    """The node that produced these numbers: views, casts and fake-quantization are looked through."""
    return strip(node, VIEWS | {dialect.QUANTIZE})


def root(node: Node) -> Node | None:
    """The parameter behind a weight operand, through views, picks, quantize and stack; None for an activation."""
    while True:
        node = strip(node, VIEWS | PICKS | {dialect.QUANTIZE})
        if node.target is dialect.STACK:
            node = node.args[0][0]  # type: ignore[index, assignment]
            continue
        return node if node.op == "get_attr" else None


@dataclass(frozen=True)
class WeightMatmul:
    """A matmul one of whose operands is a parameter: `node(x, w)` with `parameter` the `@fqn` node behind `w`."""

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
    operands = [a for a in node.args if isinstance(a, Node) and len(shape_of(a)) >= 2]
    if node.target is _ATEN.einsum.default:
        operands = [a for a in node.args[1] if isinstance(a, Node)]  # type: ignore[union-attr]
    weights = [(a, r) for a in operands if (r := root(a)) is not None and len(shape_of(r)) >= 2]
    others = [a for a in operands if root(a) is None]
    if not weights or not others:
        return None
    w, parameter = weights[0]
    return WeightMatmul(node, others[0], w, parameter)


class Frontiers:
    """The nearest weight matmuls upstream of a node, in graph order."""

    def __init__(self, graph: Graph) -> None:
        self.matmuls = {m.node: m for m in weight_matmuls(graph)}

    def of(self, *starts: Node) -> tuple[Node, ...]:
        seen, found, stack = set(starts), dict[Node, None](), list(reversed(starts))
        while stack:
            node = stack.pop()
            if node in self.matmuls:
                found[node] = None
                continue
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            stack.extend(reversed(new))
        return tuple(found)


def routers(graph: Graph, frontiers: Frontiers) -> dict[Node, Node]:
    """Weight matmuls whose result is what a top-k (or sort, argmax) chooses by -> that choice."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in CHOICES and isinstance(node.args[0], Node):
            for matmul in frontiers.of(node.args[0]):
                found.setdefault(matmul, node)
    return found


def head(graph: Graph, frontiers: Frontiers) -> Node | None:
    """The single weight matmul that makes the model's output, or None."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    found = frontiers.of(*output.all_input_nodes)
    return found[0] if len(found) == 1 else None


def fused_by_engines(graph: Graph, frontiers: Frontiers) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """Linears that serving engines merge into one: q/k/v of an attention, and two that meet in a product (gate, up)."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in ATTENTIONS:
            yield from _one_input("q/k/v", frontiers, node.args[:3])
        elif node.target is _ATEN.mul.Tensor and all(isinstance(a, Node) for a in node.args[:2]):
            if shape_of(node.args[0]) == shape_of(node.args[1]):  # type: ignore[arg-type]
                yield from _one_input("gate/up", frontiers, node.args[:2])


def _one_input(kind: str, frontiers: Frontiers, operands: object) -> Iterator[tuple[str, tuple[Node, ...]]]:
    sources = [frontiers.of(node) for node in operands]  # type: ignore[attr-defined]
    if any(len(found) != 1 for found in sources):
        return
    group = tuple(dict.fromkeys(found[0] for found in sources))
    same_input = len({value_of(frontiers.matmuls[node].x) for node in group}) == 1
    if len(group) > 1 and same_input and all(n.target is _ATEN.linear.default for n in group):
        yield kind, group
