"""What the data flow of a model says about its parameters: who multiplies what, what feeds a choice, what
meets where.

Nothing here reads a name. Walks stop at the nearest matmul, so that each question is linear in the size of
the graph.
"""

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxq import dialect
from fxq.nodes import int_at, node_at, nodes_at

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
_SAME_VALUE = VIEWS | {dialect.QUANTIZE}
_SAME_WEIGHT = _SAME_VALUE | PICKS
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
_SDPA = _ATEN.scaled_dot_product_attention.default
_SOFTMAXES = frozenset({_ATEN.softmax.int, _ATEN._softmax.default})
_PRODUCTS = frozenset({_ATEN.matmul.default, _ATEN.bmm.default, _ATEN.baddbmm.default})
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
_REPEATS = frozenset(
    {
        _ATEN.expand.default,
        _ATEN.repeat.default,
        _ATEN.repeat_interleave.self_int,
        _ATEN.broadcast_to.default,
    }
)
# What sends tokens to where other activations say.
_ROUTES = frozenset(
    {
        _ATEN.index.Tensor,
        _ATEN.index_select.default,
        _ATEN.gather.default,
        _ATEN.scatter.src,
        _ATEN.scatter_add.default,
        _ATEN.index_add.default,
        _ATEN.index_put.default,
        _ATEN.index_copy.default,
    }
)
CHOICES = frozenset(
    {_ATEN.topk.default, _ATEN.argmax.default, _ATEN.sort.default, _ATEN.sort.stable, _ATEN.argsort.default}
)


# An attention reads three projections, an indexer's choice about as many; more are a residual stream.
_MOST = 8


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor at the example sizes; () if it has none."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def strip(node: Node, past: frozenset[object]) -> Node:
    """The node behind any chain of `past` operators (through their first argument)."""
    while node.op == "call_function" and node.target in past and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def swaps_matrix(view: Node) -> bool | None:
    """Whether one view swaps the last two dimensions and does nothing else; False if it leaves the matrix
    as it is, None if it does more."""
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
    return strip(node, _SAME_VALUE)


def input_quantize(x: Node) -> Node | None:
    """The node that quantizes a linear's input on the way to it; None if only a cache upstream is."""
    x = strip(x, VIEWS)
    return x if x.target is dialect.QUANTIZE and x.kwargs["scale"] in dialect.INPUT_SCALES.values() else None


def _weight_path(node: Node) -> Iterator[Node]:
    """The nodes from a weight operand down to what it is a view, pick, stack or fake-quantization of."""
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
    *_, last = _weight_path(node)
    return last if last.op == "get_attr" else None


def parameter_name(node: Node) -> str:
    """The model's name of the parameter behind a weight operand."""
    parameter = root(node)
    assert parameter is not None, f"%{node.name} is no weight"
    return str(parameter.target)


def is_expert(node: Node) -> bool:
    """True for a weight operand that is, or was picked from, a stack of matrices [E, ., .]."""
    return any(len(shape_of(step)) == 3 for step in _weight_path(node))


@dataclass(frozen=True)
class WeightMatmul:
    """A matmul one of whose operands is a parameter: `node(x, w)` with `parameter` the `@fqn` node behind
    `w`."""

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


def multiplies_experts(matmul: WeightMatmul) -> bool:
    """Whether a matmul by a stack of matrices is one by experts: a matrix is picked for each token, or all of
    them see the same tokens.

    A stack whose matrices each see features of their own is block-diagonal, and one whose first dimension is
    summed over is a linear by heads: neither is experts.
    """
    if not is_expert(matmul.w):
        return False
    steps = list(_weight_path(matmul.w))
    if any(step.target in PICKS | {dialect.STACK} for step in steps):
        return True
    if matmul.node.target is _ATEN.einsum.default:
        return _einsum_shares_tokens(matmul)
    if "grouped_mm" in str(matmul.node.target) or matmul.node.target is dialect.EXPERT_LINEAR:
        return True
    copies = shape_of(steps[-1])[0]
    shape = shape_of(matmul.w)
    return copies not in shape[:-2] or _is_repeated(matmul.x, copies, shape.index(copies) - len(shape))


