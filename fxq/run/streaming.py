"""Streaming: runs a graph over many batches. A weight is read when first used and freed after its last use.

Every batch goes through one segment of the graph before the next segment's weights are used, and those are
read meanwhile: a weight is read once for the whole calibration set, not once a batch.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.run.loader import Request, loaded
from fxq.run.segments import Segment, segments

# The values that one batch has between two segments.
BatchState = dict[Node, Any]


class Streaming(Interpreter):
    """Runs a program over batches, fetching weights from a source and freeing every value after its last
    use.

    device: where the graph runs; the devices written in the graph are those it was traced on, and are
    replaced. reduce: what to keep of each batch's output (value, batch index), so that logits of many
    batches never pile up. What batches keep between segments stays on a GPU as long as it takes no more than
    half of the memory that was free, and lies in host memory beyond that.
    """

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        device: torch.device,
        *,
        step: Callable[[], None] = lambda: None,
        reduce: Callable[[Any, int], Any] = lambda value, i: value,
    ) -> None:
        super().__init__(nn.Module(), graph=program.calibrated or program.graph)
        self.program, self.source, self.device, self.step, self.reduce = program, source, device, step, reduce
        self.extra_traceback = False  # errors meant for users stay as they are worded
        outputs = [n for n in self.graph.nodes if n.op == "output"]
        self.result = next((n for node in outputs for n in node.all_input_nodes), None)

    def wanted(self) -> set[Node]:
        """The nodes that must run, with all their inputs."""
        return set(self.graph.nodes)

    def run_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Any]:
        """The graph's first output (as `reduce` keeps it) for each batch of token ids int64 [B, S]; None
        where it is not wanted.

        masks: attention masks int64 [B, S], for a graph traced with `padded`.
        """
        outputs: list[Any] = [None] * len(batches)
        for i, value in self.stream(batches, masks):
            outputs[i] = value
        return outputs

    @torch.no_grad()
    def stream(
        self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None
    ) -> Generator[tuple[int, Any]]:
        """The outputs of `run_batches` with the batch's number, one at a time and not kept.

        All batches have gone through every segment but the last by then, so that two models' outputs can be
        compared batch by batch while each weight is read once.
        """
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        given = zip(batches, strict=True) if masks is None else zip(batches, masks, strict=True)
        states = BatchStates(self.device, [dict(zip(inputs, values, strict=True)) for values in given])
        wanted = self.wanted()
        for node in self.graph.nodes:
            if node not in wanted or node.op in ("placeholder", "output"):
                self.step()
        tokens = sum(batch.numel() for batch in batches)
        plan = segments(self.graph, wanted, tokens / inputs[0].meta["val"].numel()) if len(states) else []
        self.outputs: dict[int, Any] = {}
        with closing(self._parameters(plan)) as parameters:
            for segment in plan:
                shared = self._run_shared(segment, parameters, len(states))
                for i in range(len(states)):
                    states.put(i, self._run_varying(segment, {**shared, **states.take(i)}, i))
                    self.env = {}
                    if i in self.outputs:
                        yield i, self.outputs.pop(i)
                self.env = shared = {}

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
        return n.op == "get_attr" and n.target not in self.program.constants

    def _run_shared(
        self, segment: Segment, parameters: Iterator[tuple[Node, Tensor]], batches: int
    ) -> BatchState:
        """What all batches need of a segment."""
        self.env = {}
        for node in segment.shared:
            if self._is_read(node):
                self.env[node] = next(parameters)[1].view(node.meta["val"].shape)
            else:
                self.env[node] = self.run_node(node)
            if node is self.result:
                self.outputs = {i: self.reduce(self.env[node], i) for i in range(batches)}
            for dead in segment.ends[node]:
                del self.env[dead]
            self.step()
        return self.env

    def _run_varying(self, segment: Segment, env: BatchState, i: int) -> BatchState:
        """Batch `i` through one segment: what later segments use of it."""
        self.env = env
        for node in segment.varying:
            self.env[node] = self.run_node(node)
            if node is self.result:
                self.outputs[i] = self.reduce(self.env[node], i)
            for dead in segment.ends[node]:
                del self.env[dead]
            if i == 0:
                self.step()
        return {node: self.env[node] for node in segment.kept}

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            return self.program.constants[str(n.target)].to(self.device)
        args, kwargs = map_arg((n.args, n.kwargs), lambda m: self.env[m])  # type: ignore[misc]
        return self.call(n, args, kwargs)

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of one call, for one batch if it depends on that; subclasses change the meaning of an
        operator here."""
        moved = {k: self.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        return cast(Callable[..., Any], n.target)(*args, **moved)


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
