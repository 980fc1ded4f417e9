"""Weight expressions: what nodes compute that no batch changes, of many alike nodes at once.

%e0_q : bf16[64,32] = fxq.quantize(%e0, %e0_amax, format='nvfp4', scale='max')   with %e0 = fxq.slice(%w, 0)
%w_q : bf16[4,64,32] = fxq.stack([%e0_q, ..., %e3_q])    is one rounding of %w, with the amaxes of its slices

The same rules serve to compute tensors (`fxq.run.weights`) and to build a graph that does (`RunGraph`).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_pack, is_rounding, is_statistic, operator, tensor_type
from fxq.graph.structure.views import shape_of, varying

_ATEN = torch.ops.aten
Value = TypeVar("Value")


def _amaxes(ts: Tensor) -> Tensor:
    if ts.device.type == "cuda" and ts.is_contiguous():
        low, high = torch.aminmax(ts.flatten(1), dim=1)
        return torch.maximum(high, -low).to(torch.float32)
    return torch.stack([dialect.AMAX(t) for t in ts])


# The largest magnitude of each ts[i], f32 [n].
AMAXES = operator(
    "amaxes(Tensor ts) -> Tensor", run=_amaxes, shape=lambda ts: tensor_type(ts.shape[:1], torch.float32)
)


class Expressions(Generic[Value]):
    """Rules by which nodes that depend on parameters and finished statistics alone get a value each, or many
    alike nodes one value [n, ...] together. What a value is, and what has one already, subclasses say."""

    def __init__(self) -> None:
        self.known: dict[Node | tuple[Node, ...], Value] = {}

    def leaf(self, nodes: tuple[Node, ...]) -> Value | None:
        """The value [n, ...] of nodes that need no computing; None if they do."""
        raise NotImplementedError

    def call(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], origin: tuple[Node, ...]
    ) -> Value:
        """What a target gives for values. origin: the nodes that it is called for."""
        raise NotImplementedError

    def is_given(self, node: Node) -> bool:
        """Whether a node's value comes from elsewhere, whatever the node says."""
        return False

    def one(self, node: Node) -> Value:
        """The value of a node."""
        if node not in self.known:
            self.known[node] = self._one(node)
        return self.known[node]

    def many(self, nodes: Iterable[Node]) -> Value:
        """The values of nodes of one shape and dtype, [n, ...]."""
        key = tuple(nodes)
        if key not in self.known:
            found = self.leaf(key)
            self.known[key] = self._many(key) if found is None else found
        return self.known[key]

    def _one(self, node: Node) -> Value:
        if node.target is dialect.STACK:
            return self.many(nodes_at(node, 0))
        if node.target is dialect.SYNC:
            amaxes = nodes_at(node, 0)
            return self.call(dialect.AMAX, (self.many(amaxes),), {}, (node,))
        if node.target is dialect.REWRITE:
            return self._cast(self.one(node_at(node, 1)), node, (node,))
        found = self.leaf((node,))
        if found is not None:
            return self.call(_ATEN.select.int, (found, 0, 0), {}, (node,))
        args, kwargs = map_arg((node.args, node.kwargs), self.one)  # type: ignore[misc, arg-type]
        return self.call(node.target, args, kwargs, (node,))

    def _many(self, nodes: tuple[Node, ...]) -> Value:
        first = nodes[0]
        if len(nodes) > 1 and all(node is first for node in nodes):
            one = self.call(_ATEN.unsqueeze.default, (self.one(first), 0), {}, nodes)
            sizes = [len(nodes), *([-1] * len(shape_of(first)))]
            return self.call(_ATEN.expand.default, (one, sizes), {}, nodes)
        alike = all(n.target is first.target and n.kwargs == first.kwargs for n in nodes)
        alike = alike and not any(map(self.is_given, nodes))
        if alike and (is_rounding(first) or is_pack(first)):
            columns = [self.many(column) for column in _columns(nodes)]
            return self.call(first.target, columns, dict(first.kwargs), nodes)
        known = dialect.find(first.target)
        if alike and known is not None and known.many is not None:
            columns = [self.many(column) for column in _columns(nodes)]
            return self.call(known.many, columns, dict(first.kwargs), nodes)
        if alike and first.target is dialect.REWRITE:
            return self._cast(self.many(node_at(node, 1) for node in nodes), first, nodes)
        if alike and first.target is dialect.AMAX and len({shape_of(node_at(n, 0)) for n in nodes}) == 1:
            return self.call(AMAXES, (self.many(node_at(node, 0) for node in nodes),), {}, nodes)
        if alike and first.target is dialect.SYNC and len({len(nodes_at(n, 0)) for n in nodes}) == 1:
            amaxes = [self.many(column) for column in zip(*(nodes_at(n, 0) for n in nodes), strict=True)]
            return self.call(dialect.SYNC, (amaxes,), {}, nodes)
        if alike and first.target is dialect.SLICE and len({node.args[0] for node in nodes}) == 1:
            experts = [node.args[1] for node in nodes]
            if experts == list(range(shape_of(node_at(first, 0))[0])):
                return self.one(node_at(first, 0))
        if len(nodes) == 1:
            return self.call(_ATEN.unsqueeze.default, (self.one(first), 0), {}, nodes)
        return self.call(_ATEN.stack.default, ([self.one(node) for node in nodes],), {}, nodes)

    def _cast(self, value: Value, rewrite: Node, origin: tuple[Node, ...]) -> Value:
        """What was computed for a weight, in the weight's dtype."""
        dtype = rewrite.meta["val"].dtype
        if node_at(rewrite, 1).meta["val"].dtype == dtype:
            return value
        return self.call(_ATEN._to_copy.default, (value,), {"dtype": dtype}, origin)


