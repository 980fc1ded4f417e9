"""Work: what nodes of a graph cost to run, in multiplications and what takes as long; progress counts it."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.dialect import is_rounding, is_statistic
from fxq.graph.structure.views import root, shape_of, varying

# Is told how much was done since it was last called.
Step = Callable[[int], None]
# What a value takes in multiplications of a matmul, of which two CPU cores do 200 in a nanosecond: 17 ns to
# search its block's scale and pack it, half a nanosecond to be read, changed and put back.
ROUNDED, MOVED = 3400, 100
_ATEN = torch.ops.aten
_MATMULS = (
    _ATEN.linear.default,
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN.matmul.default,
    dialect.EXPERT_LINEAR,
)
_GRAMS = (dialect.GRAM, dialect.EXPERT_GRAM, dialect.SPLIT_GRAM, dialect.EXPERT_SPLIT_GRAM)


def no_step(done: int) -> None:
    """Shows nothing."""


def work(node: Node) -> int:
    """What one node costs at the sizes that the graph's types have."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, Tensor):
        return 0
    if node.target in _MATMULS:
        return val.numel() * shape_of(node_at(node, 0))[-1]
    if node.target in _GRAMS:
        x = node_at(node, 0).meta["val"]
        return int(x.numel() * x.shape[-1])
    return val.numel() * (ROUNDED if _rounds_weight(node) else MOVED)


def _rounds_weight(node: Node) -> bool:
    return is_rounding(node) and root(node_at(node, 0)) is not None


def total(
    graph: Graph,
    batches: Sequence[Tensor],
    wanted: Collection[Node] | None = None,
    *,
    rounds: bool = True,
) -> int:
    """What a graph costs over batches int64 [B, S].

    wanted: only what these nodes need. rounds: whether weights are rounded.
    """
    needed = set(graph.nodes if wanted is None else wanted)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    varies, tokens = varying(graph), sum(batch.numel() for batch in batches)
    example, done = example_tokens(graph), 0
    for node in needed:
        if not rounds and _rounds_weight(node):
            continue
        is_of_batches = node in varies or (is_statistic(node) and node_at(node, 0) in varies)
        done += work(node) * tokens // example if is_of_batches else work(node)
    return done


def example_tokens(graph: Graph) -> int:
    """How many tokens the types of a graph are those of."""
    return next((n.meta["val"].numel() for n in graph.nodes if n.op == "placeholder"), 1)
