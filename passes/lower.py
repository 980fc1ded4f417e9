"""lower: the calibrated graph becomes a checkpoint program: load, pack and store, one line a tensor,
nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch.fx import Graph, Node

from fxq import dialect, edit
from fxq.errors import VerifyError
from fxq.facts import Fact, amaxes_filled, amaxes_shared, is_weight_quantize, weights_quantized
from fxq.nodes import int_at, node_at, nodes_at
from fxq.pattern import Match, Miss
from fxq.program import Program, Stored, TensorInfo
from fxq.structure import (
    ATTENTIONS,
    VIEWS,
    Frontiers,
    input_quantize,
    latent_projection,
    parameter_name,
    shape_of,
    strip,
    weight_matmuls,
)


@dataclass(frozen=True)
class Lower:
    """Emit every quantized linear under its hub name, KV scales, and all other tensors of the source as
    they are."""

    format: Literal["modelopt"] = "modelopt"

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = ()

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
        emit.graph.output(())
        program.calibrated, program.graph = program.graph, emit.graph
        return emit.count


@dataclass
class _Emitter:
    program: Program
    graph: Graph = field(default_factory=Graph)
    copies: dict[Node, Node] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    caches: dict[str, list[Node | None]] = field(default_factory=dict)
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
        """Pack one weight and store each hub linear that its rows hold; a weight that layers share has the
        largest of their input amaxes (in the graph itself such a group would be a cycle)."""
        w, amax = node_at(quantize, 0), node_at(quantize, 1)
        inputs = [self.copy(amax) for amax in input_amaxes]
        shared = inputs[0] if inputs else None
        if len(inputs) > 1:
            shared = edit.call(self.graph, f"{w.name}_input_amaxes", dialect.SYNC, inputs)
        packed = edit.call(
            self.graph,
            f"{w.name}_packed",
            dialect.PACK_NVFP4,
            self.copy(w),
            self.copy(amax),
            scale=quantize.kwargs["scale"],
        )
        for key, start, end in self._targets(w):
            if key in self.stored:
                raise VerifyError(f"lower: {key} would be stored twice; the second time by %{quantize.name}")
            self.stored.add(key)
            name = key.removesuffix(".weight")
            edit.call(
                self.graph,
                f"{packed.name}_{start}",
                dialect.STORE_LINEAR,
                name,
                packed,
                shared,
                start=start,
                end=end,
            )
            self.count += 1

    def _targets(self, w: Node) -> list[tuple[str, int, int]]:
        """(hub tensor, first row, end row) for the rows of a weight [out, in]."""
        name, rows = parameter_name(w), shape_of(w)[0]
        piece = strip(w, VIEWS)
        if piece.target is not dialect.SLICE and piece.op != "get_attr":
            raise VerifyError(
                f"lower: {name} is used in parts (%{piece.name}), which cannot be one quantized "
                "tensor; skip it"
            )
        stored = self.program.hub.stored.get(name, Stored(((name,),)))
        named = self.program.hub.names.get(name, stored)
        self.replaced.update((key, name) for part in stored.keys for key in part)
        expert = int_at(piece, 1) if piece.target is dialect.SLICE else None
        if expert is None and named.fused:
            return [(named.keys[0][0], 0, rows)]
        if expert is not None and not named.stacked:
            raise VerifyError(
                f"lower: {name}: this family's checkpoints hold all experts in one tensor "
                f"({named.keys[0][0]}), for which engines define no per-expert NVFP4 names"
            )
        ends = [sum(named.rows[: part + 1]) for part in range(len(named.rows))]
        return [
            (keys[expert or 0], end - part_rows, end)
            for keys, end, part_rows in zip(named.keys, ends, named.rows, strict=True)
        ]

    def check_complete(self) -> None:
        """What the source holds of a quantized parameter is stored again in full, and nothing else reads
        it."""
        quantized = dict.fromkeys(self.replaced.values())
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and node.target in quantized:
                other = _other_reader(node)
                if other is not None:
                    raise VerifyError(
                        f"lower: {node.target} is quantized where a linear reads it, but "
                        f"%{other.name} reads it too; one tensor cannot be both"
                    )
        named = self.program.hub.names
        for name in quantized:
            for part in named[name].keys if name in named else ():
                for expert, key in enumerate(part):
                    if key not in self.stored:
                        raise VerifyError(
                            f"lower: {key} would be lost: the graph never reads expert {expert} of {name}"
                        )

    def kv_caches(self) -> None:
        """One `store_kv` an attention whose keys are FP8: with its amaxes if calibrated, without if cast."""
        frontiers = Frontiers(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node.target not in ATTENTIONS:
                continue
            k, v = node_at(node, 1), node_at(node, 2)
            latent = latent_projection(frontiers, node)
            cached = [k, v] if latent is None else [_below_input_quantize(frontiers.matmuls[latent].x)]
            if all(t.target is dialect.QUANTIZE and t.kwargs["format"] != "nvfp4" for t in cached):
                amaxes = [node_at(t, 1) for t in cached] * (1 if latent is None else 2)
                held = [self.copy(a) if a.target in (dialect.AMAX, dialect.SYNC) else None for a in amaxes]
                module = self._attention_module(frontiers, k, v)
                if module in self.caches:
                    if self.caches[module] == held:
                        continue  # another attention reads the same cache
                    raise VerifyError(f"lower: two attentions with different caches share {module}'s scales")
                self.caches[module] = held
                edit.call(
                    self.graph,
                    f"{node.name}_kv",
                    dialect.STORE_KV,
                    module,
                    *held,
                    format=cached[0].kwargs["format"],
                )

    def _attention_module(self, frontiers: Frontiers, k: Node, v: Node) -> str:
        """The hub's name of the module around the projections that make K and V."""
        keys = []
        for matmul in frontiers.of(k, v):
            name = str(frontiers.matmuls[matmul].parameter.target)
            keys.append(self.program.hub.stored.get(name, Stored(((name,),))).keys[0][0])
        if not keys:
            raise VerifyError(
                f"lower: %{k.name}: no projection makes the keys of this attention; where would its scale go?"
            )
        modules = [key.split(".")[:-2] for key in keys]
        shared = 0
        while all(shared < len(m) and m[shared] == modules[0][shared] for m in modules):
            shared += 1
        if shared == 0:
            raise VerifyError(
                f"lower: {', '.join(keys)} make the keys and values of one attention but lie in no "
                "common module, which would hold its scales"
            )
        return ".".join(modules[0][:shared])

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
