"""Graphs at rest: while nobody looks at a graph it is kept as compressed text, a hundredth of what its nodes
take."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, cast

from torch.fx import Graph, Node

from fxq.graph.arguments import joined
from fxq.graph.dialect import PACK
from fxq.graph.text import format_node, parse

# Nodes of a part, if what belongs together is not more.
PART_NODES = 500
Held = TypeVar("Held", bound=Graph | None)


@dataclass(frozen=True)
class Rest:
    """A graph as compressed text, in parts that share no node; `output` is its return."""

    parts: tuple[bytes, ...]
    output: str

    @classmethod
    def of(cls, graph: Graph, *, apart: bool = False) -> Self:
        """A graph in one part; `apart`: in parts of some PART_NODES nodes that do not depend on each other,
        what packs nothing first."""
        nodes = list(graph.nodes)
        output = nodes.pop()
        lots = _apart(nodes) if apart else [nodes]
        return cls(tuple(_compressed(lot) for lot in lots), format_node(output))

    def graph(self) -> Graph:
        """All of it again."""
        return parse("".join([*map(_text, self.parts), self.output]))

    def graphs(self) -> Iterator[Graph]:
        """A graph of each part, without a return, one at a time."""
        return (parse(_text(part)) for part in self.parts)


class Kept(Generic[Held]):
    """A field of a dataclass that holds a graph: itself, or at rest until it is asked for."""

    def __init__(self, *default: Held) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: object | None, owner: type | None = None) -> Held:
        if holder is None:
            if not self.default:
                raise AttributeError(self.name)  # to dataclasses: a field without a default
            return self.default[0]
        held = vars(holder)[self.name]
        if isinstance(held, Rest):
            held = vars(holder)[self.name] = held.graph()
        return cast(Held, held)

    def __set__(self, holder: object, value: Held) -> None:
        vars(holder)[self.name] = value

    def rest(self, holder: object, *, apart: bool = False) -> None:
        """Keep the graph as text from now on."""
        held = vars(holder)[self.name]
        if isinstance(held, Graph):
            vars(holder)[self.name] = Rest.of(held, apart=apart)

    def graphs(self, holder: object) -> Iterator[Graph]:
        """The parts of a graph at rest, else the graph."""
        held = vars(holder)[self.name]
        return held.graphs() if isinstance(held, Rest) else iter([held])


def _apart(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """The nodes that depend on each other together, filling parts; all in their order."""
    order = {node: i for i, node in enumerate(nodes)}
    sets = joined([node, *node.all_input_nodes] for node in nodes)
    for packs in (False, True):
        part: list[Node] = []
        for mates in sets:
            if any(node.target is PACK for node in mates) is packs:
                part += sorted(mates, key=order.__getitem__)
                if len(part) >= PART_NODES:
                    yield part
                    part = []
        if part:
            yield part


def _compressed(nodes: Sequence[Node]) -> bytes:
    return zlib.compress("".join(f"{format_node(node)}\n" for node in nodes).encode())


def _text(part: bytes) -> str:
    return zlib.decompress(part).decode()
