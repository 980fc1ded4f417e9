"""Weights without the model: views and slices of parameters, evaluated many at a time."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
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

# Slices of one weight are handled together up to this many bytes: enough for a launch, little enough to hold.
BATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# Buffers of a batch up to this size are used again; they are kept for that while all take so many bytes.
LENT_BYTES, MEMORY_BYTES = 64 << 20, 64 << 20


class WeightCone:
    """Evaluates weight-only nodes (views and slices of parameters) without running the model, many slices
    at a time."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.source, self.device = program, source, device
        self.memory = _Memory()

    def batches(self, lots: Iterable[Iterable[Node]]) -> Iterator[tuple[list[Node], Tensor]]:
        """The nodes of each lot, each a weight [out, in], grouped by source tensor: (nodes, values [n, out,
        in] on the device). The next are read meanwhile; `release` what is no longer needed."""
        return loaded(
            (self._request(part) for nodes in lots for part in self._parts(nodes)),
            self.device,
            concurrent=self.source.concurrent,
            allocate=lambda request: self.memory.lend(request.shape, request.dtype),
        )

    def release(self, values: Tensor) -> None:
        """The memory of a batch may be used for another."""
        self.memory.take_back(values.data_ptr())

    def _parts(self, nodes: Iterable[Node]) -> Iterator[list[Node]]:
        by_parameter: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            by_parameter[parameter_name(node)].append(node)
        for group in by_parameter.values():
            step = max(1, BATCH_BYTES[self.device.type] // max(1, nbytes(group[0])))
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


class _Memory:
    """Where batches that stay on the CPU are read into: the same few buffers again and again. New ones of
    their size would be cleared page by page before they are read into."""

    def __init__(self) -> None:
        self.spare: list[Tensor] = []
        self.lent: dict[int, Tensor] = {}
        self.lock = Lock()

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if not 0 < nbytes <= LENT_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        with self.lock:
            fitting = [buffer for buffer in self.spare if nbytes <= len(buffer) <= 2 * nbytes]
            if fitting:
                buffer = min(fitting, key=len)
                self.spare = [other for other in self.spare if other is not buffer]
            else:
                self._let_go(nbytes)
                buffer = torch.empty(nbytes, dtype=torch.uint8)
            self.lent[buffer.data_ptr()] = buffer
        return buffer[:nbytes].view(dtype).view(*shape)

    def take_back(self, place: int) -> None:
        """The memory that begins there, if it was lent."""
        with self.lock:
            buffer = self.lent.pop(place, None)
            if buffer is not None:
                self.spare.append(buffer)
                self._let_go(0)

    def _let_go(self, more: int) -> None:
        """Free what has been spare for longest while all buffers, and so many bytes more, are too many."""
        room = MEMORY_BYTES - more - sum(map(len, self.lent.values()))
        while self.spare and sum(map(len, self.spare)) > room:
            self.spare.pop(0)


def _expert_of_parameter(node: Node) -> tuple[str, bool] | None:
    """The fused parameter that `node` is an expert of, and whether its matrices are turned; None if it is
    something else."""
    if node.target is not dialect.SLICE:
        return None
    base, turned = node_at(node, 0), False
    if base.target in VIEWS and swaps_matrix(base):
        base, turned = node_at(base, 0), True
    return (str(base.target), turned) if base.op == "get_attr" else None
