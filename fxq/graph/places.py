"""Where the checkpoint holds the rows of a weight: alone, with other linears, or with all experts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at
from fxq.graph.hub import Hub, Stored, row_axis
from fxq.graph.structure.matmuls import Frontiers
from fxq.graph.structure.views import SAME_PLACE, parameter_name, root, shape_of, strip, swaps_matrix


@dataclass(frozen=True)
class Place:
    """Rows [start, end) of a weight [out, in] are rows `rows` of one expert of the checkpoint's tensor `key`.

    The tensor's `shape` is that before packing; it is seen as [experts, out, in], or as [experts, in, out]
    if `transposed`.
    """

    key: str
    start: int
    end: int
    rows: range
    shape: tuple[int, ...]
    expert: int = 0
    experts: int = 1
    transposed: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether this is all of a tensor that engines know as one linear."""
        whole = len(self.shape) == 2 and self.experts == 1 and self.key.endswith(".weight")
        return whole and self.rows == range(self.shape[1 if self.transposed else 0])


def named(hub: Hub, name: str, shape: tuple[int, ...]) -> Stored:
    """How the family's own checkpoints hold a parameter: under its own name if the hub does not say."""
    return hub.names.get(name) or hub.stored.get(name) or Stored.whole(name, shape)


def places(hub: Hub, w: Node) -> list[Place]:
    """Where the rows of a quantized weight [out, in] lie, in order; VerifyError if they are no rows of the
    checkpoint's tensors."""
    name, parameter, piece = parameter_name(w), root(w), strip(w, SAME_PLACE)
    assert parameter is not None
    swapped = _swapped(w)
    if swapped is None or (piece.target is not dialect.SLICE and piece is not parameter):
        raise VerifyError(
            f"{name} is used in parts (%{piece.name}), which cannot be one quantized tensor; skip it"
        )
    shape = shape_of(parameter)
    stored = named(hub, name, shape)
    if stored.convert is not None:
        raise VerifyError(
            f"{name} is made of {stored.keys[0][0]} by {stored.convert.operations}, which does more "
            "than choose rows, so that no tensor of the checkpoint can hold it quantized; skip it"
        )
    expert, experts = 0, 1
    if piece.target is dialect.SLICE:
        expert, experts = int_at(piece, 1), shape_of(node_at(piece, 0))[0]
    if swapped is not stored.transposed:
        return [_turned(hub, name, shape, stored, expert, experts)]
    if stored.stacked:
        return list(_stacked(hub, shape_of(w), stored, expert))
    return list(_shared(hub, name, shape, stored, expert, experts))


def cache_module(hub: Hub, frontiers: Frontiers, k: Node, v: Node) -> str:
    """The checkpoint's name of the module around the projections that make K and V, whose cache it is;
    VerifyError if there is none."""
    keys = []
    for matmul in frontiers.of(k, v):
        name = str(frontiers.matmuls[matmul].parameter.target)
        keys.append(hub.stored.get(name, Stored.whole(name, ())).keys[0][0])
    if not keys:
        raise VerifyError(
            f"%{k.name}: no projection makes the keys of this attention; where would its scale go?"
        )
    modules = [key.split(".")[:-2] for key in keys]
    shared = 0
    while all(shared < len(m) and m[shared] == modules[0][shared] for m in modules):
        shared += 1
    if shared == 0:
        raise VerifyError(
            f"{', '.join(keys)} make the keys and values of one attention but lie in no common module, which "
            "would hold its scales"
        )
    return ".".join(modules[0][:shared])


def _stacked(hub: Hub, shape: tuple[int, ...], stored: Stored, expert: int) -> Iterator[Place]:
    """Each part in the expert's own tensor."""
    start = 0
    for part in stored.parts:
        key, end = part.keys[expert], start + len(part.rows)
        held = hub.tensors[key].shape if key in hub.tensors else (len(part.rows), shape[1])
        yield Place(key, start, end, part.rows, held)
        start = end


def _shared(
    hub: Hub, name: str, shape: tuple[int, ...], stored: Stored, expert: int, experts: int
) -> Iterator[Place]:
    """Each part as rows of a tensor, of its expert there if the tensor has experts."""
    start = 0
    for part in stored.parts:
        held = _shape(hub, part.keys[0], shape)
        rows = part.rows
        if experts > 1 and len(held) == 2:  # [experts * rows, in]
            _check_whole(name, stored, held)
            rows = range(len(rows) // experts)
        yield Place(part.keys[0], start, start + len(rows), rows, held, expert, experts)
        start += len(rows)


def _turned(hub: Hub, name: str, shape: tuple[int, ...], stored: Stored, expert: int, experts: int) -> Place:
    """The whole weight, held as [in, out]."""
    key = stored.keys[0][0]
    held = _shape(hub, key, shape)
    _check_whole(name, stored, held)
    return Place(key, 0, held[-1], range(held[-1]), held, expert, experts, transposed=True)


def _shape(hub: Hub, key: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    return hub.tensors[key].shape if key in hub.tensors else otherwise


def _check_whole(name: str, stored: Stored, held: tuple[int, ...]) -> None:
    if stored.stacked or len(stored.parts) > 1 or stored.parts[0].rows != range(held[row_axis(held)]):
        raise VerifyError(
            f"{name} is not all of {stored.keys[0][0]} {list(held)}, and is used transposed or by "
            "expert: its rows are no rows of that tensor; skip it"
        )


def _swapped(w: Node) -> bool | None:
    """Whether a weight operand is the parameter (or a slice of it) with its last two dimensions swapped;
    None if views do more to it."""
    swapped = False
    while w.op != "get_attr":
        if w.target not in (dialect.SLICE, dialect.REWRITE):
            turn = swaps_matrix(w)
            if turn is None:
                return None
            swapped ^= turn
        w = node_at(w, 0)
    return swapped
