"""Weights without the model: views and slices of parameters, evaluated many at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq import dialect
from fxq.loading import loaded
from fxq.nodes import int_at, node_at
from fxq.program import Program, WeightSource
from fxq.segments import nbytes
from fxq.structure import VIEWS, parameter_name, strip

# Slices of one weight are handled together up to this many bytes: enough for a launch, little enough to hold.
BATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


class WeightCone:
    """Evaluates weight-only nodes (views and slices of parameters) without running the model, many slices
    at a time."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.source, self.device = program, source, device

    def batches(self, nodes: Iterable[Node]) -> Iterator[tuple[list[Node], Tensor]]:
        """The given nodes, each a weight [out, in], grouped by source tensor: (nodes, values [n, out, in] on
        the device). The next are read meanwhile."""
        return loaded(self._parts(nodes), self._stacked, nbytes=_total, device=self.device)

    def _parts(self, nodes: Iterable[Node]) -> Iterator[list[Node]]:
        by_parameter: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            by_parameter[parameter_name(node)].append(node)
        for group in by_parameter.values():
            step = max(1, BATCH_BYTES[self.device.type] // max(1, nbytes(group[0])))
            for start in range(0, len(group), step):
                yield group[start : start + step]

    def _stacked(self, nodes: list[Node]) -> Tensor:
        first = self.value(nodes[0])
        if len(nodes) == 1:
            return first[None]
        pinned = self.device.type == "cuda"
        values = torch.empty((len(nodes), *first.shape), dtype=first.dtype, pin_memory=pinned)
        for i, node in enumerate(nodes):
            values[i].copy_(first if i == 0 else self.value(node))
        return values

    def value(self, node: Node) -> Tensor:
        """One weight [out, in] on the CPU; of a fused weight only the expert asked for is read."""
        if node.op == "get_attr":
            return self.source.read(str(node.target))
        if node.target is dialect.SLICE:
            base, expert = node_at(node, 0), int_at(node, 1)
            below = strip(base, VIEWS)
            if base.op == "get_attr":
                return self.source.read_expert(str(base.target), expert)
            if (
                base.target is torch.ops.aten.transpose.int
                and base.args[0] is below
                and below.op == "get_attr"
            ):
                return self.source.read_expert(str(below.target), expert).T
        args = cast(tuple[Any, ...], map_arg(node.args, self.value))
        return cast(Callable[..., Tensor], node.target)(*args, **node.kwargs)


def _total(nodes: list[Node]) -> int:
    return sum(map(nbytes, nodes))
