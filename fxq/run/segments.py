"""Segments: a graph is run over many batches segment by segment, every batch through one before the next.

Segments end where little flows on; between the blocks of a model that is the residual stream. So the weights
of a block are read once for all batches, and no more than the stream is kept of each batch meanwhile. They
end, too, before whatever follows from a statistic of all batches:

%x_amax : f32[] = fxq.amax(%x)                  here a segment ends: all batches must have passed
%x_q : bf16[8,64] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
"""

from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph.dialect import is_rounding, is_statistic
from fxq.graph.structure.experts import PICKED
from fxq.graph.structure.views import VIEWS
from fxq.graph.structure.views import varying as varying_nodes

# What gives values as they are, some of them several times.
_REPEATS = VIEWS | PICKED | {torch.ops.aten.repeat_interleave.self_int, torch.ops.aten.expand.default}
# How many parameters in a row may make a segment: several layers, and a search that stays linear.
_LONGEST = 32
# What a segment computed of weights alone is kept for one so many segments later, instead of being read and
# computed again there: about a layer that ends at each of its statistics.
_NEAR = 8
# How much more than the least may flow on at the end of a block: half of what one more activation would be.
_NARROW = 1.5


@dataclass(frozen=True)
class Segment:
    """Nodes that run together.

    shared: parameters and what follows from them and from finished statistics, computed once. varying: what
    depends on the batch, statistics of it among them, computed for each. ends: node -> the values that
    nothing in the segment needs after it (shared ones that batches use last to the end of it). kept: values
    of each batch that later segments use. carried: shared values that later segments use.
    """

    shared: tuple[Node, ...]
    varying: tuple[Node, ...]
    ends: dict[Node, list[Node]]
    kept: frozenset[Node]
    carried: frozenset[Node]


