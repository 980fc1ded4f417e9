"""Weights: what a lowered program stores, computed from its parameters without running the model.

What shares a value that weights decide (the amax of q, k and v; a scale found from all of them) is computed
together, from one read of each parameter. Of a fused weight no more experts are read than are computed.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SourceError, VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, joined, node_at, nodes_at
from fxq.graph.dialect import is_pack
from fxq.graph.hub import Hub, WeightSource
from fxq.graph.places import places
from fxq.graph.program import Program
from fxq.graph.structure.views import (
    VIEWS,
    parameter_name,
    shape_of,
    statistics,
    strip,
    swaps_matrix,
)
from fxq.run.expressions import Expressions
from fxq.run.loader import Request, loaded
from fxq.run.segments import nbytes
from fxq.run.stages import AT_ONCE

# What to read: lots of nodes, each with what fills its memory.
Reads = list[list[tuple[Node, Callable[[Tensor], object]]]]


@dataclass(frozen=True)
class Leaf:
    """A parameter, or one expert of it. turned: its matrix is read with dimensions swapped."""

    name: str
    expert: int | None = None
    turned: bool = False

    @classmethod
    def of(cls, node: Node, constants: Container[str]) -> "Leaf | None":
        """What a node reads; None if it is computed."""
        if node.op == "get_attr":
            return None if node.target in constants else cls(str(node.target))
        if node.target is not dialect.SLICE:
            return None
        base, turned = node_at(node, 0), False
        if base.target in VIEWS and swaps_matrix(base):
            base, turned = node_at(base, 0), True
        is_parameter = base.op == "get_attr" and base.target not in constants and len(shape_of(base)) == 3
        return cls(str(base.target), int_at(node, 1), turned) if is_parameter else None

    def read(self, source: WeightSource, out: Tensor) -> None:
        """Read it into `out`."""
        if self.expert is None:
            source.read(self.name, out)
        else:
            source.read_expert(self.name, self.expert, out.mT if self.turned else out)

    def part(self, parameter: Tensor) -> Tensor:
        """It, of the whole parameter."""
        value = parameter if self.expert is None else parameter[self.expert]
        return value.mT if self.turned else value


@dataclass
class Computation:
    """Nodes that are computed together, by `expressions`, which has read what they need; alike ones are a
    group, so few that one launch computes them."""

    groups: list[list[Node]]
    nbytes: int
    expressions: "TensorExpressions"


class WeightExpressions:
    """Computes nodes of a graph that follow from parameters and values alone: packed weights, rewritten
    tensors, amaxes.

    constants, values: what small tensors of the trace and `fxq.value` nodes stand for.
    """

    def __init__(
        self,
        source: WeightSource,
        device: torch.device,
        constants: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> None:
        self.source, self.device, self.constants, self.values = source, device, constants, values

    def computations(
        self, nodes: Iterable[Node], resident: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Generator[Computation]:
        """Computations that have all of the nodes, a few at a time. The next are read meanwhile.

        resident: parameters that are at hand; the others are read.
        """
        planned = (self._planned(group, resident) for group in self._batches(list(nodes)))
        with closing(loaded(_requests(planned), self.device, concurrent=self.source.concurrent)) as reading:
            for (computation, leaves, is_last), value in reading:
                computation.expressions.held.update(zip(leaves, value, strict=True))
                if is_last:
                    yield computation

    def _batches(self, nodes: list[Node]) -> Iterator[list[list[Node]]]:
        """Units of nodes that are computed together, in order; units that are alike are a few at once."""
        alike: dict[object, list[list[Node]]] = defaultdict(list)
        for unit in _units(nodes, self.constants):
            alike[tuple(map(_kind, unit))].append(unit)
        for units in alike.values():
            nbytes_each = sum(_weight_bytes(node) for node in units[0])
            step = max(1, AT_ONCE[self.device.type] // max(1, nbytes_each))
            for start in range(0, len(units), step):
                yield units[start : start + step]

    def _planned(self, units: list[list[Node]], resident: Mapping[str, Tensor]) -> tuple[Computation, Reads]:
        columns: dict[object, list[Node]] = defaultdict(list)
        for node in (node for unit in units for node in unit):
            columns[_kind(node)].append(node)
        expressions = TensorExpressions(self.constants, self.values, self.device)
        leaves = _Leaves(self.constants)
        groups: list[list[Node]] = []
        for column in columns.values():
            if is_pack(column[0]):
                leaves.many(column)
                step = max(1, AT_ONCE[self.device.type] // max(1, _weight_bytes(column[0])))
                groups += [column[start : start + step] for start in range(0, len(column), step)]
            else:
                for node in column:
                    leaves.one(node)
                groups += [[node] for node in column]
        reads: Reads = []
        for lot in leaves.found:
            missing: list[tuple[Node, Callable[[Tensor], object]]] = []
            for node in lot:
                leaf = Leaf.of(node, self.constants)
                assert leaf is not None
                if leaf.name in resident:
                    expressions.held[node] = leaf.part(resident[leaf.name])
                else:
                    missing.append((node, functools.partial(leaf.read, self.source)))
            if missing:
                reads.append(missing)
        size = sum(nbytes(node) for lot in leaves.found for node in lot)
        return Computation(groups, size, expressions), reads


def _requests(
    planned: Iterable[tuple[Computation, Reads]],
) -> Iterator[Request[tuple[Computation, tuple[Node, ...], bool]]]:
    for computation, reads in planned:
        for i, lot in enumerate(reads):
            nodes, fills = zip(*lot, strict=True)
            val, is_last = nodes[0].meta["val"], i == len(reads) - 1
            yield Request((computation, nodes, is_last), (len(nodes), *val.shape), val.dtype, list(fills))
        if not reads:
            yield Request((computation, (), True), (0,), torch.uint8, [])


def _kind(node: Node) -> object:
    """Equal for packs that one launch computes; any other node is alone."""
    if not is_pack(node):
        return node
    return (
        node.target,
        tuple(sorted(node.kwargs.items())),
        parameter_name(node_at(node, 0)),
        shape_of(node_at(node, 0)),
    )


def _weight_bytes(node: Node) -> int:
    return nbytes(node_at(node, 0)) if is_pack(node) else sum(map(nbytes, node.all_input_nodes))


def _units(nodes: list[Node], constants: Mapping[str, Tensor]) -> list[list[Node]]:
    """The nodes, those together that need one value which weights decide."""
    weighty: dict[Node, bool] = {}

    def follows_from_weights(node: Node) -> bool:
        if node not in weighty:
            own = Leaf.of(node, constants) is not None
            weighty[node] = own or any(map(follows_from_weights, node.all_input_nodes))
        return weighty[node]

    def inner(node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if Leaf.of(n, constants) is None and follows_from_weights(n)]

    stack, links = list(nodes), dict[Node, list[Node]]()
    while stack:
        node = stack.pop()
        if node not in links:
            links[node] = inner(node)
            stack += links[node]
    unit_of = {
        node: i for i, unit in enumerate(joined([n, *more] for n, more in links.items())) for node in unit
    }
    units: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        units[unit_of[node]].append(node)
    return list(units.values())


class _Leaves(Expressions[bool]):
    """Finds what must be read, in the order in which it is needed."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.constants, self.found, self.seen = constants, list[list[Node]](), set[Node]()

    def leaf(self, nodes: tuple[Node, ...]) -> bool | None:
        if any(Leaf.of(node, self.constants) is None for node in nodes):
            return None
        if new := [node for node in dict.fromkeys(nodes) if node not in self.seen]:
            self.found.append(new)
            self.seen.update(new)
        return True

    def call(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], origin: tuple[Node, ...]
    ) -> bool:
        return True


