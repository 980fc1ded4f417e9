"""Groups: linears that engines merge into one, routers, and the output head.

%q : bf16[8,64] = aten.linear(%x, %w_q)                q/k/v: one input, and they meet in an attention
%m : bf16[8,96] = aten.mul.Tensor(%silu_gate, %up)     gate/up: one input, and they meet in a product, element
                                                       by element, which a linear reads
%top : (f32[8,2], i64[8,2]) = aten.topk(%logits, 2)    a router: a choice is made by its result
"""

import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.structure.attention import attentions, latent_projection
from fxq.graph.structure.matmuls import Frontiers
from fxq.graph.structure.views import VIEWS, shape_of

_ATEN = torch.ops.aten
CHOICES = frozenset(
    {_ATEN.topk.default, _ATEN.argmax.default, _ATEN.sort.default, _ATEN.sort.stable, _ATEN.argsort.default}
)
# Functions of single elements that torch does not tag as such.
_UNTAGGED = frozenset({_ATEN.hardswish.default, _ATEN.log_sigmoid.default, _ATEN.dropout.default})


def is_choice(node: Node) -> bool:
    """Whether a node chooses the largest of what it is given: top-k, sort, argmax, max with its indices."""
    if node.target is _ATEN.max.dim:  # a choice only if its indices are used
        return any(u.target is operator.getitem and u.args[1] == 1 for u in node.users)
    return node.op == "call_function" and node.target in CHOICES


def routers(graph: Graph, frontiers: Frontiers) -> dict[Node, Node]:
    """Weight matmuls whose result is what a top-k (or sort, argmax, max with indices) chooses by -> that
    choice.

    %logits : bf16[8,4] = aten.linear(%x, %w)              {%logits: %top}
    %scores : f32[8,4] = aten.softmax.int(%logits, -1)
    %top : (f32[8,2], i64[8,2]) = aten.topk(%scores, 2)
    """
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if is_choice(node):
            for matmul in frontiers.of(node_at(node, 0)):
                found.setdefault(matmul, node)
    return found


def head(graph: Graph, frontiers: Frontiers) -> Node | None:
    """The single weight matmul that makes the model's output, or None.

    %logits : bf16[2,8,1024] = aten.linear(%normed, %lm_head)   this one
    return [%logits]
    """
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    found = frontiers.of(*output.all_input_nodes)
    return found[0] if len(found) == 1 else None


def fused_by_engines(graph: Graph, frontiers: Frontiers) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """Linears that serving engines merge into one: q/k/v of an attention (with a latent one level up: q_a
    and kv_a), and two that meet in a product, element by element, which a linear reads (gate and up).

    %gate : bf16[8,96] = aten.linear(%x, %w_gate)          ("gate/up", (%gate, %up))
    %up : bf16[8,96] = aten.linear(%x, %w_up)
    %silu : bf16[8,96] = aten.silu(%gate)
    %m : bf16[8,96] = aten.mul.Tensor(%silu, %up)
    %down : bf16[8,64] = aten.linear(%m, %w_down)
    """
    for attention in attentions(graph):
        operands = [attention.q, attention.k, attention.v]
        if latent_projection(frontiers, attention) is None:
            yield from _one_input("q/k/v", frontiers, [frontiers.of(operand) for operand in operands])
        else:
            yield from _latent_group(frontiers, operands)
    paired = {pair for x in frontiers.matmuls for pair in _read_alone(frontiers, x)}
    for node in graph.nodes:
        if node.target is _ATEN.mul.Tensor and all(isinstance(a, Node) for a in node.args[:2]):
            factors = [node_at(node, 0), node_at(node, 1)]
            sources = [frontiers.of(factor, most=1) for factor in factors]
            if frozenset(n for found in sources for n in found) in paired and all(
                shape_of(factor) == shape_of(node) and _keeps_elements(found[0], factor)
                for found, factor in zip(sources, factors, strict=True)
            ):
                yield from _one_input("gate/up", frontiers, sources)


def _read_alone(frontiers: Frontiers, matmul: Node) -> Iterator[frozenset[Node]]:
    """The two weight matmuls that alone make what another one reads, or one of the values joined there.

    %m : bf16[8,96] = aten.mul.Tensor(%silu, %up)     those of gate and up
    %d : bf16[8,64] = aten.linear(%m, %w_down)        of this one; an attention's output has three or more
    """
    x = frontiers.input_of(matmul)
    for piece in nodes_at(x, 0) if x.target is _ATEN.cat.default else [x]:
        if len(found := frontiers.of(piece, most=2)) == 2:
            yield frozenset(found)


def _keeps_elements(source: Node, node: Node) -> bool:
    """Whether each element of a node is a function of the element of `source` in its place, and of no other.

    %silu : bf16[8,96] = aten.silu(%gate)                        of %gate
    %taps : bf16[8,4,1,4] = aten.view(%gate, [8, 4, 1, 4])
    %both : bf16[8,4,24,4] = aten.add.Tensor(%static, %taps)     not of %gate: an element of it serves 24
    """
    above, queue = {node}, [] if node is source else [node]
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in above and n is not source]
        above.update(new)
        queue.extend(new)
    size, reached, queue = math.prod(shape_of(source)), {source}, [source]
    while queue:
        for user in queue.pop().users:
            if user in above and user not in reached:
                if math.prod(shape_of(user)) != size or not _is_elementwise(user):
                    return False
                reached.add(user)
                queue.append(user)
    return True


def _is_elementwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in VIEWS or node.target in _UNTAGGED


def _one_input(
    kind: str, frontiers: Frontiers, sources: Sequence[tuple[Node, ...]]
) -> Iterator[tuple[str, tuple[Node, ...]]]:
    if any(len(found) != 1 for found in sources):
        return
    group = tuple(dict.fromkeys(found[0] for found in sources))
    same_input = len({frontiers.input_of(node) for node in group}) == 1
    if len(group) > 1 and same_input and all(n.target is _ATEN.linear.default for n in group):
        yield kind, group


def _latent_group(frontiers: Frontiers, operands: Sequence[Node]) -> Iterator[tuple[str, tuple[Node, ...]]]:
    near = frontiers.of(*operands)
    far = frontiers.of(*(frontiers.matmuls[node].x for node in near))
    by_input: dict[Node, dict[Node, None]] = {}
    for node in dict.fromkeys((*near, *far)):
        by_input.setdefault(frontiers.input_of(node), {})[node] = None
    # Those that make the latent and the query's own latent read the block's input; no one else shares it.
    makers = {frontiers.input_of(node) for node in far if node in frontiers.of(*operands[1:])}
    for value, group in by_input.items():
        if value in makers and len(group) > 1:
            yield "q_a/kv_a", tuple(group)
