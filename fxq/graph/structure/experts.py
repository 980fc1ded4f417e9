"""Experts: stacks of matrices of which each token multiplies the one that was picked for it.

%p : bf16[8,64,32] = aten.index.Tensor(%w, [%ids])   a matrix a token, picked from w [E, out, in]
%y : bf16[8,64,1] = aten.bmm(%p, %x)                 multiplies_experts: yes
%z : bf16[3,8,16] = aten.bmm(%blocks, %v)            3 matrices, each for features of its own: no
"""

import operator
from collections import deque

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.structure.attention import PRODUCTS
from fxq.graph.structure.groups import is_choice
from fxq.graph.structure.matmuls import Frontiers, WeightMatmul, as_weight_matmul
from fxq.graph.structure.views import PICKS, shape_of, value_of, weight_path

_ATEN = torch.ops.aten
_REPEATS = frozenset(
    {
        _ATEN.expand.default,
        _ATEN.repeat.default,
        _ATEN.repeat_interleave.self_int,
        _ATEN.broadcast_to.default,
    }
)
# What takes some of all tokens.
PICKED = frozenset({_ATEN.index.Tensor, _ATEN.index_select.default})
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


def is_expert(node: Node) -> bool:
    """True for a weight operand that is, or was picked from, a stack of matrices [E, ., .].

    %w_e3 : bf16[64,32] = fxq.slice(%w, 3)   yes, w is bf16[16,64,32]
    """
    return any(len(shape_of(step)) == 3 for step in weight_path(node))


def multiplies_experts(matmul: WeightMatmul) -> bool:
    """Whether a matmul by a stack of matrices is one by experts: a matrix is picked for each token, or all of
    them see the same tokens.

    A stack whose matrices each see features of their own is block-diagonal, and one whose first dimension is
    summed over is a linear by heads: neither is experts.

    %x : bf16[4,8,32] = aten.expand(%tokens, [4, -1, -1])
    %y : bf16[4,8,64] = aten.bmm(%x, %w)   yes: 4 matrices, which all see the same 8 tokens
    """
    if not is_expert(matmul.w):
        return False
    steps = list(weight_path(matmul.w))
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
        if node.target in PRODUCTS | {_ATEN.einsum.default}:  # of tokens by a dispatch mask
            return True
        new = [n for n in node.all_input_nodes if n not in seen and not isinstance(n.meta["val"], int)]
        seen.update(new)
        queue.extend(new)
    return False


def expert_lists(graph: Graph, *, routed: bool = False) -> list[list[WeightMatmul]]:
    """Experts that are linears of their own, those together that do the same in one layer: with tokens picked
    from one value, or with what such experts make of them.

    routed: only those whose tokens a choice (a router's) picked, and not a mask of the model's input, say.

    %x3 : bf16[2,32] = aten.index.Tensor(%h, [%ids3])   together with %x4, picked from %h for expert 4
    %y3 : bf16[2,64] = aten.linear(%x3, %gate3)
    """
    frontiers = Frontiers(graph)
    numbers: dict[object, int] = {}  # where tokens come from and what they multiply -> a number
    of: dict[Node, int] = {}  # matmul -> that number
    together: dict[int, list[WeightMatmul]] = {}
    for node, matmul in frontiers.matmuls.items():
        x = value_of(matmul.x)
        made = frontiers.of(x)
        if (pick := _pick(x)) is not None and ((x.target in PICKED and not routed) or _is_chosen(pick)):
            key: object = (value_of(node_at(pick, 0)), shape_of(matmul.w))
        elif made and all(other in of for other in made):
            key = (frozenset(of[other] for other in made), shape_of(matmul.w))
        else:
            continue
        of[node] = numbers.setdefault(key, len(numbers))
        together.setdefault(of[node], []).append(matmul)
    return [group for group in together.values() if len({value_of(m.x) for m in group}) > 1]


def _pick(x: Node) -> Node | None:
    """The node that takes some of all tokens, if that is what a value is: by their numbers, or a piece of
    those that were sorted.

    %p : (bf16[u0,32], bf16[u1,32]) = aten.split_with_sizes(%sorted, [%u0, %u1])
    %x1 : bf16[u1,32] = operator.getitem(%p, 1)          %p
    """
    if x.target is operator.getitem and node_at(x, 0).target is _ATEN.split_with_sizes.default:
        return node_at(x, 0)
    return x if x.target in PICKED or x.target is _ATEN.slice.Tensor else None


def _is_chosen(pick: Node) -> bool:
    """Whether which tokens are picked follows from a choice among the results of a matmul."""
    seen, queue = set[Node](), deque(n for n in pick.all_input_nodes if n is not pick.args[0])
    while queue:
        node = queue.popleft()
        if is_choice(node):
            return True
        if node not in seen and as_weight_matmul(node) is None:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False
