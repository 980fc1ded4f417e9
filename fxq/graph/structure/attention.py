"""Attentions: fused ones, and a softmax between two products of activations; latent ones (MLA).

%s : bf16[2,4,8,8] = aten.matmul(%q, %k_t)      queries by keys; scales, caps and masks may follow
%p : bf16[2,4,8,8] = aten.softmax.int(%s, -1)
%o : bf16[2,4,8,16] = aten.matmul(%p, %v)       Attention(node=%o, q=%q, k_at=(%s, 1), v_at=(%o, 1))
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxq.graph.arguments import node_at
from fxq.graph.structure.matmuls import Frontiers, as_weight_matmul
from fxq.graph.structure.views import VIEWS

_ATEN = torch.ops.aten
_SDPA = _ATEN.scaled_dot_product_attention.default
_SOFTMAXES = frozenset({_ATEN.softmax.int, _ATEN._softmax.default})
PRODUCTS = frozenset({_ATEN.matmul.default, _ATEN.bmm.default, _ATEN.baddbmm.default})
# What may lie between the product of queries and keys and its softmax, or between that and the values: masks,
# scales, caps, sinks (joined as a column and cut off again), dropout.
_BETWEEN = frozenset(
    {
        *VIEWS,
        _ATEN.add.Tensor,
        _ATEN.sub.Tensor,
        _ATEN.mul.Tensor,
        _ATEN.mul.Scalar,
        _ATEN.div.Tensor,
        _ATEN.div.Scalar,
        _ATEN.tanh.default,
        _ATEN.where.self,
        _ATEN.masked_fill.Scalar,
        _ATEN.masked_fill.Tensor,
        _ATEN.clamp.default,
        _ATEN.maximum.default,
        _ATEN.expand.default,
        _ATEN.slice.Tensor,
        _ATEN.cat.default,
        _ATEN.dropout.default,
        _ATEN.nan_to_num.default,
    }
)


@dataclass(frozen=True)
class Attention:
    """A softmax attention: `node` makes its output, keys and values enter at `(node, argument)` each.

    %o : bf16[2,4,8,16] = aten.scaled_dot_product_attention(%q, %k, %v)   k_at=(%o, 1), v_at=(%o, 2)
    """

    node: Node
    q: Node
    k_at: tuple[Node, int]
    v_at: tuple[Node, int]

    @property
    def k(self) -> Node:
        return node_at(*self.k_at)

    @property
    def v(self) -> Node:
        return node_at(*self.v_at)


def attentions(graph: Graph) -> Iterator[Attention]:
    """Every attention, in graph order: fused ones, and a softmax between two products of activations."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _SDPA:
            yield Attention(node, node_at(node, 0), (node, 1), (node, 2))
        elif node.target in _SOFTMAXES:
            scores, output = _nearest_product(node, up=True), _nearest_product(node, up=False)
            if scores is not None and output is not None:
                first, last = _operands(scores), _operands(output)
                yield Attention(output, node_at(scores, first[0]), (scores, first[1]), (output, last[1]))


def other_softmaxes(graph: Graph) -> Iterator[tuple[Node, str]]:
    """Every softmax that is no attention's, and why.

    %p : f32[8,4] = aten.softmax.int(%router_logits, -1)   "what it weighs is no product of two activations"
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _SOFTMAXES:
            if _nearest_product(node, up=True) is None:
                yield node, "what it weighs is no product of two activations"
            elif _nearest_product(node, up=False) is None:
                yield node, "its result multiplies no activations"


def _operands(product: Node) -> tuple[int, int]:
    """The argument positions of a product's two factors."""
    return (1, 2) if product.target is _ATEN.baddbmm.default else (0, 1)


def _nearest_product(softmax: Node, *, up: bool) -> Node | None:
    """The product of two activations that a softmax's input comes from, or that its result goes into."""
    seen, queue = {softmax}, deque(softmax.all_input_nodes if up else softmax.users)
    while queue:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS and as_weight_matmul(node) is None:
            return node
        if node.target in _BETWEEN:
            queue.extend(node.all_input_nodes if up else node.users)
    return None


def latent_projection(frontiers: Frontiers, attention: Attention) -> Node | None:
    """The matmul that expands a cached latent into keys and values (multi-head latent attention), or None.

    K and V share it, and what it reads is not what the queries are made from: engines cache its input.

    %latent : bf16[2,8,16] = aten.mul.Tensor(%norm, %kv_low)   kv_low: of kv_a_proj, with the queries' input
    %kv : bf16[2,8,192] = aten.linear(%latent, %kv_b)          this one; K and V are parts of its result
    """
    q, k, v = (frontiers.of(node) for node in (attention.q, attention.k, attention.v))
    shared = [node for node in k if node in v and node not in q]
    query_inputs = {frontiers.input_of(node) for node in q}
    found = [node for node in shared if frontiers.input_of(node) not in query_inputs]
    return found[0] if len(found) == 1 else None
