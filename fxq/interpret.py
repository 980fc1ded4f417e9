"""Interpreters of the graph: run it, calibrate it, simulate it. A weight is read when first used and freed
after its last.

Values that differ by calibration batch travel as `Lanes`, and each node runs over all of them before the
next node: a weight is read once for the whole calibration set, not once a batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from fxq import dialect, nvfp4
from fxq.errors import SourceError
from fxq.nodes import int_at, node_at, nodes_at
from fxq.program import Program, WeightSource
from fxq.structure import VIEWS, parameter_name, root, shape_of, strip

# Slices of one weight are handled together up to this many bytes: enough for a launch, little enough to hold.
BATCH_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Lanes(tuple[Any, ...]):
    """One value a calibration batch."""


class Streaming(Interpreter):
    """Runs a program over batches, fetching weights from a source and freeing every value after its last
    use.

    device: where the graph runs; the devices written in the graph are those it was traced on, and are
    replaced. reduce: what to keep of each batch's output (value, batch index), so that logits of many
    batches never pile up.
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
        self.results = {n for node in self.graph.nodes if node.op == "output" for n in node.all_input_nodes}

    @torch.no_grad()
    def run_batches(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Any]:
        """The graph's first output (as `reduce` keeps it) for each batch of token ids int64 [B, S].

        masks: attention masks int64 [B, S], for a graph traced with `padded`.
        """
        inputs = [batches] if masks is None else [batches, masks]
        outputs = self.run(*(Lanes(batch.to(self.device) for batch in group) for group in inputs))
        return list(outputs[0] or ())

    def run_node(self, n: Node) -> Any:
        self.step()
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            return args[0]
        width = _width((args, kwargs))
        if width is None:
            return self.call(n, args, kwargs)
        keep = self.reduce if n in self.results else lambda value, i: value
        return self.join(n, [keep(self.call(n, _lane(args, i), _lane(kwargs, i)), i) for i in range(width)])

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of one call for one batch; subclasses change the meaning of an operator here."""
        moved = {k: self.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        return cast(Callable[..., Any], n.target)(*args, **moved)

    def join(self, n: Node, lanes: list[Any]) -> Any:
        """What a call's values over all batches become."""
        return Lanes(lanes)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.program.constants:
            return self.program.constants[target].to(self.device)
        value = self.source.read(target)
        return value.to(self.device)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = map_arg((n.args, n.kwargs), lambda m: self.env[m])  # type: ignore[misc]
        return args, kwargs


def _width(value: Any) -> int | None:
    """How many batches the arguments differ over; None if they do not."""
    if isinstance(value, Lanes):
        return len(value)
    items = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return next((w for item in items if (w := _width(item)) is not None), None)


def _lane(value: Any, i: int) -> Any:
    if isinstance(value, Lanes):
        return value[i]
    if isinstance(value, Mapping):
        return {k: _lane(v, i) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_lane(v, i) for v in value)
            if type(value) in (list, tuple)
            else [_lane(v, i) for v in value]
        )
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
        packed = nvfp4.quantize_weight(w, amax.to(w.device), str(quantizes[0].kwargs["scale"]))
        out = torch.empty_like(w)
        for e in range(len(w)):
            out[e] = nvfp4.dequantize(nvfp4.Packed(packed.weight[e], packed.scale[e], packed.scale_2[e]))
        return out


