"""Amaxes: the largest magnitude of a tensor, what an amax node of the graph stands for, and whether it can
be."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SourceError
from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.structure.views import VIEWS, root, strip


def amax_of(w: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """float32 [n]: the largest magnitude of each (chosen) w[e], without a temporary of the weight's size."""
    rows = range(len(w)) if experts is None else experts
    found = [torch.aminmax(w[e]) for e in rows]
    return torch.stack([torch.maximum(high, -low) for low, high in found]).to(torch.float32)


def amax_value(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    """The float32 [] that an amax, sync, value or constant node stands for once calibrated."""
    if node.target is dialect.SYNC:
        return torch.stack([amax_value(n, values) for n in nodes_at(node, 0)]).amax()
    if node.target is torch.ops.aten.scalar_tensor.default:
        return torch.tensor(float(cast(float, node.args[0])), dtype=torch.float32)
    name = str(node.args[0]) if node.target is dialect.VALUE else node.name
    return values[name]


def slice_of(hole: Node) -> Node | None:
    """The expert slice whose amax this is; None for any other amax."""
    node = strip(node_at(hole, 0), VIEWS)
    return node if node.target is dialect.SLICE else None


def check_finite(hole: Node, value: Tensor) -> None:
    """SourceError if the amax is that of a broken weight or activation."""
    if bool(torch.isfinite(value)):
        return
    check_weight(node_at(hole, 0), value)
    raise SourceError(
        f"%{hole.name}: calibration produced {_kind(value)} in an activation; is the model or the text "
        "broken?"
    )


def check_weight(w: Node, value: Tensor) -> None:
    """SourceError if `w` is a parameter, or a slice of one, and its amax that of a broken one."""
    parameter, piece = root(w), strip(w, VIEWS)
    if parameter is None or bool(torch.isfinite(value)):
        return
    where = f", expert {piece.args[1]}" if piece.target is dialect.SLICE else ""
    raise SourceError(f"{parameter.target}{where}: the weight holds {_kind(value)}; expected finite values")


def _kind(value: Tensor) -> str:
    return "NaN" if bool(value.isnan()) else "Inf"
