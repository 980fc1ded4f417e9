"""lower: the calibrated graph becomes a checkpoint program: load, pack and store, nothing else.

A weight is stored as the hub holds it: alone (`store_linear`), or as rows of a tensor that holds more than it
(`store_rows`): all experts of a layer, or several linears.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch.fx import Graph, Node

from fxq.errors import VerifyError, and_more
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.hub import Hub, Stored, TensorInfo, row_axis
from fxq.graph.pattern import Match, Miss
from fxq.graph.places import Place, cache_module, named, places
from fxq.graph.program import Program
from fxq.graph.structure.attention import attentions, latent_projection
from fxq.graph.structure.matmuls import Frontiers, input_quantize, weight_matmuls
from fxq.graph.structure.rewrites import Rewritten, is_turned, rewritten
from fxq.graph.structure.views import (
    VIEWS,
    is_on_weight_path,
    of_the_model,
    parameter_name,
    root,
    shape_of,
    statistics,
    strip,
    varying,
)
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
                if is_rounding(quantize):
                    inputs.setdefault(quantize, {}).update({node_at(x, 1): None} if x is not None else {})
        for quantize, amaxes in inputs.items():
            emit.linear(quantize, list(amaxes))
        emit.check_complete()
        emit.kv_caches()
        emit.unquantized()
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

    def __post_init__(self) -> None:
        self.statistics = set(statistics(self.program.graph))

    def copy(self, node: Node) -> Node:
        """The node in the new graph: what weights decide as it is, a statistic of activations as the value
        that calibration finds for it."""
        if node not in self.copies:
            if node in self.statistics:
                made = edit.value(self.graph, node.name, node.meta["val"])
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
        own = self._own_head(w, held)
        if own is not None:
            self.program.untied.append(own)
        elif held.keys[0][0] not in self.replaced:  # once a parameter, not once an expert of it
            self.replaced.update((key, name) for keys in held.keys for key in keys)
        shared = self._largest(f"{w.name}_input_amaxes", [self.copy(amax) for amax in input_amaxes])
        packed = self._pack(quantize)
        for place in places(self.program.hub, w):
            place = place if own is None else replace(place, key=f"{own}.weight")
            held_by = self.stored.setdefault((place.key, place.expert), {})
            if place.rows in held_by:
                raise VerifyError(
                    f"lower: {place.key} would be stored twice: by %{held_by[place.rows].name} and "
                    f"by %{quantize.name}"
                )
            held_by[place.rows] = quantize
            self._check_scales(place.key, quantize, self.copy(amax), shared)
            self._store(place, packed, shared)

    def _own_head(self, w: Node, held: Stored) -> str | None:
        """The module of a head that shares its table with an embedding, which is to stay as it is: quantized,
        it gets a tensor of its own. None for any other weight."""
        parameter = root(w)
        assert parameter is not None
        tied = self._tied_to(held.keys[0][0])
        is_table = any(user.target is torch.ops.aten.embedding.default for user in parameter.users)
        return tied[0] if is_table and len(tied) == 1 and tied[0] not in self.program.untied else None

    def _tied_to(self, key: str) -> list[str]:
        """The modules that have no tensor of their own, but this one."""
        return [m for m in self.program.hub.modules if key in _keys(self.program.hub, f"{m}.weight")]

    def _pack(self, quantize: Node) -> Node:
        known = dialect.find(quantize.target)
        assert known is not None
        assert known.pack_target is not None
        args = [self.copy(argument) for argument in quantize.args if isinstance(argument, Node)]
        name = f"{args[0].name}_packed"
        packed = edit.call(self.graph, name, known.pack_target, *args, **quantize.kwargs)
        self.program.packs[quantize] = packed
        return packed

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
        varies, computing = varying(self.program.graph), of_the_model(self.program.graph)
        reading = {n for n in computing if n in varies or not is_on_weight_path(n)}
        for name in dict.fromkeys(self.replaced.values()):
            if (other := _other_reader(parameters[name], reading)) is not None:
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
                held = [
                    None if a.target is torch.ops.aten.scalar_tensor.default else self.copy(a) for a in amaxes
                ]
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

    def unquantized(self) -> None:
        """Everything else under the same name: rewritten, or loaded and stored as it is."""
        tensors = self.program.hub.tensors or {
            str(n.target): TensorInfo(shape_of(n), n.meta["val"].dtype)
            for n in self.program.graph.nodes
            if n.op == "get_attr" and n.target not in self.program.constants
        }
        changed = self._rewritten()
        for key, info in tensors.items():
            if key in self.replaced:
                continue
            name = key.replace(".", "_")
            if key in changed:
                value = self._tensor(key, info, changed)
            else:
                value = edit.call(
                    self.graph, f"{name}_", dialect.LOAD, key, shape=list(info.shape), dtype=info.dtype
                )
            edit.call(self.graph, f"{name}_store", dialect.STORE, key, value)

    def _rewritten(self) -> dict[str, dict[str, Rewritten]]:
        """Tensor of the checkpoint that is not quantized -> parameters in it that are rewritten."""
        found: dict[str, dict[str, Rewritten]] = {}
        for parameter, entries in rewritten(self.program.graph).items():
            name = str(parameter.target)
            stored = self.program.hub.stored.get(name, Stored.whole(name, shape_of(parameter)))
            keys = [key for keys in stored.keys for key in keys]
            if keys[0] in self.replaced:
                continue
            if len(entries) > 1:
                entries = [self._untied(parameter, keys[0], entries)]
            if stored.convert is not None:
                operations = stored.convert.operations
                raise VerifyError(
                    f"lower: {name} is rewritten, but made of {keys[0]} by {operations}, which does more "
                    "than choose rows, so that no tensor of the checkpoint can hold it"
                )
            if entries[0].whole is not None or entries[0].experts:
                for key in keys:
                    found.setdefault(key, {})[name] = entries[0]
        return found

    def _untied(self, parameter: Node, key: str, entries: list[Rewritten]) -> Rewritten:
        """Of a table that the model's head shares, and reads otherwise: the head gets a tensor of its own."""
        tables = [e for e in entries if any(r.target is torch.ops.aten.embedding.default for r in e.readers)]
        heads = [entry for entry in entries if entry not in tables]
        tied = self._tied_to(key)
        if len(tables) != 1 or len(heads) != 1 or len(tied) != 1 or heads[0].experts:
            readers = ", ".join(f"%{entry.readers[0].name}" for entry in entries)
            raise VerifyError(
                f"lower: {key} is rewritten for some of its readers and not alike for others ({readers}); "
                "one tensor cannot be both"
            )
        new = self._value(parameter, heads[0] if heads[0].whole is not None else None, None)
        edit.call(self.graph, f"{tied[0].replace('.', '_')}_store", dialect.STORE, f"{tied[0]}.weight", new)
        self.program.untied.append(tied[0])
        return tables[0]

    def _tensor(self, key: str, info: TensorInfo, changed: dict[str, dict[str, Rewritten]]) -> Node:
        """A tensor of the checkpoint out of the parameters that lie in it."""
        parameters = {str(n.target): n for n in self.program.graph.nodes if n.op == "get_attr"}
        pieces: list[Node] = []
        rows: list[int] = []
        for name, stored in self._held_in(key):
            if name not in parameters:
                raise VerifyError(
                    f"lower: {key} is rewritten in part, but the graph never reads {name} in it"
                )
            start = 0
            for part in stored.parts:
                for expert, own in enumerate(part.keys):
                    if own == key:
                        which = expert if stored.stacked else None
                        value = self._value(parameters[name], changed[key].get(name), which)
                        pieces.append(self._piece(value, stored, start, len(part.rows)))
                        rows += [part.rows.start, part.rows.stop, part.rows.step]
                start += len(part.rows)
        value = pieces[0]
        if len(pieces) > 1:
            shape = list(info.shape)
            value = edit.call(
                self.graph, f"{key.replace('.', '_')}_rows", dialect.JOIN_ROWS, pieces, rows=rows, shape=shape
            )
        if value.meta["val"].dtype != info.dtype:
            cast = torch.ops.aten._to_copy.default
            value = edit.call(self.graph, f"{value.name}_cast", cast, value, dtype=info.dtype)
        return value

    def _held_in(self, key: str) -> list[tuple[str, Stored]]:
        """The parameters that lie in a tensor; one of several names once."""
        hub, found = self.program.hub, dict[tuple[object, ...], tuple[str, Stored]]()
        read = {str(n.target) for n in self.program.graph.nodes if n.op == "get_attr"}
        for name in sorted(hub.stored, key=lambda name: name not in read):
            stored = hub.stored[name]
            if any(key in keys for keys in stored.keys):
                found.setdefault(stored.parts, (name, stored))
        return list(found.values()) or [(key, Stored.whole(key, ()))]

    def _value(self, parameter: Node, changed: Rewritten | None, expert: int | None) -> Node:
        """What a parameter, or one expert of it, is to be."""
        if changed is not None and changed.whole is None and expert is None:
            count = shape_of(parameter)[0]
            return edit.call(
                self.graph,
                f"{parameter.name}_new",
                dialect.STACK,
                [self._value(parameter, changed, e) for e in range(count)],
            )
        if changed is not None and expert in changed.experts:
            new = changed.experts[expert]
        elif changed is not None and changed.whole is not None:
            new = changed.whole
            expert = expert if len(shape_of(new)) == 3 else None
        else:
            new = parameter
        value = self.copy(new)
        if new is not parameter and is_turned(new):
            value = edit.transposed(value)
        if expert is not None and (changed is None or expert not in changed.experts):
            value = edit.call(self.graph, f"{value.name}_e{expert}", dialect.SLICE, value, expert)
        return value

    def _piece(self, value: Node, stored: Stored, start: int, count: int) -> Node:
        """Rows of a parameter, as they are stored."""
        value = edit.transposed(value) if stored.transposed else value
        shape = shape_of(value)
        if count == (shape[row_axis(shape)] if shape else 1) or len(stored.parts) == 1:
            return value
        rows, axis = torch.ops.aten.slice.Tensor, row_axis(shape)
        return edit.call(self.graph, f"{value.name}_{start}", rows, value, axis, start, start + count)

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
    return is_rounding(t) and FORMATS[str(t.kwargs["format"])].caches


def _below_input_quantize(x: Node) -> Node:
    """The operand of a linear's own input quantize node, or `x` itself."""
    quantize = input_quantize(x)
    return strip(x if quantize is None else node_at(quantize, 0), VIEWS)


def _other_reader(parameter: Node, reading: Container[Node]) -> Node | None:
    """A node, of those that compute with what they read, that reads a quantized parameter (or a view or slice
    of it) as it is."""
    stack, seen = [parameter], {parameter}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in reading:
                return user
            stands = user.target in VIEWS or user.target in (dialect.SLICE, dialect.REWRITE)
            if stands and node_at(user, 0) is node and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def _keys(hub: Hub, name: str) -> list[str]:
    stored = hub.stored.get(name)
    return [key for keys in stored.keys for key in keys] if stored is not None else []
