"""Streaming: runs a graph over many batches. A weight is read when first used and freed after its last use.

Every batch goes through one segment of the graph before the next segment's weights are used, and those are
read meanwhile: a weight is read once for the whole calibration set, not once a batch.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from fxq.graph import dialect
from fxq.graph.dialect import is_statistic
from fxq.graph.hub import WeightSource
from fxq.numbers.formats import FORMATS, Measured
from fxq.run.loader import Request, loaded
from fxq.run.segments import Segment, segments
from fxq.run.work import Step, example_tokens, no_step, work

# The values that one batch has between two segments.
BatchState = dict[Node, Any]
# Parameters at hand, by name.
Resident = dict[str, Tensor]
# Takes (roundings, the weights [n, out, in] that they round, amaxes f32 [n], the weights packed).
Sink = Callable[[tuple[Node, ...], Tensor, Tensor, Measured], None]


class Streaming(Interpreter):
    """Runs a graph over batches, fetching weights from a source and freeing every value after its last use.

    graph: all of it runs; see `fxq.run.expressions.RunGraph` for one of what is wanted. values: what its
    `fxq.value` nodes stand for. device: where it runs; the devices written in the graph are those it was
    traced on, and are replaced. origins: roundings of weights in it -> the nodes of the program that each is;
    sink: is given what these pack to. hold: whether parameters are kept to the end of their segment. reduce:
    what to keep of each batch's output (value, batch index), so that logits of many batches never pile up.
    step is given what was done, of `fxq.run.work.total`.
    found: its statistics, as far as batches have passed; see `complete`.
    What batches keep between segments stays on a GPU as long as it takes no more than half of the memory that
    was free, and lies in host memory beyond that.
    """

    def __init__(
        self,
        graph: Graph,
        source: WeightSource,
        device: torch.device,
        *,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
        values: Mapping[str, Tensor] = MappingProxyType({}),
        origins: Mapping[Node, tuple[Node, ...]] = MappingProxyType({}),
        sink: Sink | None = None,
        hold: bool = False,
        step: Step = no_step,
        reduce: Callable[[Any, int], Any] = lambda value, i: value,
    ) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.source, self.device, self.step, self.reduce = source, device, step, reduce
        self.constants, self.values, self.origins, self.sink = constants, values, origins, sink
        self.hold = hold
        self.starts: frozenset[Node] | None = None
        self.found: dict[Node, Tensor] = {}
        self.carried: BatchState = {}
        self._complete: set[Node] = set()
        self.extra_traceback = False  # errors meant for users stay as they are worded
        outputs = [n for n in self.graph.nodes if n.op == "output"]
        self.result = next((n for node in outputs for n in node.all_input_nodes), None)

    def run_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Any]:
        """The graph's first output (as `reduce` keeps it) for each batch of token ids int64 [B, S]; None
        without an output.

        masks: attention masks int64 [B, S], for a graph traced with `padded`.
        """
        outputs: list[Any] = [None] * len(batches)
        for i, value in self.stream(batches, masks):
            outputs[i] = value
        return outputs

    def stream(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None
    ) -> Generator[tuple[int, Any]]:
        """The outputs of `run_batches` with the batch's number, one at a time and not kept.

        All batches have gone through every segment but the last by then, so that two models' outputs can be
        compared batch by batch while each weight is read once.
        """
        with closing(self.walk(batches, masks)) as events:
            for event in events:
                if isinstance(event, int):
                    yield event, self.outputs.pop(event)
                del event  # parameters that are used up

    def walk(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None
    ) -> Generator[int | Resident]:
        """Run, and say so: the number of a batch whose output is in `outputs`, and when all batches have
        passed a segment its parameters, which are here until then."""
        states = self._states(batches, masks)
        with closing(self._parameters(plan := self._plan(states, batches))) as parameters:
            used_last = last_use(plan)
            for number, segment in enumerate(plan):
                used_up: dict[Node, list[Node]] = {}
                for node, (last, reader) in used_last.items():
                    if last == number and node in self._complete:
                        used_up.setdefault(reader, []).append(node)
                shared = self._run_shared(segment, parameters, len(states), used_up)
                for i in range(len(states)):
                    env = {**self.found, **shared, **states.take(i)}
                    states.put(i, self._run_varying(segment, env, i))
                    env = {}
                    self.env = {}
                    if i in self.outputs:
                        yield i
                self._complete.update(n for n in segment.varying if n in self.found)
                yield {str(n.target): value for n, value in shared.items() if self._is_read(n)}
                self.carried = {node: shared[node] for node in segment.carried}
                self.env = shared = {}
                for node in self.complete():
                    if used_last.get(node, (-1, node))[0] <= number:
                        del self.found[node]

    def complete(self) -> dict[Node, Tensor]:
        """The statistics that all batches have passed and that are still here: until their last use."""
        return {node: value for node, value in self.found.items() if node in self._complete}

    def _states(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None) -> "BatchStates":
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        given = zip(batches, strict=True) if masks is None else zip(batches, masks, strict=True)
        return BatchStates(self.device, [dict(zip(inputs, values, strict=True)) for values in given])

    def _plan(self, states: "BatchStates", batches: Sequence[Tensor]) -> list[Segment]:
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        tokens = sum(batch.numel() for batch in batches)
        self.tokens = [batch.numel() for batch in batches]
        self.outputs: dict[int, Any] = {}
        self.carried = {}
        scale = tokens / first.meta["val"].numel()
        return segments(self.graph, scale, self.starts) if len(states) else []

    def _parameters(self, plan: Sequence[Segment]) -> Generator[tuple[Node, Tensor]]:
        """The parameters of all segments in their order, each read while what is before it is used."""
        needed = (n for segment in plan for n in segment.shared if self._is_read(n))
        return loaded(map(self._request, needed), self.device, concurrent=self.source.concurrent)

    def _request(self, n: Node) -> Request[Node]:
        """A parameter of experts in experts, which several threads can read; any other as a stack of one."""
        name, val = str(n.target), n.meta["val"]
        stored = self.source.hub.stored.get(name)
        by_expert = self.source.concurrent and val.dim() == 3 and (stored is None or stored.convert is None)
        if not by_expert:
            return Request(n, (1, *val.shape), val.dtype, [functools.partial(self.source.read, name)])
        fills = [functools.partial(self.source.read_expert, name, expert) for expert in range(len(val))]
        return Request(n, tuple(val.shape), val.dtype, fills)

    def _is_read(self, n: Node) -> bool:
        return n.op == "get_attr" and n.target not in self.constants

    @torch.no_grad()
    def _run_shared(
        self,
        segment: Segment,
        parameters: Iterator[tuple[Node, Tensor]],
        batches: int,
        used_up: Mapping[Node, Sequence[Node]] = MappingProxyType({}),
    ) -> BatchState:
        """What all batches need of a segment. used_up: node -> the statistics that nothing needs after it."""
        self.env = {**self.found, **self.carried}
        for node in segment.shared:
            if self._is_read(node):
                self.env[node] = next(parameters)[1].view(node.meta["val"].shape)
            else:
                self.env[node] = self.run_node(node)
            if node is self.result:
                self.outputs = {i: self.reduce(self.env[node], i) for i in range(batches)}
            for dead in segment.ends[node]:
                if not (self.hold and self._is_read(dead)):
                    del self.env[dead]
            for statistic in used_up.get(node, ()):
                self.found.pop(statistic, None)
                self.env.pop(statistic, None)
            self.step(work(node))
        return {node: value for node, value in self.env.items() if node not in self.found}

    @torch.no_grad()
    def _run_varying(self, segment: Segment, env: BatchState, i: int) -> BatchState:
        """Batch `i` through one segment: what later segments use of it."""
        self.env = env
        tokens, example = self.tokens[i], example_tokens(self.graph)
        for node in segment.varying:
            self.env[node] = (
                self.fold(node, *self._arguments(node)) if is_statistic(node) else self.run_node(node)
            )
            if node is self.result:
                self.outputs[i] = self.reduce(self.env[node], i)
            for dead in segment.ends[node]:
                del self.env[dead]
            self.step(work(node) * tokens // example)
        return {node: self.env[node] for node in segment.kept}

    def fold(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What all batches so far show of a statistic, the one of these arguments among them."""
        known = dialect.find(node.target)
        assert known is not None
        assert known.fold is not None
        if known.add is not None and node in self.found:
            known.add(self.found[node], *args, **kwargs)
        else:
            value = self.call(node, args, kwargs)
            self.found[node] = known.fold(self.found[node], value) if node in self.found else value
        return self.found[node]

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            return self.constants[str(n.target)].to(self.device)
        if n.target is dialect.VALUE:
            return self.values[str(n.args[0])].to(self.device)
        return self.call(n, *self._arguments(n))

    def _arguments(self, n: Node) -> Any:
        return map_arg((n.args, n.kwargs), lambda m: self.env[m])  # type: ignore[misc]

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of one call, for one batch if it depends on that."""
        if n in self.origins:
            return self._rounded(n, args, kwargs)
        moved = {k: self.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        return dialect.function(n.target)(*args, **moved)

    def _rounded(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One weight, or many at once, as what they pack to decodes."""
        known, origins = dialect.find(n.target), self.origins[n]
        assert known is not None
        assert known.pack is not None
        many = args if args[1].dim() else [a[None] if isinstance(a, Tensor) else a for a in args]
        packed = known.pack(*many, **kwargs)
        if self.sink is not None:
            self.sink(origins, many[0], many[1], packed)
        out, format = torch.empty_like(many[0]), FORMATS[str(kwargs["format"])]
        for e in range(len(out)):
            out[e] = format.dequantize(packed.part(e, slice(None)))
        return dialect.straight_through(args[0], out if args[1].dim() else out[0])