def _einsum_shares_tokens(matmul: WeightMatmul) -> bool:
    equation, operands = str(matmul.node.args[0]).replace(" ", ""), list(nodes_at(matmul.node, 1))
    terms, _, result = equation.partition("->")
    stack, *matrix = list(terms.split(",")[operands.index(matmul.w)])
    others = "".join(t for i, t in enumerate(terms.split(",")) if operands[i] is not matmul.w)
    # With no rows of its own, a "matrix" is one row of a linear whose input has several dimensions.
    has_rows = any(letter in result and letter not in others for letter in matrix)
    return stack in result and stack not in others and has_rows


def _is_repeated(x: Node, copies: int, dim: int) -> bool:
    """Whether activations, with `copies` of them in dimension `dim` < 0, are the same tokens for each matrix,
    tokens dispatched to it, or made by experts."""
    shape = shape_of(x)
    if len(shape) < -dim or shape[dim] != copies:
        return True
    seen, queue = {x}, deque([x])
    while queue:
        node = queue.popleft()
        if node.target in _REPEATS | _ROUTES:
            return True
        matmul = as_weight_matmul(node)
        if matmul is not None:
            if multiplies_experts(matmul):
                return True
            continue
        if node.target in _PRODUCTS | {_ATEN.einsum.default}:  # of tokens by a dispatch mask
            return True
        new = [n for n in node.all_input_nodes if n not in seen and not isinstance(n.meta["val"], int)]
        seen.update(new)
        queue.extend(new)
    return False


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


def _is_choice(node: Node) -> bool:
    if node.target is _ATEN.max.dim:  # a choice only if its indices are used
        return any(u.target is operator.getitem and u.args[1] == 1 for u in node.users)
    return node.op == "call_function" and node.target in CHOICES


def routers(graph: Graph, frontiers: Frontiers) -> dict[Node, Node]:
    """Weight matmuls whose result is what a top-k (or sort, argmax, max with indices) chooses by -> that
    choice."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if _is_choice(node):
            for matmul in frontiers.of(node_at(node, 0)):
                found.setdefault(matmul, node)
    return found


def head(graph: Graph, frontiers: Frontiers) -> Node | None:
    """The single weight matmul that makes the model's output, or None."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    found = frontiers.of(*output.all_input_nodes)
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Attention:
    """A softmax attention: `node` makes its output, keys and values enter at `(node, argument)` each."""

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
    """Every softmax that is no attention's, and why."""
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
        if node.target in _PRODUCTS and as_weight_matmul(node) is None:
            return node
        if node.target in _BETWEEN:
            queue.extend(node.all_input_nodes if up else node.users)
    return None


def latent_projection(frontiers: Frontiers, attention: Attention) -> Node | None:
    """The matmul that expands a cached latent into keys and values (multi-head latent attention), or None.

    K and V share it, and what it reads is not what the queries are made from: engines cache its input.
    """
    q, k, v = (frontiers.of(node) for node in (attention.q, attention.k, attention.v))
    shared = [node for node in k if node in v and node not in q]
    query_inputs = {frontiers.input_of(node) for node in q}
    found = [node for node in shared if frontiers.input_of(node) not in query_inputs]
    return found[0] if len(found) == 1 else None


def fused_by_engines(graph: Graph, frontiers: Frontiers) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """Linears that serving engines merge into one: q/k/v of an attention (with a latent one level up: q_a
    and kv_a), and two that meet in a product (gate and up)."""
    for attention in attentions(graph):
        operands = [attention.q, attention.k, attention.v]
        if latent_projection(frontiers, attention) is None:
            yield from _one_input("q/k/v", frontiers, [frontiers.of(operand) for operand in operands])
        else:
            yield from _latent_group(frontiers, operands)
    for node in graph.nodes:
        if node.target is _ATEN.mul.Tensor and all(isinstance(a, Node) for a in node.args[:2]):
            a, b = node_at(node, 0), node_at(node, 1)
            if shape_of(a) == shape_of(b):
                yield from _one_input(
                    "gate/up", frontiers, [frontiers.of(a, most=1), frontiers.of(b, most=1)]
                )


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