def segments(graph: Graph, scale: float, starts: Container[Node] | None = None) -> list[Segment]:
    """All nodes of a graph but placeholders and the output.

    Cut such that the most that any segment holds is least: its parameters, and what all batches keep before
    and after it. scale: how much larger all batches together are than the example that the graph's types
    describe. starts: the first nodes of segments, if not these but others are wanted; barriers are added. A
    shared value that a much later segment uses too is computed there again.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    varies = varying_nodes(graph)
    folds = {n for n in nodes if is_statistic(n) and any(s in varies for s in n.all_input_nodes)}
    by_batch = varies | folds
    varying = [n for n in nodes if n in by_batch]
    flows = _Flows(graph, varying, folds)
    used = {source for node in nodes for source in node.all_input_nodes}
    place = {node: i for i, node in enumerate(nodes)}
    unused = [n for n in nodes if n not in by_batch and n not in used]
    ready = _ready(varying, by_batch, folds)
    if starts is None:
        cuts = _cuts(flows.alive, _first_uses(varying, by_batch), scale)
    else:
        cuts = [i for i, node in enumerate(varying) if i and node in starts] + [len(varying)]
    cuts = _with_barriers(cuts, flows.alive, [(ready(node), i) for i, node in enumerate(varying)])
    parts: list[tuple[list[Node], list[Node]]] = []
    for start, end in pairwise([0, *cuts, len(varying) + 1]):
        reached = place[varying[end]] if end < len(varying) else len(nodes)
        now = [n for n in unused if place[n] < reached and ready(n) <= start]
        placed = set(now)
        unused = [n for n in unused if n not in placed]
        if start < len(varying) or now:
            parts.append((varying[start:end], now))
    parts = [([*_again(part, varies), *part], now) for part, now in parts]
    needs = _shared_by_segment(parts, by_batch)
    made: list[Segment] = []
    kept: set[Node] = set()
    for (part, _), (shared, carried) in zip(reversed(parts), reversed(needs), strict=True):
        in_order = sorted(shared, key=place.__getitem__)
        ends = _shared_ends(in_order, part, carried) | _ends(part, varies, kept)
        made.append(Segment(tuple(in_order), tuple(part), ends, frozenset(kept), frozenset(carried)))
        kept = kept.difference(part).union(_taken(part, varies))
    return made[::-1]


def narrow_places(graph: Graph) -> list[Node]:
    """Nodes before each of which little flows on from all that is before: nearly as little as anywhere
    between two weights. Between the blocks of a model that is the residual stream."""
    varies = varying_nodes(graph)
    varying = [n for n in graph.nodes if n in varies and n.op not in ("placeholder", "output")]
    alive = _Flows(graph, varying, ()).alive
    heavy = [i for i, size in enumerate(_first_uses(varying, varies)) if size]
    gaps = [min(range(a + 1, b + 1), key=alive.__getitem__) for a, b in pairwise(heavy)]
    least = min((alive[place] for place in gaps), default=0)
    return [varying[place] for place in gaps if alive[place] <= _NARROW * least]


def _shared_by_segment(
    parts: list[tuple[list[Node], list[Node]]], by_batch: Container[Node]
) -> list[tuple[set[Node], set[Node]]]:
    """For each segment, (what it computes of weights, what it hands on of that)."""
    found: list[tuple[set[Node], set[Node]]] = []
    carried: set[Node] = set()
    for i, (part, now) in enumerate(parts):
        shared = _needed([*part, *now], by_batch, carried)
        held = shared | carried
        later = [node for following, more in parts[i + 1 : i + 1 + _NEAR] for node in (*following, *more)]
        carried = _met(later, by_batch, held)
        found.append((shared, carried))
    return found


def _needed(roots: Iterable[Node], by_batch: Container[Node], held: Container[Node]) -> set[Node]:
    """All that the roots need, or are, and that no batch changes, but for what is held already."""
    stack = [n for n in roots if n not in by_batch]
    stack += [n for root in roots for n in root.all_input_nodes if root in by_batch]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in by_batch and node not in held and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _met(roots: Iterable[Node], by_batch: Container[Node], held: Collection[Node]) -> set[Node]:
    """Of what is held, that which is met first on the way up from the roots."""
    if not held:
        return set()
    stack = [n for root in roots for n in (root.all_input_nodes if root in by_batch else [root])]
    found: set[Node] = set()
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in held:
            found.add(node)
        elif node not in by_batch and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _ready(varying: list[Node], by_batch: Container[Node], folds: Container[Node]) -> Callable[[Node], int]:
    """Node -> how many varying nodes must have run for all batches before it can: all up to the last
    statistic that it needs."""
    made = {node: i + 1 for i, node in enumerate(varying) if node in folds}
    known: dict[Node, int] = {}  # of what no batch changes

    def needed(node: Node) -> int:
        if node in made:
            return made[node]
        if node in by_batch:
            return 0  # of this batch
        if node not in known:
            known[node] = max(map(needed, node.all_input_nodes), default=0)
        return known[node]

    return lambda node: max(map(needed, node.all_input_nodes), default=0)


def _with_barriers(cuts: list[int], alive: list[int], barriers: list[tuple[int, int]]) -> list[int]:
    """The cuts, and one where least flows in every barrier (first, last place of a cut) that has none."""
    chosen = set(cuts)
    for first, end in sorted((barrier for barrier in barriers if barrier[0]), key=itemgetter(1)):
        places = range(first, end + 1)
        if chosen.isdisjoint(places):
            chosen.add(min(places, key=lambda place: (alive[place], -place)))
    return sorted(chosen)


def _first_uses(varying: list[Node], by_batch: Container[Node]) -> list[int]:
    """For each varying node the bytes of the parameters that it is the first to need."""
    found: list[int] = []
    seen: set[Node] = set()
    for node in varying:
        new = 0
        stack = [n for n in node.all_input_nodes if n not in by_batch]
        while stack:
            source = stack.pop()
            if source not in seen:
                seen.add(source)
                stack.extend(n for n in source.all_input_nodes if n not in by_batch)
                new += nbytes(source) if source.op == "get_attr" else 0
        found.append(new)
    return found


class _Flows:
    """Where the values of a batch are used last, and how many bytes of them are alive in between."""

    def __init__(self, graph: Graph, varying: list[Node], folds: Container[Node]) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.made = dict.fromkeys(placeholders, -1) | {node: i for i, node in enumerate(varying)}
        self.last = dict(self.made)
        for i, node in enumerate(varying):
            self.last.update(
                (source, i) for source in node.all_input_nodes if source in self.made and source not in folds
            )
        change = [0] * (len(varying) + 2)
        for node, made in self.made.items():
            if node not in folds:  # what all batches show is kept once, and elsewhere
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


def _taken(part: list[Node], varies: Container[Node]) -> dict[Node, None]:
    """The values of a batch that a part takes from earlier ones."""
    own = set(part)
    sources = (source for node in part for source in node.all_input_nodes)
    return dict.fromkeys(source for source in sources if source in varies and source not in own)


def _again(part: list[Node], varies: Container[Node]) -> list[Node]:
    """What a part computes again instead of taking it from an earlier one: rows that are others repeated, as
    with eight experts a token eight times as many as there are tokens, and these rounded."""
    taken = _taken(part, varies)
    found: dict[Node, None] = {}

    def sources(node: Node) -> list[Node]:
        if node.target not in _REPEATS and not is_rounding(node):
            return [node]
        of = [s for source in node.all_input_nodes if source in varies for s in sources(source)]
        return of if sum(nbytes(s) for s in of if s not in taken) < nbytes(node) else [node]

    def compute(node: Node) -> None:
        if node not in found and sources(node) != [node]:
            for source in node.all_input_nodes:
                if source in varies:
                    compute(source)
            found[node] = None

    for node in taken:
        compute(node)
    return list(found)


def _ends(part: list[Node], varies: Container[Node], kept: Container[Node]) -> dict[Node, list[Node]]:
    """Which values of a batch end with each node of a part."""
    last = {source: node for node in part for source in (*node.all_input_nodes, node)}
    ends: dict[Node, list[Node]] = {node: [] for node in part}
    for source, node in last.items():
        if (source in varies or source is node) and source not in kept:
            ends[node].append(source)
    return ends


def _shared_ends(shared: list[Node], varying: list[Node], carried: Container[Node]) -> dict[Node, list[Node]]:
    """Which shared values end with each shared node; those that batches or later segments use do not."""
    last = {node: node for node in shared}
    for node in shared:
        last.update((source, node) for source in node.all_input_nodes if source in last)
    for source in (source for node in varying for source in node.all_input_nodes):
        last.pop(source, None)
    ends: dict[Node, list[Node]] = {node: [] for node in shared}
    for source, node in last.items():
        if source not in carried:
            ends[node].append(source)
    return ends


def nbytes(node: Node) -> int:
    """The size of a node's value, or of its values, at the example sizes."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return sum(v.nbytes for v in values if isinstance(v, Tensor))
