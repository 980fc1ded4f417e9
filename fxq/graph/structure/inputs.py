"""Inputs: what quantized weights multiply, and the statistics of it that decide how these are rounded.

%x_q : bf16[8,64] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%y : bf16[8,32] = aten.linear(%x_q, %w_q)               Reader(x=%x_q, before=%x, roundings=[%w_q])
%z : bf16[9,32] = fxq.expert_linear(%x_q, %e_q, %ids)   with %e_q = fxq.stack([...]): a rounding an expert
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.structure.experts import expert_inputs
from fxq.graph.structure.matmuls import input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, shape_of, strip

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A matmul by quantized weights. x: what it multiplies, rows [..., K], rounded if inputs are. before: x
    unrounded. roundings: of its weight, or of each expert's; ids: int [T], the expert of each row, or
    None."""

    node: Node
    x: Node
    before: Node
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
            yield Reader(matmul.node, x, before, tuple(roundings), ids)


def _shrunk(gram: torch.Tensor, tokens: torch.Tensor, *, by: int) -> torch.Tensor:
    counts = tokens.to(gram.device, gram.dtype).view(-1, *[1] * (gram.dim() - 1))
    mean = gram.sum(0, keepdim=True) / counts.sum().clamp_min(1)
    return (gram + by * mean) / (counts + by)


# Sums of each expert's tokens [experts, ...], of so many tokens int64 [experts], as means a token in which
# `by` tokens of the mean of all experts are counted as its own.
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
        self.made: dict[object, Node] = {}
        self.together = {x: tuple(group) for group in expert_inputs(graph) for x in group if len(group) > 1}

    def gram(self, reader: Reader) -> list[Node]:
        """Sums of x x^T [K, K], for each of the roundings."""
        split = self.found(dialect.SPLIT_GRAM, dialect.EXPERT_SPLIT_GRAM, reader, (reader.x, reader.x))
        if split is not None:
            return [self._once((n, "sum"), lambda n=n: self._sum(n)) for n in split]  # type: ignore[misc]
        return self.take(dialect.GRAM, dialect.EXPERT_GRAM, reader, (reader.x,))

    def tokens(self, reader: Reader) -> list[Node]:
        """How many rows there were, int64 [], for each of the roundings."""
        if reader.ids is None:
            return [
                self._once((dialect.TOKENS, reader.x), lambda: self._call("tokens", dialect.TOKENS, reader.x))
            ]
        counted = self._expert_tokens(reader)
        return [self._slice(counted, e) for e in range(len(reader.roundings))]

    def take(
        self,
        statistic: Callable[..., object],
        by_expert: Callable[..., object],
        reader: Reader,
        of: tuple[Node, ...],
    ) -> list[Node]:
        """The statistic of activations, for each of the roundings."""
        made = self.found(statistic, by_expert, reader, of)
        if made is not None:
            return made
        name = str(by_expert if reader.ids is not None else statistic).split(".")[1]
        if reader.ids is not None:
            count = len(reader.roundings)
            sums = self._call(f"{of[0].name}_{name}", by_expert, *of, reader.ids, experts=count)
            whole = self._shrunk(sums, self._expert_tokens(reader))
            self.made[by_expert, of, reader.ids] = whole
            return [self._slice(whole, e) for e in range(count)]
        self.made[statistic, of] = self._call(f"{of[0].name}_{name}", statistic, *of)
        return [self.made[statistic, of]]

    def found(
        self,
        statistic: Callable[..., object],
        by_expert: Callable[..., object],
        reader: Reader,
        of: tuple[Node, ...],
    ) -> list[Node] | None:
        """The statistic, if the graph has it."""
        if reader.ids is None:
            made = self.made.get((statistic, of)) or _call_of(statistic, of)
            return None if made is None else [made]
        whole = self.made.get((by_expert, of, reader.ids))
        if whole is None:
            sums = _call_of(by_expert, (*of, reader.ids))
            whole = next((u for u in sums.users if u.target is SHRUNK), None) if sums is not None else None
        return None if whole is None else [self._slice(whole, e) for e in range(len(reader.roundings))]

    def _expert_tokens(self, reader: Reader) -> Node:
        ids = reader.ids
        assert ids is not None
        count = len(reader.roundings)
        made = _call_of(dialect.EXPERT_TOKENS, (ids,))
        return made or self._call(f"{ids.name}_tokens", dialect.EXPERT_TOKENS, ids, experts=count)

    def _shrunk(self, sums: Node, tokens: Node) -> Node:
        return self._call(f"{sums.name}_shrunk", SHRUNK, sums, tokens, by=SHRINKAGE)

    def _sum(self, split: Node) -> Node:
        return self._call(f"{split.name}_sum", _ATEN.sum.dim_IntList, split, [0])

    def _slice(self, of: Node, expert: int) -> Node:
        return self._once((of, expert), lambda: self._call(f"{of.name}_e{expert}", dialect.SLICE, of, expert))

    def _once(self, key: object, make: Callable[[], Node]) -> Node:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _call(self, name: str, target: Callable[..., object], *args: object, **kwargs: object) -> Node:
        return edit.call(self.graph, name, target, *args, **kwargs)


def _call_of(target: Callable[..., object], args: tuple[Node, ...]) -> Node | None:
    """The call of a target with these arguments, if there is one."""
    return next((user for user in args[0].users if user.target is target and user.args == args), None)