def _columns(nodes: Sequence[Node]) -> Iterable[list[Node]]:
    """The arguments of alike calls, position by position."""
    return (list(column) for column in zip(*(cast(tuple[Node, ...], n.args) for n in nodes), strict=True))


@dataclass(frozen=True)
class Variant:
    """A reading of a program: whether roundings and rewrites are done, or give way to what they stand for."""

    roundings: bool = True
    rewrites: bool = True


class RunGraph:
    """A graph that computes what another says, made to be run: what is done alike to all experts of a weight
    is done at once, and what is not wanted is left out.

    graph: computes the nodes `wanted` of the other, once for each variant; the variants share parameters, and
    follow one another node by node. If the output is wanted, it is its first value, or a list of each
    variant's. values: statistics known by name, which are not taken again. copies: for each variant, node of
    the other -> its counterpart, for those that have one; origins: rounding of a weight in `graph` -> those
    that it is in the other.
    """

    def __init__(
        self,
        other: Graph,
        wanted: Iterable[Node],
        variants: Sequence[Variant] = (Variant(),),
        *,
        values: Collection[str] = (),
    ) -> None:
        wanted = list(wanted)
        self.graph = Graph()
        shared: dict[Node, Node] = {}
        made = [_Copy(self.graph, other, variant, wanted, values, shared) for variant in variants]
        compared = {node for copy in made for node in copy.needed if node.target is dialect.ORIGINAL}
        before: list[_Copy] = []
        if compared:
            sources = [node_at(node, 0) for node in compared]
            plain = Variant(roundings=False, rewrites=False)
            known = next((copy for copy in made if copy.variant == plain), None)
            original = known or _Copy(self.graph, other, plain, sources, values, shared)
            for copy in made:
                copy.original = original
            before = [] if known else [original]
        for node in other.nodes:
            for copy in (*before, *made):
                copy.visit(node)
        outputs = [node for node in wanted if node.op == "output"]
        if outputs:
            results = [copy.one(outputs[0].all_input_nodes[0]) for copy in made]
            self.graph.output((_listed(self.graph, results) if len(results) > 1 else results[0],))
        for copy in made:
            for node in wanted:
                if node.op != "output":
                    copy.one(node)
        self.copies = [copy.copies() for copy in made]
        self.origins = {node: origin for copy in made for node, origin in copy.origins.items()}


def _side_by_side(*values: Any) -> list[Any]:
    return list(values)


def _listed(graph: Graph, nodes: list[Node]) -> Node:
    made = graph.create_node("call_function", _side_by_side, tuple(nodes), {}, "results")
    made.meta["val"] = [node.meta["val"] for node in nodes]
    return made


