"""lower: the calibrated graph becomes a checkpoint program: load, pack and store, one line a tensor, nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch.fx import Graph, Node

from fxq import dialect, edit
from fxq.errors import VerifyError
from fxq.facts import Fact, amaxes_filled, amaxes_shared, is_weight_quantize, weights_quantized
from fxq.pattern import Match, Miss
from fxq.program import Program, Stored, TensorInfo
from fxq.structure import ATTENTIONS, VIEWS, Frontiers, root, shape_of, strip, weight_matmuls


@dataclass(frozen=True)
class Lower:
    """Emit every quantized linear under its hub name, KV scales, and all other tensors of the source as they are."""

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
        for matmul in weight_matmuls(program.graph):
            w, x = strip(matmul.w, VIEWS), strip(matmul.x, VIEWS)
            input_amax = x.args[1] if x.target is dialect.QUANTIZE else None
            pieces = w.args[0] if w.target is dialect.STACK else [w]
            for quantize in pieces:  # type: ignore[union-attr]
                if isinstance(quantize, Node) and quantize.target is dialect.QUANTIZE:
                    emit.linear(quantize, input_amax)  # type: ignore[arg-type]
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
    replaced: set[str] = field(default_factory=set)
    done: set[Node] = field(default_factory=set)
    count: int = 0

    def copy(self, node: Node) -> Node:
        """The node in the new graph: weights and views as they are, an amax as the value calibrated for it."""
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

    def linear(self, quantize: Node, input_amax: Node | None) -> None:
        """Pack one weight and store each hub linear that its rows hold."""
        if quantize in self.done:
            return
        self.done.add(quantize)
        w, amax = quantize.args
        assert isinstance(w, Node) and isinstance(amax, Node)
        shared = self.copy(input_amax) if input_amax is not None else None
        packed = edit.call(
            self.graph,
            f"{w.name}_packed",
            dialect.PACK_NVFP4,
            self.copy(w),
            self.copy(amax),
            scale=quantize.kwargs["scale"],
        )
        for key, start, end in self._targets(w):
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
        parameter = root(w)
        assert parameter is not None
        name, rows = str(parameter.target), shape_of(w)[0]
        stored = self.program.hub.stored.get(name, Stored(((name,),)))
        self.replaced.update(key for part in stored.keys for key in part)
        named = self.program.hub.names.get(name, stored)
        piece = strip(w, VIEWS)
        expert = int(piece.args[1]) if piece.target is dialect.SLICE else None  # type: ignore[call-overload]
        if expert is None and named.fused:
            return [(named.keys[0][0], 0, rows)]
        if expert is not None and not named.stacked:
            raise VerifyError(
                f"lower: {name}: this family's checkpoints hold all experts in one {len(shape_of(parameter))}-D tensor "
                f"({named.keys[0][0]}), for which engines define no per-expert NVFP4 names"
            )
        ends = [sum(named.rows[: part + 1]) for part in range(len(named.rows))]
        return [
            (keys[expert or 0], end - part_rows, end)
            for keys, end, part_rows in zip(named.keys, ends, named.rows, strict=True)
        ]

    def kv_caches(self) -> None:
        """One `store_kv` an attention whose keys are FP8: with its amaxes if calibrated, without if cast."""
        frontiers = Frontiers(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node.target not in ATTENTIONS:
                continue
            k, v = node.args[1], node.args[2]
            if k.target is dialect.QUANTIZE:
                amaxes = [t.args[1] for t in (k, v)]
                held = [self.copy(a) if a.target in (dialect.AMAX, dialect.SYNC) else None for a in amaxes]
                module = self._attention_module(frontiers, k, v)
                edit.call(
                    self.graph, f"{node.name}_kv", dialect.STORE_KV, module, *held, format=k.kwargs["format"]
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