class TensorExpressions(Expressions[Any]):
    """Computes tensors. held: parameters, and experts of them, that were read."""

    def __init__(
        self, constants: Mapping[str, Tensor], values: Mapping[str, Tensor], device: torch.device
    ) -> None:
        super().__init__()
        self.constants, self.values, self.device = constants, values, device
        self.held: dict[Node, Tensor] = {}

    def leaf(self, nodes: tuple[Node, ...]) -> Tensor | None:
        parts = [self.held[node] for node in nodes if node in self.held]
        return _stacked(parts) if len(parts) == len(nodes) else None

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], origin: tuple[Node, ...]) -> Any:
        known = dialect.find(target)
        if known is not None and known.pack is not None:
            return known.pack(*args, **kwargs)
        moved = {k: self.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        return target(*args, **moved)

    def _one(self, node: Node) -> Any:
        if node.op == "get_attr" and node.target in self.constants:
            return self.constants[str(node.target)].to(self.device)
        if self.is_given(node):
            name = str(node.args[0]) if node.target is dialect.VALUE else node.name
            return self.values[name].to(self.device)
        return super()._one(node)

    def is_given(self, node: Node) -> bool:
        return node.target is dialect.VALUE or (dialect.is_statistic(node) and node.name in self.values)


@dataclass(frozen=True)
class Needs:
    """of: node -> the parameters and values that it is computed from, by name. by_parameter: the other way
    round."""

    of: Mapping[Node, frozenset[str]]
    by_parameter: Mapping[str, list[Node]]

    def reading(self, parameters: Iterable[str]) -> list[Node]:
        """The nodes that need one of the parameters."""
        return list(dict.fromkeys(node for name in parameters for node in self.by_parameter.get(name, ())))


def needs(nodes: Iterable[Node], constants: Container[str]) -> Needs:
    """What must be at hand for nodes to be computed."""
    known: dict[Node, frozenset[str]] = {}

    def names(node: Node) -> frozenset[str]:
        if node not in known:
            leaf = Leaf.of(node, constants)
            if leaf is not None:
                known[node] = frozenset([leaf.name])
            elif node.target is dialect.VALUE:
                known[node] = frozenset([str(node.args[0])])
            else:
                known[node] = frozenset().union(*map(names, node.all_input_nodes))
        return known[node]

    of = {node: names(node) for node in nodes}
    by_parameter: dict[str, list[Node]] = defaultdict(list)
    for node, needed in of.items():
        for name in needed:
            by_parameter[name].append(node)
    return Needs(of, by_parameter)


def scalar(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    """What a node of values alone, such as an input's amax, stands for: on the CPU."""
    return cast(Tensor, TensorExpressions({}, values, torch.device("cpu")).one(node))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[n, ...]: a view, if the parts follow one another in one tensor, instead of a copy."""
    first = parts[0]
    stride = parts[1].storage_offset() - first.storage_offset() if len(parts) > 1 else first.numel()
    in_order = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + i * stride
        and part.stride() == first.stride()
        and part.shape == first.shape
        for i, part in enumerate(parts)
    )
    if in_order and stride > 0:
        return first.as_strided((len(parts), *first.shape), (stride, *first.stride()), first.storage_offset())
    return torch.stack(list(parts))


def check_weight(hub: Hub, w: Node, values: Tensor) -> None:
    """SourceError, naming the tensor of the checkpoint, if the values [out, in] of a parameter or of a slice
    of one hold NaN or Inf."""
    broken = torch.nonzero(~torch.isfinite(values))
    if len(broken):
        row, value = int(broken[0, 0]), values[tuple(broken[0])]
        raise SourceError(
            f"{_tensor_of(hub, w, row)}: the weight holds {_broken(value)}; expected finite values"
        )


def check_parameters(program: Program, parameters: Mapping[str, Tensor]) -> None:
    """`check_weight` of whole parameters, by name, as the program reads them."""
    for node in program.graph.nodes:
        leaf = Leaf.of(node, program.constants)
        if leaf is not None and leaf.name in parameters:
            value = leaf.part(parameters[leaf.name])
            if value.dim() == 2:
                check_weight(program.hub, node, value)


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


def _broken(value: Tensor) -> str:
    return "NaN" if bool(value.isnan()) else "Inf"


def amaxes(program: Program, source: WeightSource, device: torch.device) -> dict[str, Tensor]:
    """Amax node of a program's graph -> float32 [] on the CPU: what a weight shows or a pass kept, what
    calibration found of activations, or what stands for that where no token came. Reads the weights."""
    graph = program.calibrated or program.graph
    values = program.known_values()
    taken = set(statistics(graph))
    of_weights = [n for n in graph.nodes if n.target is dialect.AMAX and n not in taken]
    found: dict[str, Tensor] = {}
    expressions = WeightExpressions(source, device, program.constants, values)
    with closing(expressions.computations(of_weights)) as computations:
        for computation in computations:
            for (node,) in computation.groups:
                found[node.name] = cast(Tensor, computation.expressions.one(node)).cpu()
    kept = {node_at(n, 1) for n in graph.nodes if dialect.is_rounding(n)}
    found.update((n.name, values[str(n.args[0])]) for n in kept if n.target is dialect.VALUE)
    for node in (n for n in taken if n.target is dialect.AMAX):
        groups = [node, *(user for user in node.users if user.target is dialect.SYNC)]
        answers = [user for own in groups for user in own.users if user.target is dialect.FIRST]
        answer = next((first for first in answers if nodes_at(first, 0)[0] in groups), None)
        is_reached = float(values[node.name]) >= 0 or answer is None
        found[node.name] = values[node.name] if is_reached else scalar(cast(Node, answer), values)
    return found
