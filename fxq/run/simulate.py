"""Simulation: the graph run as the deployed model computes, and as the model was before.

The graph that simulates is the graph that was calibrated: only the meaning of a few operators changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.numbers.formats import FORMATS
from fxq.run.streaming import Streaming


class Simulate(Streaming):
    """The deployed model: calibrated amaxes instead of fresh ones, everything quantized as it will be
    served. Slices that are stacked again are quantized there, in one launch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.together = {q: n for n in self.graph.nodes for q in _quantized_alike(n)}

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.AMAX:
            return self.program.values[n.name].to(self.device)
        if n in self.together:
            return args[0]
        if n.target is dialect.STACK and self.together.get(nodes_at(n, 0)[0]) is n:
            return self._quantize(_base(args[0]), nodes_at(n, 0))
        return super().call(n, args, kwargs)

    def _quantize(self, w: Tensor, quantizes: Sequence[Node]) -> Tensor:
        amax = torch.stack([amax_value(node_at(q, 1), self.program.values) for q in quantizes])
        format = FORMATS[str(quantizes[0].kwargs["format"])]
        packed = format.quantize(w, amax.to(w.device), str(quantizes[0].kwargs["scale"]))
        out = torch.empty_like(w)
        for e in range(len(w)):
            out[e] = format.dequantize(packed.part(e, slice(None)))
        return out


class Unquantized(Streaming):
    """The model as it was: quantize nodes pass their operand through."""

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.QUANTIZE:
            return args[0]
        if n.target in (dialect.SYNC, dialect.AMAX):
            return None
        if n.target is dialect.STACK:
            return _base(args[0])
        return super().call(n, args, kwargs)


def _quantized_alike(stack: Node) -> Sequence[Node]:
    """The quantize nodes that a stack consists of, if all choose scales alike and have no other user."""
    if stack.target is not dialect.STACK:
        return ()
    pieces = nodes_at(stack, 0)
    options = pieces[0].kwargs
    format = FORMATS.get(str(options.get("format")))
    in_blocks = format is not None and format.block is not None and options["scale"] in format.scales
    alike = in_blocks and all(
        q.target is dialect.QUANTIZE and q.kwargs == options and list(q.users) == [stack] for q in pieces
    )
    return pieces if alike else ()


def _base(slices: Sequence[Tensor]) -> Tensor:
    """The fused weight itself when its slices come back untouched and in order, instead of a copy."""
    first = slices[0]
    stride = slices[1].storage_offset() - first.storage_offset() if len(slices) > 1 else first.numel()
    untouched = all(
        s.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and s.storage_offset() == first.storage_offset() + e * stride
        and s.stride() == first.stride()
        for e, s in enumerate(slices)
    )
    if untouched and stride > 0:
        return first.as_strided(
            (len(slices), *first.shape), (stride, *first.stride()), first.storage_offset()
        )
    return torch.stack(list(slices))


def amax_value(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    """The float32 [] that an amax, sync, value or constant node stands for once calibrated."""
    if node.target is dialect.SYNC:
        return torch.stack([amax_value(n, values) for n in nodes_at(node, 0)]).amax()
    if node.target is torch.ops.aten.scalar_tensor.default:
        return torch.tensor(float(cast(float, node.args[0])), dtype=torch.float32)
    name = str(node.args[0]) if node.target is dialect.VALUE else node.name
    return values[name]
