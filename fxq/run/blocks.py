"""Blocks: a model block by block, with the inputs of all batches, for passes that need many steps.

    blocks = Blocks(program, source, device)
    with closing(blocks.run(batches)) as each:
        for block in each:
            wanted = block.outputs(0, ORIGINAL)                      # batch 0, of the unquantized model
            found = block.outputs(0, DEPLOYED, {rounding: learned})  # gradients flow to `learned`
            program.values["w_codes"] = ...                          # what later blocks see, and is written

A block is an attention and all that follows until the next, from one place where little flows on (the
residual stream) to another; without attentions, what lies between two such places.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions
from fxq.run.expressions import RunGraph, Variant
from fxq.run.segments import Segment, narrow_places
from fxq.run.simulate import DEPLOYED, ORIGINAL
from fxq.run.streaming import BatchState, BatchStates, Streaming


class Block:
    """One block, with all batches before it.

    parameters: those that it reads, by name, on the device. roundings: the program's roundings of weights in
    it. batches: how many there are. All of it is there until the next block is asked for.
    """

    def __init__(
        self, blocks: "Blocks", segment: Segment, parameters: Mapping[Node, Tensor], states: BatchStates
    ) -> None:
        self._blocks, self._segment, self._read, self._states = blocks, segment, parameters, states
        self._shared: BatchState = {}
        self.parameters = {str(node.target): value for node, value in parameters.items()}
        known = (*segment.shared, *segment.varying)
        self.roundings = [node for made in known for node in blocks.origins.get(made, ())]
        self.batches = len(states)

    def inputs(self, batch: int, variant: Variant) -> dict[str, Tensor]:
        """What enters the block of a batch in one variant of the model, by the program's name of its node."""
        return self._named(self._states.peek(batch), variant)

    def outputs(
        self, batch: int, variant: Variant, replaced: Mapping[Node, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What leaves the block, by the program's name of its node: of its last value, the model's output.

        replaced: nodes of the program (parameters, roundings, rewrites, activations) -> what they are
        instead, to which gradients flow. Roundings have the gradient of what they round.
        """
        own = self._blocks.made_of(variant)
        given = {own[node]: value for node, value in (replaced or {}).items() if node in own}
        needed = self._needed(variant, given)
        env: BatchState = {**self._states.peek(batch), **given}
        for node in (*self._segment.shared, *self._segment.varying):
            if node not in needed or node in given:
                continue
            is_own = any(source in given or source in env for source in node.all_input_nodes)
            env[node] = (
                self._value(node, env) if is_own or node in self._segment.varying else self._kept(node)
            )
        leaving = {node: env[node] for node in self._leaving(variant) if node in env}
        return self._named(leaving, variant)

    def _leaving(self, variant: Variant) -> Iterator[Node]:
        result = self._blocks.result
        ends = [result, *(result.all_input_nodes if result is not None else ())]
        made = set(self._blocks.made_of(variant).values())
        return (n for n in self._segment.varying if n in made and (n in self._segment.kept or n in ends))

    def _needed(self, variant: Variant, given: Mapping[Node, Tensor]) -> set[Node]:
        """The nodes of the segment that lead to what leaves it."""
        known = {*self._segment.shared, *self._segment.varying}
        stack, needed = list(self._leaving(variant)), set[Node]()
        while stack:
            node = stack.pop()
            if node in known and node not in needed and node not in given:
                needed.add(node)
                stack += node.all_input_nodes
        return needed

    @torch.no_grad()
    def _kept(self, node: Node) -> Any:
        """A value that follows from parameters, computed once."""
        if node not in self._shared:
            env = {source: self._kept(source) for source in node.all_input_nodes}
            self._shared[node] = self._value(node, env)
        return self._shared[node]

    def _value(self, node: Node, env: BatchState) -> Any:
        if node in self._read:
            return self._read[node]
        if node in self._blocks.carried:
            return self._blocks.carried[node]
        known = {n: env[n] if n in env else self._kept(n) for n in node.all_input_nodes}
        self._blocks.env = known
        return self._blocks.run_node(node)

    def _named(self, values: Mapping[Node, Any], variant: Variant) -> dict[str, Tensor]:
        names = {made: node.name for node, made in self._blocks.made_of(variant).items()}
        return {names[n]: v for n, v in values.items() if n in names and isinstance(v, Tensor)}


class Blocks(Streaming):
    """A program's model as it was and as it is deployed, side by side.

    Statistics must be known; `fxq.value` nodes read `program.values` when a block has been left, or when it
    is run before, and so may be set on the way.
    """

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        graph = program.calibrated or program.graph
        output = [node for node in graph.nodes if node.op == "output"]
        made = RunGraph(graph, output, (ORIGINAL, DEPLOYED), values=program.known_values())
        self._of = dict(zip((ORIGINAL, DEPLOYED), made.copies, strict=True))
        starts = {self._of[ORIGINAL][node] for node in block_starts(graph)}
        super().__init__(
            made.graph,
            source,
            device,
            constants=program.constants,
            values=program.values,
            origins=made.origins,
        )
        self.starts = frozenset(starts)

    def made_of(self, variant: Variant) -> Mapping[Node, Node]:
        """Node of the program -> its counterpart in one variant."""
        return self._of[variant]

    def run(self, batches: Sequence[Tensor]) -> Generator[Block]:  # type: ignore[override]
        """Every block in order, for batches int64 [B, S]. When the next is asked for, all batches pass the
        last one as it is by then, in both variants."""
        states = self._states(batches, None)
        plan = self._plan(states, batches)
        with closing(self._parameters(plan)) as parameters:
            for segment in plan:
                read = dict(next(parameters) for node in segment.shared if self._is_read(node))
                read = {node: value.view(node.meta["val"].shape) for node, value in read.items()}
                yield Block(self, segment, read, states)
                with torch.no_grad():
                    self._pass(segment, iter(read.items()), states)

    def _pass(self, segment: Segment, read: Iterator[tuple[Node, Tensor]], states: BatchStates) -> None:
        shared = self._run_shared(segment, read, len(states))
        for i in range(len(states)):
            states.put(i, self._run_varying(segment, {**shared, **states.take(i)}, i))
        self.carried = {node: shared[node] for node in segment.carried}
        self.env = {}


def block_starts(graph: Graph) -> Iterator[Node]:
    """The nodes of a program that its blocks begin with, but for the first."""
    run = RunGraph(graph, [node for node in graph.nodes if node.op == "output"], (ORIGINAL,))
    names = {made: node for node, made in run.copies[0].items()}
    places = [names[made] for made in narrow_places(run.graph) if made in names]
    order = {node: i for i, node in enumerate(graph.nodes)}
    mixers = sorted(order[attention.node] for attention in attentions(graph))
    ends = [*(order[place] for place in places[1:]), len(order)]
    for place, end in zip(places, ends, strict=True):
        if not mixers or (mixers[0] < order[place] and any(order[place] <= at < end for at in mixers)):
            yield place
