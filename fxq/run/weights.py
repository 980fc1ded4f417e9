"""Weight expressions: views and slices of parameters, evaluated without the model, many at a time."""

import functools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import VIEWS, parameter_name, swaps_matrix
from fxq.run.loader import Request, loaded
from fxq.run.segments import nbytes
from fxq.run.stages import AT_ONCE


class WeightExpressions:
    """Evaluates nodes that depend on one parameter alone (views and slices of it) without running the
    model."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.source, self.device = program, source, device

    def batches(
        self, nodes: Iterable[Node], alike: Callable[[Node], object] = lambda node: None
    ) -> Generator[tuple[list[Node], Tensor]]:
        """The nodes, each a weight [out, in], those of one parameter and of equal `alike` together: (some of
        them, values [n, out, in] on the device). The next are read meanwhile."""
        requests = map(self._request, self._parts(nodes, alike))
        return loaded(requests, self.device, concurrent=self.source.concurrent)

    def _parts(self, nodes: Iterable[Node], alike: Callable[[Node], object]) -> Iterator[list[Node]]:
        groups: dict[object, list[Node]] = defaultdict(list)
        for node in nodes:
            groups[parameter_name(node), alike(node)].append(node)
        for group in groups.values():
            step = max(1, AT_ONCE[self.device.type] // max(1, nbytes(group[0])))
            for start in range(0, len(group), step):
                yield group[start : start + step]

    def _request(self, nodes: list[Node]) -> Request[list[Node]]:
        val = nodes[0].meta["val"]
        fills = [functools.partial(self._fill, node) for node in nodes]
        return Request(nodes, (len(nodes), *val.shape), val.dtype, fills)

    def _fill(self, node: Node, out: Tensor) -> None:
        """One weight [out, in]; of a fused parameter only the expert asked for is read."""
        if node.op == "get_attr":
            self.source.read(str(node.target), out)
        elif (stored := _expert_of_parameter(node)) is not None:
            name, turned = stored
            self.source.read_expert(name, int_at(node, 1), out.mT if turned else out)
        else:
            out.copy_(self._computed(node))

    def _computed(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            return self.source.read(str(node.target))
        args = cast(tuple[Any, ...], map_arg(node.args, self._computed))
        return cast(Callable[..., Tensor], node.target)(*args, **node.kwargs)


def _expert_of_parameter(node: Node) -> tuple[str, bool] | None:
    """The fused parameter that `node` is an expert of, and whether its matrices are turned; None if it is
    something else."""
    if node.target is not dialect.SLICE:
        return None
    base, turned = node_at(node, 0), False
    if base.target in VIEWS and swaps_matrix(base):
        base, turned = node_at(base, 0), True
    return (str(base.target), turned) if base.op == "get_attr" else None