def last_use(plan: Sequence[Segment]) -> dict[Node, tuple[int, Node]]:
    """Node -> the number of the last segment that uses it, and what does there."""
    return {
        source: (number, node)
        for number, segment in enumerate(plan)
        for node in (*segment.shared, *segment.varying)
        for source in node.all_input_nodes
    }


class BatchStates:
    """What each batch keeps between segments: on the device while there is room, in host memory beyond."""

    def __init__(self, device: torch.device, inputs: list[BatchState]) -> None:
        self.device, self.values = device, inputs
        self.held = [0] * len(inputs)
        self.room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0

    def __len__(self) -> int:
        return len(self.values)

    def take(self, i: int) -> BatchState:
        """The values of batch `i`, on the device and nowhere else."""
        values, self.values[i], self.held[i] = self.values[i], {}, 0
        return {node: map_aggregate(value, self._here) for node, value in values.items()}

    def peek(self, i: int) -> BatchState:
        """The values of batch `i`, on the device, and kept."""
        return {node: map_aggregate(value, self._here) for node, value in self.values[i].items()}

    def copy(self) -> "BatchStates":
        """Other states of the same values."""
        return BatchStates(self.device, [dict(values) for values in self.values])

    def put(self, i: int, values: BatchState) -> None:
        """Keep the values of batch `i`."""
        self.values[i] = {node: map_aggregate(v, lambda t: self._fitting(t, i)) for node, v in values.items()}

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _fitting(self, value: Any, i: int) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return value
        if sum(self.held) + value.nbytes > self.room:
            return value.cpu()
        self.held[i] += value.nbytes
        return value
