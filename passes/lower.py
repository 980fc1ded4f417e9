"""lower: the calibrated graph becomes a checkpoint program: load, pack and store, nothing else.

A weight is stored as the hub holds it: alone (`store_linear`), or as rows of a tensor that holds more than it
(`store_rows`): all experts of a layer, or several linears.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch.fx import Graph, Node

from fxq.errors import VerifyError, and_more
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.hub import Stored, TensorInfo
from fxq.graph.pattern import Match, Miss
from fxq.graph.places import Place, cache_module, named, places
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions, latent_projection
from fxq.graph.structure.matmuls import Frontiers, input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, parameter_name, shape_of, strip
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import (
    Fact,
    amaxes_filled,
    amaxes_shared,
    is_weight_quantize,
    tensors_whole,
    weights_placed,
    weights_quantized,
)


@dataclass(frozen=True)
class Lower(Pass):
    """Emit every quantized linear under its hub name, KV scales, and all other tensors of the source as
    they are.

    format: whose names and config files the checkpoint has; packed weights are the same bytes.
    """

    format: Literal["modelopt", "compressed-tensors"] = "modelopt"

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[Fact, ...]] = (
        amaxes_shared,
        tensors_whole,
        weights_placed,
        amaxes_filled,
    )
    flags: ClassVar[tuple[str, ...]] = ("format",)
    makes_checkpoint: ClassVar[bool] = True
    same_function: ClassVar[bool] = True  # of the program that it makes, which the writer runs
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantized weight."""
        for node in program.graph.nodes:
            if is_weight_quantize(node):
                yield Match("quantized weight", node, {"w": node.args[0]})

    def run(self, program: Program) -> int:
        if (reason := weights_quantized(program)) is not None:
            raise VerifyError(f"lower: {reason}: there is nothing to emit")
        emit = _Emitter(program)
        inputs: dict[Node, dict[Node, None]] = {}  # weight quantize -> amaxes of all it multiplies
        for matmul in weight_matmuls(program.graph):
            w, x = strip(matmul.w, VIEWS), input_quantize(matmul.x)
            for quantize in nodes_at(w, 0) if w.target is dialect.STACK else [w]:
                if quantize.target is dialect.QUANTIZE:
                    inputs.setdefault(quantize, {}).update({node_at(x, 1): None} if x is not None else {})
        for quantize, amaxes in inputs.items():
            emit.linear(quantize, list(amaxes))
        emit.check_complete()
        emit.kv_caches()
        emit.untouched()
        program.notes += emit.notes()
        emit.graph.output(())
        program.calibrated, program.graph, program.format = program.graph, emit.graph, self.format
        return emit.count


