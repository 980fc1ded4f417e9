"""Inputs: what quantized weights multiply, and the statistics of it that decide how these are rounded.

%x_q : bf16[8,64] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%y : bf16[8,32] = aten.linear(%x_q, %w_q)               Reader(x=%x_q, before=%x, roundings=[%w_q])
%z : bf16[9,32] = fxq.expert_linear(%x_q, %e_q, %ids)   with %e_q = fxq.stack([...]): a rounding an expert
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.structure.matmuls import input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, shape_of, strip


@dataclass(frozen=True)
class Reader:
    """A matmul by quantized weights. x: what it multiplies, rows [..., K], rounded if inputs are. before: x
    unrounded. w: its weight, a rounding or a stack of them. roundings: of its weight, or of each expert's.
    ids: int [T], the expert of each row, or None."""

    node: Node
    x: Node
    before: Node
    w: Node
    roundings: tuple[Node, ...]
    ids: Node | None


def readers(graph: Graph) -> Iterator[Reader]:
    """Every matmul by quantized weights whose inputs are rows."""
    for matmul in list(weight_matmuls(graph)):
        w = strip(matmul.w, VIEWS)
        roundings = nodes_at(w, 0) if w.target is dialect.STACK else [w]
        if not all(map(is_rounding, roundings)):
            continue
        quantize = input_quantize(matmul.x)
        x = matmul.x if quantize is None else quantize
        before = x if quantize is None else node_at(quantize, 0)
        ids = node_at(matmul.node, 2) if matmul.node.target is dialect.EXPERT_LINEAR else None
        if shape_of(x)[-1] == shape_of(roundings[0])[-1]:
            yield Reader(matmul.node, x, before, w, tuple(roundings), ids)


def _shrunk(sums: torch.Tensor, tokens: torch.Tensor, *, by: int) -> torch.Tensor:
    shape = (-1, *([1] * (sums.dim() - 1)))
    mean = sums.sum(0) / tokens.sum().clamp_min(1)
    return sums.add(mean, alpha=by).div_((tokens + by).view(shape))


# Of sums over each expert's tokens [experts, ...], of so many tokens int64 [experts], means a token, in which
# `by` tokens of the mean of all experts count as each one's own.
SHRUNK = dialect.operator(
    "shrunk(Tensor sums, Tensor tokens, *, int by) -> Tensor",
    run=_shrunk,
    shape=lambda sums, tokens, *, by: dialect.tensor_type(sums.shape, sums.dtype),
    rules=(
        (
            lambda n: dialect.shape_at(n, 1) == (dialect.shape_at(n, 0) or (0,))[:1],
            "expected a number of tokens for each expert's sums",
        ),
        (lambda n: int(str(n.kwargs["by"])) >= 0, "expected `by` of 0 tokens or more"),
    ),
)
# Tokens of its layer that an expert is given beside its own (docs/choosing.md has what it brings).
SHRINKAGE = 64


class InputStatistics:
    """Statistics of what weights multiply, each made once for all that read the same.

    Those of experts are means a token, shrunk toward what all experts of the layer see: one that no token
    reached has what they have.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[object, ...], Node] = {}

    def gram(self, reader: Reader) -> list[Node]:
        """Sums of x x^T for each of the roundings: [K, K], or [2, K, K] of tokens in two parts, if the graph
        has these."""
        split = dialect.SPLIT_GRAM if reader.ids is None else dialect.EXPERT_SPLIT_GRAM
        if _call_of(split, self._args(reader, reader.x, reader.x)) is not None:
            return self.take(dialect.SPLIT_GRAM, dialect.EXPERT_SPLIT_GRAM, reader, reader.x, reader.x)
        return self.take(dialect.GRAM, dialect.EXPERT_GRAM, reader, reader.x)

    def original(self, reader: Reader) -> Node:
        """What is multiplied in the original model, unrounded, in the same rows."""
        x = reader.before
        return self._call(f"{x.name}_original", dialect.ORIGINAL, *self._args(reader, x))

    def tokens(self, reader: Reader) -> list[Node]:
        """How many rows there were, int64 [], for each of the roundings."""
        if reader.ids is None:
            return [self._call(f"{reader.x.name}_tokens", dialect.TOKENS, reader.x)]
        counted, experts = self._expert_tokens(reader), range(len(reader.roundings))
        return [self._call(f"{counted.name}_e{e}", dialect.SLICE, counted, e) for e in experts]

    def take(
        self, statistic: Callable[..., object], by_expert: Callable[..., object], reader: Reader, *of: Node
    ) -> list[Node]:
        """A statistic of activations, for each of the roundings."""
        if reader.ids is None:
            return [self._call(f"{of[0].name}_{_name(statistic)}", statistic, *of)]
        count, args = len(reader.roundings), self._args(reader, *of)
        sums = self._call(f"{of[0].name}_{_name(by_expert)}", by_expert, *args, experts=count)
        tokens = self._expert_tokens(reader)
        means = self._call(f"{sums.name}_shrunk", SHRUNK, sums, tokens, by=SHRINKAGE)
        return [self._call(f"{means.name}_e{e}", dialect.SLICE, means, e) for e in range(count)]

    def _args(self, reader: Reader, *of: Node) -> tuple[Node, ...]:
        return of if reader.ids is None else (*of, reader.ids)

    def _expert_tokens(self, reader: Reader) -> Node:
        assert reader.ids is not None
        count = len(reader.roundings)
        return self._call(f"{reader.ids.name}_tokens", dialect.EXPERT_TOKENS, reader.ids, experts=count)

    def _call(self, name: str, target: Callable[..., object], *args: Any, **kwargs: object) -> Node:
        """A call, once."""
        key = (target, args)
        if key not in self.made:
            found = _call_of(target, args)
            if found is None:
                lists = [list(arg) if isinstance(arg, tuple) else arg for arg in args]
                found = edit.call(self.graph, name, target, *lists, **kwargs)
            self.made[key] = found
        return self.made[key]


def _name(target: Callable[..., object]) -> str:
    return str(target).split(".")[1]


def _call_of(target: Callable[..., object], args: tuple[Any, ...]) -> Node | None:
    """The call of a target with these arguments, if the graph has it."""
    lists = tuple(list(arg) if isinstance(arg, tuple) else arg for arg in args)
    return next((user for user in args[0].users if user.target is target and user.args == lists), None)
