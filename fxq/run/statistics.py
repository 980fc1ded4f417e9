"""Statistics: what calibration reads off tensors while the graph runs, the largest magnitudes above all."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SourceError, VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.hub import Hub
from fxq.graph.places import places
from fxq.graph.structure.views import VIEWS, parameter_name, root, strip, value_of
from fxq.run.simulate import Unquantized


def amax_of(w: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """float32 [n]: the largest magnitude of each (chosen) w[e], without a temporary of the weight's size."""
    rows = range(len(w)) if experts is None else experts
    found = [torch.aminmax(w[e]) for e in rows]
    return torch.stack([torch.maximum(high, -low) for low, high in found]).to(torch.float32)


def slice_of(hole: Node) -> Node | None:
    """The expert slice whose amax this is; None for any other amax."""
    node = strip(node_at(hole, 0), VIEWS)
    return node if node.target is dialect.SLICE else None


def check_finite(hub: Hub, hole: Node, value: Tensor, t: Tensor | None = None) -> None:
    """SourceError if an amax f32 [] is NaN or Inf. t: the tensor that it is of, if that is a weight
    [out, in]."""
    if bool(torch.isfinite(value)):
        return
    if t is not None:
        check_weight(hub, node_at(hole, 0), t)
    raise SourceError(
        f"%{hole.name}: calibration produced {_kind(value)} in an activation; is the model or the text "
        "broken?"
    )


def check_weight(hub: Hub, w: Node, values: Tensor) -> None:
    """SourceError, naming the tensor of the checkpoint, if the values [out, in] of a parameter or of a slice
    of one hold NaN or Inf."""
    broken = torch.nonzero(~torch.isfinite(values))
    if len(broken):
        row, value = int(broken[0, 0]), values[tuple(broken[0])]
        raise SourceError(
            f"{_tensor_of(hub, w, row)}: the weight holds {_kind(value)}; expected finite values"
        )


def _tensor_of(hub: Hub, w: Node, row: int) -> str:
    """What holds a row of a weight in the source; parameters that rows do not describe by their own name."""
    try:
        found = places(dataclasses.replace(hub, names={}), w)  # `names` are those of the output
    except VerifyError:
        piece = strip(w, VIEWS)
        name, expert = parameter_name(w), piece.args[1] if piece.target is dialect.SLICE else None
    else:
        place = next(place for place in found if place.start <= row < place.end)
        name, expert = place.key, place.expert if place.experts > 1 else None
    return name if expert is None else f"{name}, expert {expert}"


def _kind(value: Tensor) -> str:
    return "NaN" if bool(value.isnan()) else "Inf"


class Max(Unquantized):
    """Records the amax of activations and weights, and counts the tokens that reach each expert; an expert's
    weight is looked at when a token reaches it.

    Only what leads to an amax or to an expert is computed; statistics are those of the unquantized model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.inputs: dict[Node, Tensor] = {}
        self.holes: dict[Node, list[Node | None]] = {}

    def wanted(self) -> set[Node]:
        needed: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if (
                node in needed
                or node.target in (dialect.AMAX, dialect.EXPERT_LINEAR)
                or node.op == "placeholder"
            ):
                needed.update((node, *node.all_input_nodes))
        return needed

    def run_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Any]:
        outputs = super().run_batches(batches, masks)
        for hole, value in self.inputs.items():
            self._found(hole, value.cpu())
        return outputs

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.AMAX:
            return self._amax(n, args[0])
        if n.target is dialect.EXPERT_LINEAR:
            self._count(n, args[1], args[2])
        return super().call(n, args, kwargs)

    def _amax(self, n: Node, t: Tensor) -> None:
        if root(node_at(n, 0)) is None:
            if t.numel():  # else bootstrap looks at its peers
                value = amax_of(t[None])[0]
                self.inputs[n] = torch.maximum(self.inputs[n], value) if n in self.inputs else value
        elif slice_of(n) is None:  # an expert's amax waits for a token to reach it
            self._found(n, amax_of(t[None])[0].cpu(), t)

    def _count(self, n: Node, w: Tensor, expert_ids: Tensor) -> None:
        stack = node_at(n, 1)
        holes = self.holes.setdefault(stack, _expert_holes(stack))
        if not holes:
            return
        parameter = parameter_name(stack)
        counts = torch.bincount(expert_ids, minlength=len(w))[: len(w)].cpu()
        seen = self.tokens.get(parameter, torch.zeros_like(counts))
        self.tokens[parameter] = seen + counts
        new = [e for e in torch.nonzero(counts).flatten().tolist() if holes[e].name not in self.values]
        if new:
            for expert, value in zip(new, amax_of(w, new).cpu(), strict=True):
                self._found(holes[expert], value, w[expert])

    def _found(self, hole: Node, value: Tensor, weight: Tensor | None = None) -> None:
        check_finite(self.program.hub, hole, value, weight)
        self.values[hole.name] = value


def _expert_holes(stack: Node) -> list[Node | None]:
    """The amax node of each expert of a fused weight, in order; None for one that has none; [] if the weight
    is not taken apart."""
    if stack.target is not dialect.STACK:
        return []
    pieces = (value_of(piece) for piece in nodes_at(stack, 0))
    return [next((user for user in piece.users if user.target is dialect.AMAX), None) for piece in pieces]
