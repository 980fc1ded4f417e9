"""Segments: a graph is run over many batches segment by segment, every batch through one before the next.

Segments end where little flows on; between the blocks of a model that is the residual stream. So the weights
of a block are read once for all batches, and no more than the stream is kept of each batch meanwhile.
"""

from collections.abc import Container
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor
from torch.fx import Graph, Node

# How many parameters in a row may make a segment: several layers, and a search that stays linear.
_LONGEST = 32


@dataclass(frozen=True)
class Segment:
    """Nodes that run together.

    shared: parameters and what depends on nothing else, computed once. varying: what depends on the batch,
    computed for each. ends: node -> the values that nothing in the segment needs after it (shared ones that
    batches use last to the end of it). kept: values of each batch that later segments use.
    """

    shared: tuple[Node, ...]
    varying: tuple[Node, ...]
    ends: dict[Node, list[Node]]
    kept: frozenset[Node]


def segments(graph: Graph, wanted: Container[Node], scale: float) -> list[Segment]:
    """The wanted nodes of a graph, each of whose inputs is wanted too, but not placeholders and the output.

    Cut such that the most that any segment holds is least: its parameters, and what all batches keep before
    and after it. scale: how much larger all batches together are than the example that the graph's types
    describe. A shared value that a later segment uses too is computed there again.
    """
    nodes = [n for n in graph.nodes if n in wanted and n.op not in ("placeholder", "output")]
    varies = _varying(graph)
    varying = [n for n in nodes if n in varies]
    flows = _Flows(graph, varying)
    used = {source for node in nodes for source in node.all_input_nodes}
    place = {node: i for i, node in enumerate(nodes)}
    unused = [n for n in nodes if n not in varies and n not in used]
    made: list[Segment] = []
    start, kept = 0, {n for n in varies if n.op == "placeholder"}
    for end in _cuts(flows.alive, _first_uses(varying, varies), scale):
        part = varying[start:end]
        reached = place[varying[end]] if end < len(varying) else len(nodes)
        now = [n for n in unused if place[n] < reached]
        unused = unused[len(now) :]
        shared = sorted(_needed([*part, *now], varies), key=place.__getitem__)
        kept = {n for n in kept.union(part) if flows.last[n] >= end}
        ends = _shared_ends(shared, part)
        for i, node in enumerate(part, start):
            ends[node] = [n for n in dict.fromkeys((*node.all_input_nodes, node)) if flows.last.get(n) == i]
        made.append(Segment(tuple(shared), tuple(part), ends, frozenset(kept)))
        start = end
    return made


def _varying(graph: Graph) -> set[Node]:
    varies: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in varies for source in node.all_input_nodes):
            varies.add(node)
    return varies


def _needed(roots: list[Node], varies: Container[Node]) -> set[Node]:
    """All shared nodes that the roots need, or are."""
    found: set[Node] = {n for n in roots if n not in varies}
    stack = list(roots)
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in varies and n not in found]
        found.update(new)
        stack.extend(new)
    return found


def _first_uses(varying: list[Node], varies: Container[Node]) -> list[int]:
    """For each varying node the bytes of the parameters that it is the first to need."""
    found: list[int] = []
    seen: set[Node] = set()
    for node in varying:
        new = 0
        stack = [n for n in node.all_input_nodes if n not in varies]
        while stack:
            source = stack.pop()
            if source not in seen:
                seen.add(source)
                stack.extend(source.all_input_nodes)
                new += nbytes(source) if source.op == "get_attr" else 0
        found.append(new)
    return found


class _Flows:
    """Where the values of a batch are used last, and how many bytes of them are alive in between."""

    def __init__(self, graph: Graph, varying: list[Node]) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.made = dict.fromkeys(placeholders, -1) | {node: i for i, node in enumerate(varying)}
        self.last = dict(self.made)
        for i, node in enumerate(varying):
            self.last.update((source, i) for source in node.all_input_nodes if source in self.made)
        change = [0] * (len(varying) + 2)
        for node, made in self.made.items():
            change[made + 1] += nbytes(node)
            change[self.last[node] + 1] -= nbytes(node)
        self.alive: list[int] = []  # bytes alive when so many nodes have run
        total = 0
        for difference in change[:-1]:
            total += difference
            self.alive.append(total)


def _cuts(alive: list[int], parameters: list[int], scale: float) -> list[int]:
    """Where segments end, as numbers of varying nodes that have run: between two parameters, where least
    flows."""
    heavy = [i for i, size in enumerate(parameters) if size]
    if not heavy:
        return [len(parameters)]
    places = [0, *(min(range(a + 1, b + 1), key=alive.__getitem__) for a, b in pairwise(heavy))]
    places.append(len(parameters))
    held = list(accumulate((parameters[i] for i in heavy), initial=0))
    # For each place: (the most held up to there, how many segments, where the last of them starts).
    best: list[tuple[float, int, int]] = [(0, 0, 0)]
    for end in range(1, len(places)):
        options = []
        for start in range(max(0, end - _LONGEST), end):
            flow = scale * (alive[places[start]] + alive[places[end]])
            most = max(best[start][0], held[end] - held[start] + flow)
            options.append((most, best[start][1] + 1, start))
        best.append(min(options))
    ends: list[int] = []
    at = len(places) - 1
    while at:
        ends.append(places[at])
        at = best[at][2]
    return ends[::-1]


def _shared_ends(shared: list[Node], varying: list[Node]) -> dict[Node, list[Node]]:
    """Which shared values end with each shared node; those that batches use do not."""
    last = {node: node for node in shared}
    for node in shared:
        last.update((source, node) for source in node.all_input_nodes)
    for source in (source for node in varying for source in node.all_input_nodes):
        last.pop(source, None)
    ends: dict[Node, list[Node]] = {node: [] for node in shared}
    for source, node in last.items():
        ends[node].append(source)
    return ends


def nbytes(node: Node) -> int:
    """The size of a node's value, or of its values, at the example sizes."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return sum(v.nbytes for v in values if isinstance(v, Tensor))