def _quantized_alike(stack: Node) -> Sequence[Node]:
    """The quantize nodes that a stack consists of, if all choose scales alike and have no other user."""
    if stack.target is not dialect.STACK:
        return ()
    pieces = nodes_at(stack, 0)
    alike = all(
        q.target is dialect.QUANTIZE
        and q.kwargs["format"] == "nvfp4"
        and q.kwargs["scale"] == pieces[0].kwargs["scale"] != "dynamic"
        and list(q.users) == [stack]
        for q in pieces
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
        self.needed: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if (
                node in self.needed
                or node.target in (dialect.AMAX, dialect.EXPERT_LINEAR)
                or node.op == "placeholder"
            ):
                self.needed.update((node, *node.all_input_nodes))

    def run_node(self, n: Node) -> Any:
        if n not in self.needed:
            self.step()
            return [None] if n.op == "output" else None
        return super().run_node(n)

    def call(self, n: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if n.target is dialect.AMAX:
            return self._amax(n, args[0])
        if n.target is dialect.EXPERT_LINEAR:
            self._count(n, args[1], args[2])
        return super().call(n, args, kwargs)

    def join(self, n: Node, lanes: list[Any]) -> Any:
        if n.target is dialect.AMAX:
            reached = [lane for lane in lanes if lane is not None]
            if reached:  # else bootstrap looks at its peers
                self.values[n.name] = torch.stack(reached).amax(0).cpu()
                _check_finite(n, self.values[n.name])
            return None
        return super().join(n, lanes)

    def _amax(self, n: Node, t: Tensor) -> Tensor | None:
        if root(node_at(n, 0)) is None:
            return t.abs().amax().to(torch.float32) if t.numel() else None
        if _slice_of(n) is None:  # an expert's amax waits for a token to reach it
            self.values[n.name] = amax_of(t[None])[0].cpu()
            _check_finite(n, self.values[n.name])
        return None

    def _count(self, n: Node, w: Tensor, expert_ids: Tensor) -> None:
        holes = _expert_holes(node_at(n, 1))
        if not holes:
            return
        parameter = parameter_name(node_at(n, 1))
        counts = torch.bincount(expert_ids, minlength=len(w))[: len(w)].cpu()
        seen = self.tokens.get(parameter, torch.zeros_like(counts))
        self.tokens[parameter] = seen + counts
        new = [e for e in torch.nonzero(counts).flatten().tolist() if holes[e].name not in self.values]
        if new:
            for expert, value in zip(new, amax_of(w, new).cpu(), strict=True):
                self.values[holes[expert].name] = value
                _check_finite(holes[expert], value)


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


def _slice_of(hole: Node) -> Node | None:
    node = strip(node_at(hole, 0), VIEWS)
    return node if node.target is dialect.SLICE else None


def amax_of(w: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """float32 [n]: the largest magnitude of each (chosen) w[e], without a temporary of the weight's size."""
    rows = range(len(w)) if experts is None else experts
    return torch.stack([torch.maximum(w[e].amax(), -w[e].amin()).to(torch.float32) for e in rows])


def _check_finite(hole: Node, value: Tensor) -> None:
    if bool(torch.isfinite(value)):
        return
    parameter = root(node_at(hole, 0))
    piece = _slice_of(hole)
    kind = "NaN" if bool(value.isnan()) else "Inf"
    if parameter is None:
        raise SourceError(
            f"%{hole.name}: calibration produced {kind} in an activation; is the model or the text broken?"
        )
    where = f", expert {piece.args[1]}" if piece is not None else ""
    raise SourceError(f"{parameter.target}{where}: the weight holds {kind}; expected finite values")


class WeightCone:
    """Evaluates weight-only nodes (views and slices of parameters) without running the model, many slices
    at a time."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.source, self.device = program, source, device

    def batches(self, nodes: Iterable[Node]) -> Iterator[tuple[list[Node], Tensor]]:
        """The given nodes, each a weight [out, in], grouped by source tensor: (nodes, values [n, out,
        in])."""
        by_parameter: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            by_parameter[parameter_name(node)].append(node)
        for group in by_parameter.values():
            step = max(1, BATCH_BYTES[self.device.type] // max(1, group[0].meta["val"].nbytes))
            for start in range(0, len(group), step):
                part = group[start : start + step]
                first = self.value(part[0])
                values = first.new_empty(len(part), *first.shape, device=self.device)
                for i, node in enumerate(part):
                    values[i].copy_(first if i == 0 else self.value(node))
                yield part, values

    def value(self, node: Node) -> Tensor:
        """One weight [out, in] on the CPU; of a fused weight only the expert asked for is read."""
        if node.op == "get_attr":
            return self.source.read(str(node.target))
        if node.target is dialect.SLICE:
            base, expert = node_at(node, 0), int_at(node, 1)
            below = strip(base, VIEWS)
            if base.op == "get_attr":
                return self.source.read_expert(str(base.target), expert)
            if (
                base.target is torch.ops.aten.transpose.int
                and base.args[0] is below
                and below.op == "get_attr"
            ):
                return self.source.read_expert(str(below.target), expert).T
        args = cast(tuple[Any, ...], map_arg(node.args, self.value))
        return cast(Callable[..., Tensor], node.target)(*args, **node.kwargs)


# Without any data an input amax of 448 puts the FP8 block scales mid-range: blocks up to 448 do not clip,
# blocks down to 0.016 keep full precision.
UNSEEN_INPUT_AMAX = 448.0


class Bootstrap:
    """Fills every amax that data did not reach: weights from the weights, inputs from their layer."""

    def __init__(self, program: Program, source: WeightSource, device: torch.device) -> None:
        self.program, self.cone = program, WeightCone(program, source, device)
        self.alike: dict[object, dict[Node, int]] = {}

    @torch.no_grad()
    def run(self, step: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Values for the empty amax nodes of the program, by name."""
        empty = [
            n
            for n in self.program.graph.nodes
            if n.target is dialect.AMAX and n.name not in self.program.values
        ]
        weights: dict[Node, list[Node]] = defaultdict(list)
        for hole in empty:
            if root(node_at(hole, 0)) is not None:
                weights[node_at(hole, 0)].append(hole)
        found: dict[str, Tensor] = {}
        for nodes, values in self.cone.batches(weights):
            for node, amax in zip(nodes, amax_of(values).cpu(), strict=True):
                for hole in weights[node]:
                    _check_finite(hole, amax)
                    found[hole.name] = amax
                    step()
        for hole in empty:
            if hole.name not in found:
                found[hole.name] = self._input_amax(hole)
                step()
        return found

    def _input_amax(self, hole: Node) -> Tensor:
        """For an input that no token reached: the largest amax of what shares its scale or its fused weight,
        else that of the nearest input made and used alike (a fellow expert's), else a constant."""
        peers = [self.program.values[n.name] for n in _input_peers(hole) if n.name in self.program.values]
        if not peers:
            peers = [self.program.values[n.name] for n in self._nearest_alike(hole)]
        return torch.stack(peers).amax() if peers else torch.tensor(UNSEEN_INPUT_AMAX)

    def _nearest_alike(self, hole: Node) -> list[Node]:
        if not self.alike:
            for place, node in enumerate(self.program.graph.nodes):
                if node.target is dialect.AMAX and root(node_at(node, 0)) is None:
                    self.alike.setdefault(_use(node), {})[node] = place
        fellows = self.alike[_use(hole)]
        seen = [node for node in fellows if node.name in self.program.values]
        return sorted(seen, key=lambda node: abs(fellows[node] - fellows[hole]))[:1]


def _use(hole: Node) -> object:
    """What an input is made by and multiplied with: alike for the same linear of two experts or layers."""
    made: list[object] = []
    node = node_at(hole, 0)
    while node.op == "call_function" and len(made) < 6 and node.args and isinstance(node.args[0], Node):
        made.append(node.target)
        node = node_at(node, 0)
    matmuls = dict.fromkeys(user for quantize in _quantizes(hole) for user in quantize.users)
    shapes = {shape_of(o) for matmul in matmuls for o in matmul.all_input_nodes if root(o) is not None}
    return tuple(made), frozenset(shapes)


def _quantizes(hole: Node) -> list[Node]:
    """The quantize nodes that use an amax, alone or in a group."""
    users = [u for user in hole.users for u in (user.users if user.target is dialect.SYNC else [user])]
    return [user for user in users if user.target is dialect.QUANTIZE and root(node_at(user, 0)) is None]


def _input_peers(hole: Node) -> list[Node]:
    """Input amax nodes that share a group with this one, or whose weights lie in the same parameter."""
    peers: dict[Node, None] = {}
    for group in [u for u in hole.users if u.target is dialect.SYNC]:
        peers.update(dict.fromkeys(nodes_at(group, 0)))
    for quantize in _quantizes(hole):
        if node_at(quantize, 0) is not node_at(hole, 0):
            continue
        for matmul in quantize.users:
            for operand in matmul.all_input_nodes:
                parameter = root(operand)
                if parameter is not None:
                    peers.update(dict.fromkeys(_input_holes(parameter)))
    return [peer for peer in peers if peer is not hole]


def _input_holes(parameter: Node) -> list[Node]:
    holes, stack, seen = [], list(parameter.users), set(parameter.users)
    while stack:
        node = stack.pop()
        if root(node) is parameter:
            new = [u for u in node.users if u not in seen]
            seen.update(new)
            stack.extend(new)
            continue
        for operand in node.all_input_nodes:
            if operand.target is dialect.QUANTIZE and root(operand) is None:
                amax = node_at(operand, 1)
                holes += list(nodes_at(amax, 0)) if amax.target is dialect.SYNC else [amax]
    return holes


def amax_value(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    """The float32 [] that an amax, sync, value or constant node stands for once calibrated."""
    if node.target is dialect.SYNC:
        return torch.stack([amax_value(n, values) for n in nodes_at(node, 0)]).amax()
    if node.target is torch.ops.aten.scalar_tensor.default:
        return torch.tensor(float(cast(float, node.args[0])), dtype=torch.float32)
    name = str(node.args[0]) if node.target is dialect.VALUE else node.name
    return values[name]
