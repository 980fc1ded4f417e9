"""Interpreters of the graph: run it, calibrate it, simulate it. A weight is read when first used and freed
after its last.

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

from fxq.graph import dialect
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import parameter_name, root
from fxq.numbers.formats import FORMATS
from fxq.run.loader import Request, loaded
from fxq.run.segments import Segment, segments
from fxq.run.statistics import amax_of, amax_value, check_finite, slice_of

Lane = dict[Node, Any]


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
        lanes = _Lanes(self.device, [dict(zip(inputs, values, strict=True)) for values in given])
        wanted = self.wanted()
        for node in self.graph.nodes:
            if node not in wanted or node.op in ("placeholder", "output"):
                self.step()
        tokens = sum(batch.numel() for batch in batches)
        plan = segments(self.graph, wanted, tokens / inputs[0].meta["val"].numel()) if len(lanes) else []
        self.outputs: dict[int, Any] = {}
        with closing(self._parameters(plan)) as parameters:
            for segment in plan:
                shared = self._run_shared(segment, parameters, len(lanes))
                for i in range(len(lanes)):
                    lanes.put(i, self._run_lane(segment, {**shared, **lanes.take(i)}, i))
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

    def _run_shared(self, segment: Segment, parameters: Iterator[tuple[Node, Tensor]], batches: int) -> Lane:
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

    def _run_lane(self, segment: Segment, env: Lane, i: int) -> Lane:
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


class _Lanes:
    """What each batch keeps between segments: on the device while there is room, in host memory beyond."""

    def __init__(self, device: torch.device, inputs: list[Lane]) -> None:
        self.device, self.values = device, inputs
        self.held = [0] * len(inputs)
        self.room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0

    def __len__(self) -> int:
        return len(self.values)

    def take(self, i: int) -> Lane:
        """The values of batch `i`, on the device and nowhere else."""
        values, self.values[i], self.held[i] = self.values[i], {}, 0
        return {node: map_aggregate(value, self._here) for node, value in values.items()}

    def put(self, i: int, values: Lane) -> None:
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


class Simulate(Streaming):
    """The deployed model: calibrated amaxes instead of fresh ones, everything quantized as it will be
    served. Slices that are stacked again are quantized there, in one launch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.together = {q: n for n in self.graph.nodes for q in _quantized_alike(n)}

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.AMAX:
            return self.program.values[n.name].to(self.device)
        if n in self.together:
            return args[0]
        if n.target is dialect.STACK and self.together.get(nodes_at(n, 0)[0]) is n:
            return self._quantize(_base(args[0]), nodes_at(n, 0))
        return super().call(n, args, kwargs)

    def _quantize(self, w: Tensor, quantizes: Sequence[Node]) -> Tensor:
        amax = torch.stack([amax_value(node_at(q, 1), self.program.values) for q in quantizes])
        format = FORMATS[str(quantizes[0].kwargs["format"])]
        packed = format.quantize(w, amax.to(w.device), str(quantizes[0].kwargs["scale"]))
        out = torch.empty_like(w)
        for e in range(len(w)):
            out[e] = format.dequantize(packed.part(e, slice(None)))
        return out


def _quantized_alike(stack: Node) -> Sequence[Node]:
    """The quantize nodes that a stack consists of, if all choose scales alike and have no other user."""
    if stack.target is not dialect.STACK:
        return ()
    pieces = nodes_at(stack, 0)
    options = pieces[0].kwargs
    format = FORMATS.get(str(options.get("format")))
    in_blocks = format is not None and format.block is not None and options["scale"] in format.scales
    alike = in_blocks and all(
        q.target is dialect.QUANTIZE and q.kwargs == options and list(q.users) == [stack] for q in pieces
    )
    return pieces if alike else ()


class Unquantized(Streaming):
    """The model as it was: quantize nodes pass their operand through."""

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.QUANTIZE:
            return args[0]
        if n.target in (dialect.SYNC, dialect.AMAX):
            return None
        if n.target is dialect.STACK:
            return _base(args[0])
        return super().call(n, args, kwargs)


class Max(Unquantized):
    """Records the amax of activations, counts tokens per expert, and takes the weight amax of what was
    reached.

    Only what leads to an amax or to an expert is computed; statistics are those of the unquantized model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.inputs: dict[Node, Tensor] = {}
        self.holes: dict[Node, list[Node]] = {}

    def wanted(self) -> set[Node]:
        needed: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if (
                node in needed
                or node.target in (dialect.AMAX, dialect.EXPERT_LINEAR)
                or node.op == "placeholder"
            ):
                needed.update((node, *node.all_input_nodes))
        return needed

    def run_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Any]:
        outputs = super().run_batches(batches, masks)
        for hole, value in self.inputs.items():
            self._found(hole, value.cpu())
        return outputs

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.AMAX:
            return self._amax(n, args[0])
        if n.target is dialect.EXPERT_LINEAR:
            self._count(n, args[1], args[2])
        return super().call(n, args, kwargs)

    def _amax(self, n: Node, t: Tensor) -> None:
        if root(node_at(n, 0)) is None:
            if t.numel():  # else bootstrap looks at its peers
                value = amax_of(t[None])[0]
                self.inputs[n] = torch.maximum(self.inputs[n], value) if n in self.inputs else value
        elif slice_of(n) is None:  # an expert's amax waits for a token to reach it
            self._found(n, amax_of(t[None])[0].cpu())

    def _count(self, n: Node, w: Tensor, expert_ids: Tensor) -> None:
        stack = node_at(n, 1)
        holes = self.holes.setdefault(stack, _expert_holes(stack))
        if not holes:
            return
        parameter = parameter_name(stack)
        counts = torch.bincount(expert_ids, minlength=len(w))[: len(w)].cpu()
        seen = self.tokens.get(parameter, torch.zeros_like(counts))
        self.tokens[parameter] = seen + counts
        new = [e for e in torch.nonzero(counts).flatten().tolist() if holes[e].name not in self.values]
        if new:
            for expert, value in zip(new, amax_of(w, new).cpu(), strict=True):
                self._found(holes[expert], value)

    def _found(self, hole: Node, value: Tensor) -> None:
        check_finite(hole, value)
        self.values[hole.name] = value


def _base(slices: Sequence[Tensor]) -> Tensor:
    """The fused weight itself when its slices come back untouched and in order, instead of a copy."""
    first = slices[0]
    stride = slices[1].storage_offset() - first.storage_offset() if len(slices) > 1 else first.numel()
    untouched = all(
        s.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and s.storage_offset() == first.storage_offset() + e * stride
        and s.stride() == first.stride()
        for e, s in enumerate(slices)
    )
    if untouched and stride > 0:
        return first.as_strided(
            (len(slices), *first.shape), (stride, *first.stride()), first.storage_offset()
        )
    return torch.stack(list(slices))


def _expert_holes(stack: Node) -> list[Node]:
    """The amax node of each expert of a quantized fused weight, in order; [] if it is not quantized."""
    if stack.target is not dialect.STACK:
        return []
    holes = []
    for quantize in nodes_at(stack, 0):
        piece = node_at(quantize, 0)
        holes.append(next(user for user in piece.users if user.target is dialect.AMAX))
    return holes
