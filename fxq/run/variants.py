"""Variants: many ways to round one model, side by side, block by block: each weight is read once for all.

    run = Variants(program, source, device)
    first, second = run.divergences(batches, [Variant({"q_which": 0}), Variant({"q_which": 1})])

A variant says which value each choice (`fxq.choose`) takes. Up to the first block that holds one of its
choices it is its parent, by default the model that rounds nothing; from there on it is one more state of each
batch, which passes every block as all others do. At the end its predictions are compared with those of the
model that rounds nothing, a batch at a time.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.choices import which_of
from fxq.graph.dialect import is_rounding, is_statistic
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.groups import head
from fxq.graph.structure.matmuls import Frontiers, as_weight_matmul
from fxq.graph.structure.views import VIEWS, strip, varying
from fxq.run import likelihood
from fxq.run.blocks import block_starts
from fxq.run.expressions import RunGraph
from fxq.run.loader import loaded
from fxq.run.simulate import DEPLOYED
from fxq.run.streaming import BatchState, BatchStates, Streaming


@dataclass(frozen=True)
class Variant:
    """chosen: name of a choice -> the place of the value that it takes; a choice that is not named is
    unrounded. others: whether roundings that no choice holds are done. parent: the place, in the list of
    variants, of an earlier one that this one is until they differ; None for the model that rounds nothing."""

    chosen: Mapping[str, int]
    others: bool = False
    parent: int | None = None


ROUNDED_NOWHERE = Variant({})


@dataclass
class _Part:
    """A part of the graph that all batches pass before the next: a block of the model, or its head.

    nodes: those that batches change, statistics among them. entering: what they need of earlier parts.
    parameters: what is read for them. choices: the names of choices between them; has_others: whether they
    need roundings that no choice holds. kept: what later parts need of this one and earlier ones.
    """

    nodes: list[Node]
    entering: set[Node] = field(default_factory=set)
    parameters: list[Node] = field(default_factory=list)
    choices: set[str] = field(default_factory=set)
    has_others: bool = False
    kept: set[Node] = field(default_factory=set)

    def own(self, variant: Variant) -> tuple[frozenset[tuple[str, int]], bool]:
        """What a variant says of this part: equal for two that are alike in it."""
        chosen = ((name, place) for name, place in variant.chosen.items() if name in self.choices)
        return frozenset(chosen), variant.others and self.has_others


@dataclass(frozen=True)
class _Plan:
    """nodes: what is computed for a batch, in order; ends: what nothing needs after each."""

    nodes: list[Node]
    ends: list[list[Node]]


class Variants(Streaming):
    """A program with choices.

    Statistics of activations that the program lacks are taken on the way, of the model that rounds nothing.
    step is called once for each of the `parts`.
    """

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        graph = program.graph
        output = [node for node in graph.nodes if node.op == "output"]
        made = RunGraph(graph, output, (DEPLOYED,), values=program.values)
        super().__init__(
            made.graph,
            source,
            device,
            constants=program.constants,
            values=program.values,
            origins=made.origins,
        )
        assert self.result is not None
        self._offered = {value for node in _chooses(self.graph.nodes) for value in nodes_at(node, 0)}
        varies = varying(self.graph)
        taken = (n for n in self.graph.nodes if is_statistic(n) and not varies.isdisjoint(n.all_input_nodes))
        self._by_batch = varies | set(taken)
        self._differing = self._following_choices()
        self._order = {node: i for i, node in enumerate(self.graph.nodes)}
        self._always = {n for n in self._behind([self.result], ROUNDED_NOWHERE) if n in self._by_batch}
        starts = [made.copies[0][node] for node in block_starts(graph)]
        if (logits := head(graph, Frontiers(graph))) is not None:
            starts.append(made.copies[0][logits])
        self.parts = self._parts(starts)
        self._plans: dict[object, _Plan] = {}
        self._read: dict[Node, Tensor] = {}
        self._known: dict[object, Any] = {}

    @torch.no_grad()
    def divergences(self, batches: Sequence[Tensor], variants: Sequence[Variant]) -> list[float]:
        """KL(the model that rounds nothing || variant) in nats, the mean over all predicted tokens of batches
        int64 [B, S], for each variant."""
        assert self.result is not None
        every = [ROUNDED_NOWHERE, *variants]
        sums = [0.0] * len(every)
        states = self._states_of(batches, len(every))
        rides_on = [0] * len(every)  # of each variant, which one it still is
        for part in self._walk(batches, states):
            if part is not self.parts[-1]:
                self._pass(part, every, rides_on, states, len(batches))
                continue
            for b in range(len(batches)):
                original: Tensor | None = None
                for v, variant in enumerate(every):
                    state = states.peek(rides_on[v] * len(batches) + b)
                    logits = self._run(part, state, variant, [self.result])[self.result]
                    original = logits if original is None else original
                    sums[v] += float(likelihood.divergences(original, logits)[0].sum()) if v else 0.0
        tokens = sum(len(batch) * (batch.shape[1] - 1) for batch in batches)
        return [total / tokens for total in sums[1:]]

    @torch.no_grad()
    def output_errors(self, batches: Sequence[Tensor], variants: Sequence[Variant]) -> list[float]:
        """Sum over the matmuls whose weights a variant rounds of |y' - y|^2 / |y|^2 over all tokens: y is
        what a matmul gives in the model that rounds nothing, y' what it gives if the variant's choices of its
        block are taken. For each variant."""
        errors = [0.0] * len(variants)
        states = self._states_of(batches, 1)
        for part in self._walk(batches, states):
            for v, variant in enumerate(variants):
                wanted = [node for node in part.nodes if _chosen_by(node) in variant.chosen]
                sums = dict.fromkeys(wanted, (0.0, 0.0))
                for b in range(len(batches) if wanted else 0):
                    state = states.peek(b)
                    before = self._run(part, state, ROUNDED_NOWHERE, wanted)
                    after = self._run(part, state, variant, wanted)
                    for node, (error, energy) in sums.items():
                        y, found = before[node].double(), after[node].double()
                        sums[node] = (
                            error + float((found - y).square().sum()),
                            energy + float(y.square().sum()),
                        )
                errors[v] += sum(error / energy for error, energy in sums.values() if energy)
            if part is not self.parts[-1]:
                self._pass(part, [ROUNDED_NOWHERE], [0], states, len(batches))
        return errors

    @torch.no_grad()
    def weight_errors(self, variants: Sequence[Variant]) -> list[float]:
        """Sum over the weights that a variant rounds of |w' - w|^2 / |w|^2, all experts of a layer being one
        weight. For each variant; needs no text."""
        errors = [0.0] * len(variants)
        weights = [node for node in _chooses(self.graph.nodes) if node not in self._by_batch]
        seen: set[Node] = set()
        for part in self._walk([], None):
            here = [node for node in weights if which_of(node) in part.choices and node not in seen]
            seen.update(here)
            for v, variant in enumerate(variants):
                for node in here:
                    if which_of(node) in variant.chosen:
                        w = self._shared(self._stands(node, ROUNDED_NOWHERE), part, ROUNDED_NOWHERE).double()
                        found = self._shared(self._stands(node, variant), part, variant)
                        errors[v] += float((found - w).square().sum() / w.square().sum().clamp_min(1e-300))
        return errors

    def _walk(self, batches: Sequence[Tensor], states: BatchStates | None) -> Generator[_Part]:
        """Every part, its parameters and its statistics being there."""
        requests = (self._request(node) for part in self.parts for node in part.parameters)
        with closing(loaded(requests, self.device, concurrent=self.source.concurrent)) as parameters:
            for part in self.parts:
                for node in part.parameters:
                    self._read[node] = next(parameters)[1].view(node.meta["val"].shape)
                statistics = [node for node in part.nodes if is_statistic(node)]
                for b in range(len(batches) if statistics and states is not None else 0):
                    assert states is not None
                    self._run(part, states.peek(b), ROUNDED_NOWHERE, statistics)
                yield part
                self._read, self._known = {}, {}
                self.step(1)

    def _states_of(self, batches: Sequence[Tensor], variants: int) -> BatchStates:
        """A place for the state of each batch in each variant, batch by batch within a variant."""
        self.found = {}
        (ids,) = [n for n in self.graph.nodes if n.op == "placeholder"]
        begun: list[BatchState] = [{ids: batch} for batch in batches]
        return BatchStates(self.device, begun + [{} for _ in range(len(batches) * (variants - 1))])

    def _pass(
        self,
        part: _Part,
        variants: Sequence[Variant],
        rides_on: list[int],
        states: BatchStates,
        batches: int,
    ) -> None:
        """All batches through a part in all variants; those that depart in it first, as they begin with what
        others enter it with."""
        before, kept = list(rides_on), list(part.kept)
        for v, variant in enumerate(variants[1:], 1):
            parent = 0 if variant.parent is None else variant.parent + 1
            if before[v] != v:
                departs = part.own(variant) != part.own(variants[parent])
                rides_on[v] = v if departs else rides_on[parent]
        departing = [v for v, old in enumerate(before) if rides_on[v] == v != old]
        for v in departing:
            for b in range(batches):
                state = states.peek(before[v] * batches + b)
                states.put(v * batches + b, self._run(part, state, variants[v], kept))
        for v in (v for v, old in enumerate(before) if old == v):
            for b in range(batches):
                state = states.take(v * batches + b)
                states.put(v * batches + b, self._run(part, state, variants[v], kept))

    def _run(self, part: _Part, state: BatchState, variant: Variant, wanted: Sequence[Node]) -> BatchState:
        """One batch through a part: the values that are wanted."""
        plan = self._plan_of(part, variant, wanted)
        env = dict(state)

        def value(node: Node) -> Any:
            stands = self._stands(node, variant)
            if stands in self.found:
                return self.found[stands]
            return env[stands] if stands in self._by_batch else self._shared(stands, part, variant)

        for node, dead in zip(plan.nodes, plan.ends, strict=True):
            args, kwargs = map_arg((node.args, node.kwargs), value)  # type: ignore[misc, arg-type]
            if is_statistic(node):
                self.fold(node, args, kwargs)
            else:
                env[node] = self.call(node, args, kwargs)
            for ended in dead:
                env.pop(ended, None)
        return {node: value(node) for node in wanted if node not in self.found}

    def _plan_of(self, part: _Part, variant: Variant, wanted: Sequence[Node]) -> _Plan:
        key = (id(part), part.own(variant), frozenset(wanted))
        if key not in self._plans:
            stands = [self._stands(node, variant) for node in wanted]
            here = [
                node
                for node in self._behind(stands, variant, part)
                if node in self._by_batch and node not in part.entering
            ]
            nodes = sorted(here, key=self._order.__getitem__)
            last: dict[Node, int] = {}
            for i, node in enumerate(nodes):
                last.update((self._stands(source, variant), i) for source in node.all_input_nodes)
            ends: list[list[Node]] = [[] for _ in nodes]
            for source, i in last.items():
                if source not in stands:
                    ends[i].append(source)
            self._plans[key] = _Plan(nodes, ends)
        return self._plans[key]

    def _behind(self, wanted: Iterable[Node], variant: Variant, part: _Part | None = None) -> set[Node]:
        """All that nodes are computed from in a variant, themselves included, but for statistics, which are
        known by then; within a part as far as what enters it."""
        asked = {self._stands(node, variant) for node in wanted}
        stack, found = list(asked), set[Node]()
        while stack:
            node = stack.pop()
            if node in found or (node in self._by_batch and is_statistic(node) and node not in asked):
                continue
            found.add(node)
            if part is None or node not in part.entering:
                stack += [self._stands(source, variant) for source in node.all_input_nodes]
        return found

    def _stands(self, node: Node, variant: Variant) -> Node:
        """What a node is in a variant: itself, the value of a choice, or what is not rounded in it."""
        while True:
            if node.target is dialect.CHOOSE:
                place = variant.chosen.get(which_of(node))
                first = nodes_at(node, 0)[0]
                unrounded = node_at(first, 0) if is_rounding(first) else first
                node = unrounded if place is None else nodes_at(node, 0)[place]
            elif is_rounding(node) and node not in self._offered and not variant.others:
                node = node_at(node, 0)
            else:
                return node

    def _shared(self, node: Node, part: _Part, variant: Variant) -> Any:
        """A value that no batch changes, computed once while its part runs."""
        key = (node, part.own(variant)) if node in self._differing else node
        if key not in self._known:
            if node in self._read:
                self._known[key] = self._read[node]
            elif node.op == "get_attr" or node.target is dialect.VALUE:
                self._known[key] = self.run_node(node)
            else:

                def value(source: Node) -> Any:
                    stands = self._stands(source, variant)
                    return self.found[stands] if stands in self.found else self._shared(stands, part, variant)

                args, kwargs = map_arg((node.args, node.kwargs), value)  # type: ignore[misc, arg-type]
                self._known[key] = self.call(node, args, kwargs)
        return self._known[key]

    def _following_choices(self) -> set[Node]:
        """The nodes that no batch changes and that differ by variant."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            is_other = is_rounding(node) and node not in self._offered
            reads = any(s in found or s.target is dialect.CHOOSE for s in node.all_input_nodes)
            if node not in self._by_batch and (is_other or reads):
                found.add(node)
        return found

    def _parts(self, starts: Iterable[Node]) -> list[_Part]:
        cuts = sorted({self._order[node] for node in starts})
        by_place: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node in self._by_batch and node.op != "placeholder":
                by_place.setdefault(bisect_right(cuts, self._order[node]), []).append(node)
        parts = [_Part(nodes) for _, nodes in sorted(by_place.items())]
        for part in parts:
            self._look_behind(part)
        later: set[Node] = set()
        made = {node: i for i, part in enumerate(parts) for node in part.nodes}
        for i, part in reversed(list(enumerate(parts))):
            part.kept = {node for node in later if made.get(node, -1) <= i}
            later |= part.entering
        return parts

    def _look_behind(self, part: _Part) -> None:
        """Fill in what a part needs, whatever is chosen."""
        here, seen = set(part.nodes), set[Node]()
        stack = list(part.nodes)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            is_elsewhere = node in self._by_batch and node not in here
            if is_elsewhere and (node in self._always or node.op == "placeholder"):
                part.entering.add(node)
                continue
            if is_elsewhere and is_statistic(node):
                continue
            if node.target is dialect.CHOOSE:
                part.choices.add(which_of(node))
            part.has_others |= is_rounding(node) and node not in self._offered
            if self._is_read(node):
                part.parameters.append(node)
            stack += node.all_input_nodes
        part.parameters.sort(key=self._order.__getitem__)


def _chooses(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.target is dialect.CHOOSE]


def _chosen_by(node: Node) -> str | None:
    """The name of the choice of a matmul's weight; None if it has none."""
    matmul = as_weight_matmul(node)
    w = strip(matmul.w, VIEWS) if matmul is not None else node
    return which_of(w) if w is not node and w.target is dialect.CHOOSE else None