@dataclass
class _Emitter:
    program: Program
    graph: Graph = field(default_factory=Graph)
    copies: dict[Node, Node] = field(default_factory=dict)
    joined: dict[tuple[Node, ...], Node] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    stored: dict[tuple[str, int], dict[range, Node]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    scales: dict[str, tuple[Node, Node | None]] = field(default_factory=dict)
    caches: dict[str, list[Node | None]] = field(default_factory=dict)
    turned: dict[str, None] = field(default_factory=dict)
    count: int = 0

    def copy(self, node: Node) -> Node:
        """The node in the new graph: weights and views as they are, an amax as the value calibrated for
        it."""
        if node not in self.copies:
            if node.target is dialect.AMAX:
                made = edit.call(self.graph, node.name, dialect.VALUE, node.name)
            else:
                for source in node.all_input_nodes:
                    self.copy(source)
                made = self.graph.node_copy(node, self.copies.__getitem__)
                made.meta = {"val": node.meta["val"]}
            self.copies[node] = made
        return self.copies[node]

    def linear(self, quantize: Node, input_amaxes: list[Node]) -> None:
        """Pack one weight and store its rows where the hub holds them; a weight that layers share has the
        largest of their input amaxes (in the graph itself such a group would be a cycle)."""
        w, amax = node_at(quantize, 0), node_at(quantize, 1)
        name = parameter_name(w)
        held = self.program.hub.stored.get(name, Stored.whole(name, ()))
        if held.keys[0][0] not in self.replaced:  # once a parameter, not once an expert of it
            self.replaced.update((key, name) for keys in held.keys for key in keys)
        shared = self._largest(f"{w.name}_input_amaxes", [self.copy(amax) for amax in input_amaxes])
        packed = self._pack(quantize)
        for place in places(self.program.hub, w):
            held_by = self.stored.setdefault((place.key, place.expert), {})
            if place.rows in held_by:
                raise VerifyError(
                    f"lower: {place.key} would be stored twice: by %{held_by[place.rows].name} and "
                    f"by %{quantize.name}"
                )
            held_by[place.rows] = quantize
            self._check_scales(place.key, quantize, self.copy(amax), shared)
            self._store(place, packed, shared)

    def _pack(self, quantize: Node) -> Node:
        w, amax = self.copy(node_at(quantize, 0)), self.copy(node_at(quantize, 1))
        return edit.call(self.graph, f"{w.name}_packed", dialect.PACK, w, amax, **quantize.kwargs)

    def _largest(self, name: str, amaxes: list[Node]) -> Node | None:
        if len(amaxes) < 2:
            return amaxes[0] if amaxes else None
        if tuple(amaxes) not in self.joined:
            self.joined[tuple(amaxes)] = edit.call(self.graph, name, dialect.SYNC, amaxes)
        return self.joined[tuple(amaxes)]

    def _check_scales(self, key: str, quantize: Node, amax: Node, input_amax: Node | None) -> None:
        """All that one tensor holds decodes with one global scale and reads with one input scale."""
        first = self.scales.setdefault(key, (amax, input_amax))
        for what, here, there in zip(("weight", "input"), (amax, input_amax), first, strict=True):
            if here is not there:
                raise VerifyError(
                    f"lower: {key} has one {what} scale, but %{quantize.name} brings "
                    f"{'none' if here is None else f'%{here.name}'} where another of its weights has "
                    f"{'none' if there is None else f'%{there.name}'}; run sync-groups before"
                )

    def _store(self, place: Place, packed: Node, input_amax: Node | None) -> None:
        name = f"{packed.name}_{place.start}"
        self.count += 1
        if place.is_linear:
            if place.transposed:
                self.turned[place.key] = None
            module = place.key.removesuffix(".weight")
            rows = {"start": place.start, "end": place.end}
            edit.call(self.graph, name, dialect.STORE_LINEAR, module, packed, input_amax, **rows)
            return
        self.experts[place.key] = place.experts
        edit.call(
            self.graph,
            name,
            dialect.STORE_ROWS,
            place.key,
            packed,
            input_amax,
            start=place.start,
            end=place.end,
            rows=[place.rows.start, place.rows.stop, place.rows.step],
            shape=list(place.shape),
            expert=place.expert,
            experts=place.experts,
            transposed=place.transposed,
        )

    def check_complete(self) -> None:
        """What the source holds of a quantized parameter is stored again in full, and nothing else reads
        it."""
        parameters = {str(n.target): n for n in self.program.graph.nodes if n.op == "get_attr"}
        for name in dict.fromkeys(self.replaced.values()):
            if (other := _other_reader(parameters[name])) is not None:
                raise VerifyError(
                    f"lower: {name} is quantized where a linear reads it, but "
                    f"%{other.name} reads it too; one tensor cannot be both"
                )
            for keys in named(self.program.hub, name, shape_of(parameters[name])).keys:
                experts = self.experts.get(keys[0], 1)
                held = [(key, 0) for key in keys] if len(keys) > 1 else [(keys[0], e) for e in range(experts)]
                for expert, (key, place) in enumerate(held):
                    if (key, place) not in self.stored:
                        raise VerifyError(
                            f"lower: {key} would be lost: the graph never reads expert {expert} of {name}"
                        )

    def kv_caches(self) -> None:
        """One `store_kv` an attention whose keys are quantized: with its amaxes if calibrated,
        without if cast."""
        frontiers = Frontiers(self.program.graph)
        for attention in attentions(self.program.graph):
            k, v = attention.k, attention.v
            latent = latent_projection(frontiers, attention)
            cached = [k, v] if latent is None else [_below_input_quantize(frontiers.matmuls[latent].x)]
            if all(map(_is_cache, cached)):
                amaxes = [node_at(t, 1) for t in cached] * (1 if latent is None else 2)
                held = [self.copy(a) if a.target in (dialect.AMAX, dialect.SYNC) else None for a in amaxes]
                try:
                    module = cache_module(self.program.hub, frontiers, k, v)
                except VerifyError as error:
                    raise VerifyError(f"lower: {error}") from error
                if module in self.caches:
                    if self.caches[module] == held:
                        continue  # another attention reads the same cache
                    raise VerifyError(f"lower: two attentions with different caches share {module}'s scales")
                self.caches[module] = held
                edit.call(
                    self.graph,
                    f"{attention.node.name}_kv",
                    dialect.STORE_KV,
                    module,
                    *held,
                    format=cached[0].kwargs["format"],
                )

    def untouched(self) -> None:
        """Everything else: load and store under the same name."""
        tensors = self.program.hub.tensors or {
            str(n.target): TensorInfo(shape_of(n), n.meta["val"].dtype)
            for n in self.program.graph.nodes
            if n.op == "get_attr" and n.target not in self.program.constants
        }
        for key, info in tensors.items():
            if key not in self.replaced:
                name = key.replace(".", "_")
                loaded = edit.call(
                    self.graph, f"{name}_", dialect.LOAD, key, shape=list(info.shape), dtype=info.dtype
                )
                edit.call(self.graph, f"{name}_store", dialect.STORE, key, loaded)

    def notes(self) -> Iterator[str]:
        """What engines do with forms that are not one linear a tensor, once a model."""
        if fused := [key for key, experts in self.experts.items() if experts > 1]:
            yield (
                f"{and_more(fused)}: this family's checkpoints hold all experts of a layer in one "
                "tensor, and so does this one; vLLM 0.32 fails on NVFP4 weights in that form, and no engine "
                "is known to load them"
            )
        if self.turned:
            yield (
                f"{and_more(self.turned)}: this family's checkpoints hold it as "
                "[in, out]; NVFP4 is defined for [out, in], which is written, so an engine that transposes "
                "such weights on load cannot read it"
            )


def _is_cache(t: Node) -> bool:
    """Whether keys or values are quantized to a format that engines hold caches in."""
    return t.target is dialect.QUANTIZE and FORMATS[str(t.kwargs["format"])].caches


def _below_input_quantize(x: Node) -> Node:
    """The operand of a linear's own input quantize node, or `x` itself."""
    quantize = input_quantize(x)
    return strip(x if quantize is None else node_at(quantize, 0), VIEWS)


def _other_reader(parameter: Node) -> Node | None:
    """A node that reads a quantized parameter (or a view or slice of it) other than to quantize it."""
    stack = list(parameter.users)
    while stack:
        node = stack.pop()
        if node.target in VIEWS or node.target is dialect.SLICE:
            stack += node.users
        elif node.target not in (dialect.AMAX, dialect.QUANTIZE):
            return node
    return None
