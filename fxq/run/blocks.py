"""Blocks: a model block by block, with the inputs of all batches, for passes that need many steps.

    blocks = Blocks(program, source, device)
    with closing(blocks.run(batches)) as each:
        for block in each:
            wanted = block.outputs(0, ORIGINAL)                      # batch 0, of the unquantized model
            found = block.outputs(0, DEPLOYED, {rounding: learned})  # gradients flow to `learned`
            block.decide({rounding: chosen})                         # what later blocks see

A block is an attention and all that follows until the next, from one place where little flows on (the
residual stream) to another; what follows the last layer is a block too. Without attentions, it is what lies
between two such places.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions
from fxq.graph.structure.views import varying
from fxq.numbers.formats import Measured
from fxq.run.expressions import RunGraph, Variant
from fxq.run.segments import Segment, narrow_places, nbytes
from fxq.run.simulate import DEPLOYED, ORIGINAL
from fxq.run.statistics import Taken
from fxq.run.streaming import BatchState, BatchStates, Streaming, last_use


class Block:
    """One block, with all batches before it.

    parameters: those that it reads, by name, on the device. roundings: the program's roundings of weights in
    it. packed: those that are packed together -> (the weights [n, out, in], amaxes f32 [n], what they pack
    to). batches: how many there are. is_last: whether nothing follows. All of it is there until the next
    block is asked for.
    """

    def __init__(
        self, blocks: "Blocks", parts: Sequence[Segment], states: BatchStates, is_last: bool
    ) -> None:
        self._blocks, self._entering, self.is_last = blocks, states, is_last
        self._nodes = [node for part in parts for node in (*part.shared, *part.varying)]
        self._varying = [node for part in parts for node in part.varying]
        self._kept = parts[-1].kept if parts else frozenset()
        self.left: BatchStates | None = None  # what all batches left it with, if they passed
        self.shared: BatchState = {}
        self.parameters: dict[str, Tensor] = {}
        self.packed: dict[tuple[Node, ...], tuple[Tensor, Tensor, Measured]] = {}
        self.roundings = [node for made in self._nodes for node in blocks.origins.get(made, ())]
        self.batches = len(states)

    def inputs(self, batch: int, variant: Variant) -> dict[str, Tensor]:
        """What enters the block of a batch in one variant of the model, by the program's name of its node."""
        return self._named(self._entering.peek(batch), variant)

    def outputs(
        self, batch: int, variant: Variant, replaced: Mapping[Node, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What leaves the block, by the program's name of its node: of its last value, the model's output.

        replaced: nodes of the program (parameters, roundings, rewrites, activations) -> what they are
        instead, to which gradients flow. Roundings have the gradient of what they round.
        """
        leaving = self._leaving(variant)
        if self.left is not None and variant is ORIGINAL and not replaced:
            known = self.left.peek(batch)
            if all(node in known for node in leaving):
                return self._named({node: known[node] for node in leaving}, variant)
        return self._named(self._computed(batch, variant, replaced or {}, leaving), variant)

    def value(self, node: Node) -> Tensor:
        """A node of the program that no batch changes, such as a parameter, in the deployed variant."""
        return self._common(self._blocks.made_of(DEPLOYED)[node])  # type: ignore[no-any-return]

    def reads(self, node: Node) -> bool:
        """Whether the block computes with a node of the program in the deployed variant."""
        return not self._readers(node).isdisjoint(self._nodes)

    def reads_alone(self, node: Node) -> bool:
        """Whether no other block does."""
        return self._readers(node) <= set(self._nodes)

    def _readers(self, node: Node) -> set[Node]:
        made = self._blocks.made_of(DEPLOYED).get(node)
        return set() if made is None else set(made.users)

    def decide(self, replaced: Mapping[Node, Tensor]) -> None:
        """From here on, nodes of the program are these values in the deployed variant."""
        own = self._blocks.made_of(DEPLOYED)
        self._blocks.decided.update((own[node], value) for node, value in replaced.items())

    @torch.no_grad()
    def leave(self) -> BatchStates:
        """What all batches leave the block with, as it was decided."""
        assert self.left is not None
        if self._blocks.decided.keys() & set(self._nodes):
            leaving = [node for node in self._leaving(DEPLOYED) if node in self._kept]
            for i in range(self.batches):
                made = self._computed(i, DEPLOYED, {}, leaving)
                self.left.put(i, {**self.left.take(i), **made})
            carried = self._blocks.carried
            carried.update(self._computed(0, DEPLOYED, {}, list(carried)))
        return self.left

    def _computed(
        self, batch: int, variant: Variant, replaced: Mapping[Node, Tensor], wanted: Sequence[Node]
    ) -> BatchState:
        """The values of nodes of the run that are the batch's own, or follow from what is replaced."""
        own = self._blocks.made_of(variant)
        given = dict(self._blocks.decided) if variant is DEPLOYED else {}
        given.update((own[node], value) for node, value in replaced.items() if node in own)
        needed, changed = self._needed(wanted, given), {*self._varying, *given}
        env: BatchState = {**self._entering.peek(batch), **given}
        for node in self._nodes:
            is_own = node in changed or not changed.isdisjoint(node.all_input_nodes)
            if node in needed and node not in env and is_own and not self._blocks.is_found(node):
                changed.add(node)
                env[node] = self._value(node, env)
        return {node: env[node] for node in wanted if node in env}

    def _leaving(self, variant: Variant) -> list[Node]:
        result = self._blocks.result
        ends = [result, *(result.all_input_nodes if result is not None else ())]
        made = set(self._blocks.made_of(variant).values())
        return [n for n in self._varying if n in made and (n in self._kept or n in ends)]

    def _needed(self, leaving: Sequence[Node], given: Mapping[Node, Tensor]) -> set[Node]:
        """The nodes of the block that lead to what leaves it; statistics are known."""
        known, needed, stack = set(self._nodes), set[Node](), list(leaving)
        while stack:
            node = stack.pop()
            if node in known and node not in needed and node not in given:
                needed.add(node)
                stack += [] if self._blocks.is_found(node) else node.all_input_nodes
        return needed

    @torch.no_grad()
    def _common(self, node: Node) -> Any:
        """A value that follows from parameters and statistics."""
        if node not in self.shared:
            if self._blocks.is_found(node):
                self.shared[node] = self._blocks.found[node]
            elif node in self._blocks.carried:
                self.shared[node] = self._blocks.carried[node]
            else:
                self.shared[node] = self._value(node, {n: self._common(n) for n in node.all_input_nodes})
        return self.shared[node]

    def _value(self, node: Node, env: BatchState) -> Any:
        self._blocks.env = {n: env[n] if n in env else self._common(n) for n in node.all_input_nodes}
        return self._blocks.run_node(node)

    def _named(self, values: Mapping[Node, Any], variant: Variant) -> dict[str, Tensor]:
        names = {made: node.name for node, made in self._blocks.made_of(variant).items()}
        return {names[n]: v for n, v in values.items() if n in names and isinstance(v, Tensor)}


class Blocks(Streaming):
    """A program's model as it was and as it is deployed, side by side.

    Statistics that the program does not know are found when a block is entered, of the deployed model whose
    earlier blocks are as they were decided, and kept in `program.values`. whole: whether all of the model is
    one block. keep: whether a statistic of this name, if it is no single number, is of use after the run.
    """

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        device: torch.device,
        *,
        whole: bool = False,
        keep: Callable[[str], bool] = lambda name: True,
    ) -> None:
        graph = program.calibrated or program.graph
        output = [node for node in graph.nodes if node.op == "output"]
        made = RunGraph(graph, output, (ORIGINAL, DEPLOYED), values=program.values)
        self._of = dict(zip((ORIGINAL, DEPLOYED), made.copies, strict=True))
        self.taken = Taken(program, made, self._of[DEPLOYED], keep)
        super().__init__(
            made.graph,
            source,
            device,
            constants=program.constants,
            values=program.values,
            origins=made.origins,
            hold=True,
            reduce=lambda value, i: None,
        )
        self.starts = frozenset(self._of[ORIGINAL][node] for node in (() if whole else block_starts(graph)))
        self.decided: dict[Node, Tensor] = {}

    def made_of(self, variant: Variant) -> Mapping[Node, Node]:
        """Node of the program -> its counterpart in one variant."""
        return self._of[variant]

    def bytes_of(self, tokens: int) -> int:
        """About what the whole model takes with gradients, for a batch of so many tokens: its parameters, as
        they are and rounded, and every activation of the deployed variant."""
        own, varies = set(self._of[DEPLOYED].values()), varying(self.graph)
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        parameters = sum(nbytes(n) for n in self.graph.nodes if self._is_read(n))
        activations = sum(nbytes(n) for n in self.graph.nodes if n in own and n in varies)
        return 2 * parameters + activations * tokens // first.meta["val"].numel()

    def is_found(self, node: Node) -> bool:
        """Whether a node is a statistic that all batches have passed."""
        return node in self.found

    def run(self, batches: Sequence[Tensor]) -> Generator[Block]:  # type: ignore[override]
        """Every block in order, for batches int64 [B, S]. When the next is asked for, all batches pass the
        last one as it is by then."""
        states = self._states(batches, None)
        plan = self._plan(states, batches)
        last = last_use(plan)
        parts, done = list(self._by_block(plan)), 0
        with closing(self._parameters(plan)) as parameters:
            for part in parts:
                done += len(part)
                block = Block(self, part, states, done == len(plan))
                self._enter(block, part, parameters, states)
                yield block
                if not block.is_last:
                    states = block.leave()
                self.env = {}
                for kept in (self.found, self.decided):
                    for node in [n for n in kept if last.get(n, (-1, n))[0] < done]:
                        del kept[node]

    def run_node(self, n: Node) -> Any:
        return self.decided[n] if n in self.decided else super().run_node(n)

    def _enter(
        self,
        block: Block,
        part: Sequence[Segment],
        parameters: Iterator[tuple[Node, Tensor]],
        states: BatchStates,
    ) -> None:
        """Read a block's parameters, and let all batches pass it, which finds its statistics; the last block
        only if it has any, or roundings."""
        takes = any(dialect.is_statistic(node) for segment in part for node in segment.varying)
        passes = takes or bool(block.roundings) or not block.is_last
        block.left = states.copy() if passes else None
        self.sink = lambda roundings, *found: block.packed.update({roundings: found})
        for segment in part:
            if passes:
                shared = self._run_shared(segment, parameters, len(states))
                self._pass(segment, shared, block.left)
                self.carried = {node: shared[node] for node in segment.carried}
            else:
                read = (next(parameters) for node in segment.shared if self._is_read(node))
                shared = {node: value.view(node.meta["val"].shape) for node, value in read}
            resident = {str(n.target): value for n, value in shared.items() if self._is_read(n)}
            self.taken.take(self.found, resident)
            block.parameters.update(resident)
            block.shared.update(shared)
        self.sink = None

    def _pass(self, segment: Segment, shared: BatchState, states: BatchStates | None) -> None:
        assert states is not None
        for i in range(len(states)):
            states.put(i, self._run_varying(segment, {**self.found, **shared, **states.take(i)}, i))
        self.env = {}

    def _by_block(self, plan: Sequence[Segment]) -> Iterator[list[Segment]]:
        part: list[Segment] = []
        for segment in plan:
            if part and segment.varying and segment.varying[0] in (self.starts or ()):
                yield part
                part = []
            part.append(segment)
        if part:
            yield part


def block_starts(graph: Graph) -> Iterator[Node]:
    """The nodes of a program that its blocks begin with, but for the first."""
    run = RunGraph(graph, [node for node in graph.nodes if node.op == "output"], (ORIGINAL,))
    names = {made: node for node, made in run.copies[0].items()}
    places = [names[made] for made in narrow_places(run.graph) if made in names]
    order = {node: i for i, node in enumerate(graph.nodes)}
    mixers = sorted(order[attention.node] for attention in attentions(graph))
    ends = [*(order[place] for place in places[1:]), len(order)]
    for place, end in zip(places, ends, strict=True):
        has_mixer = any(order[place] <= at < end for at in mixers)
        is_after_all = bool(mixers) and place is places[-1] and mixers[-1] < order[place]
        if not mixers or (mixers[0] < order[place] and has_mixer) or is_after_all:
            yield place