class _Copy(Expressions[Node]):
    """One variant of `other`, put into `graph`. shared: nodes that all variants have alike."""

    def __init__(
        self,
        graph: Graph,
        other: Graph,
        variant: Variant,
        wanted: list[Node],
        values: Collection[str],
        shared: dict[Node, Node],
    ) -> None:
        super().__init__()
        self.graph, self.variant, self.values, self.shared = graph, variant, values, shared
        self.original: _Copy | None = None  # the model as it was, for what compares with it
        self.routed: dict[Node, _Routed] = {}
        self.origins: dict[Node, tuple[Node, ...]] = {}
        self.varying = varying(other)
        self.needed = set(wanted)
        for node in reversed(other.nodes):
            if node in self.needed:
                self.needed.update(self._inputs(node))

    def visit(self, node: Node) -> None:
        """Copy a node if it is needed and differs by batch; what does not is made when something needs it."""
        if node.op == "placeholder" or (
            node in self.needed and node.op != "output" and (node in self.varying or self._is_taken(node))
        ):
            self.one(node)

    def copies(self) -> dict[Node, Node]:
        """Node of the other graph -> its counterpart."""
        return {node: made for node, made in self.known.items() if isinstance(node, Node)}

    def _inputs(self, node: Node) -> Sequence[Node]:
        if node.op == "output":
            return node.all_input_nodes[:1]
        if self._gives_way(node):
            return [node_at(node, 0)]
        if node.target is dialect.ORIGINAL:
            return node.all_input_nodes[1:]
        return [] if self._is_known(node) else node.all_input_nodes

    def _gives_way(self, node: Node) -> bool:
        if node.target is dialect.REWRITE:
            return not self.variant.rewrites
        return not self.variant.roundings and is_rounding(node)

    def _is_known(self, node: Node) -> bool:
        return is_statistic(node) and node.name in self.values

    def _is_taken(self, node: Node) -> bool:
        """Whether a node is a statistic of activations that is not known yet."""
        reads = (source in self.varying for source in node.all_input_nodes)
        return is_statistic(node) and any(reads) and not self._is_known(node)

    def _copied(self, node: Node) -> Node:
        made = self.graph.node_copy(node, self.one)
        made.meta = {"val": node.meta["val"]}
        return made

    def _one(self, node: Node) -> Node:
        if node.op in ("placeholder", "get_attr"):
            if node not in self.shared:
                self.shared[node] = self._copied(node)
            return self.shared[node]
        if self._gives_way(node):
            return self.one(node_at(node, 0))
        if node.target is dialect.ORIGINAL:
            return self._as_it_was(node)
        if self._is_known(node):
            return edit.value(self.graph, node.name, node.meta["val"])
        if node in self.varying or self._is_taken(node):
            return self._copied(node)
        return super()._one(node)

    def _as_it_was(self, node: Node) -> Node:
        """What `fxq.original` stands for: of the original model, or of it with the routing of this one."""
        assert self.original is not None
        t, *ids = node.all_input_nodes
        if not ids:
            return self.original.one(t)
        if ids[0] not in self.routed:
            self.routed[ids[0]] = _Routed(self, self.original, ids[0])
        return self.routed[ids[0]].one(t)

    def _many(self, nodes: tuple[Node, ...]) -> Node:
        if all(map(self._gives_way, nodes)):
            return self.many(node_at(node, 0) for node in nodes)
        return super()._many(nodes)

    def leaf(self, nodes: tuple[Node, ...]) -> None:
        return None

    def is_given(self, node: Node) -> bool:
        return self._is_known(node) or self._is_taken(node) or node.target is dialect.ORIGINAL

    def call(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], origin: tuple[Node, ...]
    ) -> Node:
        name = origin[0].name if len(origin) == 1 else f"{origin[0].name}_all"
        made = edit.call(self.graph, name, target, *args, **kwargs)
        if is_rounding(made):
            self.origins[made] = origin
        return made


class _Routed(_Copy):
    """The original model from where tokens are sent to experts on, with the choice of another variant: its
    integers that `ids` is computed from, and what follows from them, computed anew."""

    def __init__(self, copy: _Copy, original: _Copy, ids: Node) -> None:
        graph = ids.graph
        super().__init__(original.graph, graph, original.variant, [], original.values, original.shared)
        stack, chosen = [ids], set[Node]()
        while stack:
            node = stack.pop()
            val = node.meta.get("val")
            is_choice = isinstance(val, Tensor) and not val.is_floating_point() and node in self.varying
            if is_choice and node.op != "placeholder" and node not in chosen:
                chosen.add(node)
                stack += node.all_input_nodes
        self.known.update((node, copy.one(node)) for node in chosen)
        self.source, self.follows = original, set(chosen)
        for node in graph.nodes:
            if any(source in self.follows for source in node.all_input_nodes):
                self.follows.add(node)

    def _one(self, node: Node) -> Node:
        return super()._one(node) if node in self.follows else self.source.one(node)
