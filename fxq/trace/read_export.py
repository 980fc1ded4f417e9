"""Reader of exported programs, which makes them graphs of fxq: parameters under one name each, types at the
example sizes, and a copy of the first of a kind in place of each call that stands for a repeated layer."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxq.errors import TraceError
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.edit import parameter, tidy
from fxq.trace.repeated_layers import REGION, Call, named_tensors
from fxq.trace.symbols import data_symbols, examples, size_at

EXAMPLE_UNKNOWN = 5
_ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
_END = 2**63 - 1
_NUMBER = re.compile(r"(_\d+)+$")


def read(
    exported: ExportedProgram, model: nn.Module, calls: Sequence[Call] = ()
) -> tuple[Graph, dict[str, Tensor]]:
    """(graph, the small tensors that the export lifted out of the model, by the name of their node).

    model: whose parameters it reads, under their first names; what was exported holds it as `model`. calls:
    what each `fxq.region` stands for.
    """
    reader = _Reader(exported, model, calls)
    whole = _Scope()
    for node in exported.graph.nodes:
        reader.place(node, whole)
    tidy(reader.graph)
    return reader.graph, reader.constants


@dataclass
class _Scope:
    """One copy of a stretch of the export: the nodes made of it, and the weights that it reads in place of
    others.

    around: the copy that it is part of.
    """

    made: dict[Node, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    around: "_Scope | None" = None

    def find(self, node: Node) -> Any:
        """What a node became, here or around."""
        if node in self.made or self.around is None:
            return self.made[node]
        return self.around.find(node)

    def name(self, weight: str) -> str:
        """The weight that is read here in place of one."""
        name = self.renamed.get(weight, weight)
        return name if self.around is None else self.around.name(name)


@dataclass(frozen=True)
class _Stretch:
    """The trace of the first module of a kind: nodes between two calls of `fxq.region`."""

    opening: Node
    body: list[Node]
    closing: Node


class _Reader:
    def __init__(self, exported: ExportedProgram, model: nn.Module, calls: Sequence[Call]) -> None:
        self.exported, self.model, self.calls = exported, model, calls
        self.graph, self.constants = Graph(), dict[str, Tensor]()
        self.inputs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        self.first_names = _first_names(model)
        self.stretches = _stretches(exported.graph, calls)
        self.examples = _Examples(exported)
        self.types: dict[Node, Any] = {}
        self.weights: dict[str, Node] = {}

    def place(self, node: Node, scope: _Scope) -> None:
        """Make what becomes of a node in one copy."""
        if node.op == "placeholder":
            if self.inputs[node.name].kind is InputKind.USER_INPUT:
                scope.made[node] = made = self.graph.create_node("placeholder", node.name, (), {}, node.name)
                made.meta["val"] = self._type(node)
        elif node.op == "output":
            # A model that changes its own weights while running returns them too, before its result.
            results = nodes_at(node, 0)[-len(self.exported.graph_signature.user_outputs) :]
            self.graph.output(tuple(self._find(n, scope) for n in results))
        elif node.op == "get_attr":
            raise TraceError(
                f"%{node.name}: the trace holds a nested graph ({node.target}), which fxq cannot read"
            )
        elif node.target is REGION:
            scope.made[node] = self._region(node, scope)
        elif _is_result_of_region(node):
            scope.made[node] = scope.find(node_at(node, 0))[int_at(node, 1)]
        elif (same := _no_op(node)) is not None:
            scope.made[node] = self._find(same, scope)
        elif node.target not in _ASSERTIONS:
            scope.made[node] = self._copy(node, scope)

    def _copy(self, node: Node, scope: _Scope) -> Node:
        args, kwargs = map_arg((_arguments(node), node.kwargs), lambda n: self._find(n, scope))
        made = self.graph.create_node("call_function", node.target, args, kwargs, _NUMBER.sub("", node.name))
        made.meta = {"val": self._type(node)} if "val" in node.meta else {}
        return made

    def _type(self, node: Node) -> Any:
        if node not in self.types:
            self.types[node] = self.examples.of(node.meta["val"], node)
        return self.types[node]

    def _find(self, node: Node, scope: _Scope) -> Any:
        held = node.op == "placeholder" and self.inputs[node.name].kind is not InputKind.USER_INPUT
        return self._weight(node, scope) if held else scope.find(node)

    def _weight(self, node: Node, scope: _Scope) -> Node:
        """The node of a parameter, buffer or constant."""
        spec = self.inputs[node.name]
        name = str(spec.target).removeprefix("model.")
        if spec.kind is InputKind.CONSTANT_TENSOR:
            name = self._constant(name, self.exported.constants[str(spec.target)])
        else:
            name = scope.name(self.first_names.get(name, name))
        if name not in self.weights:
            val = self._type(node)
            self.weights[name] = parameter(self.graph, name, val.shape, val.dtype)
        return self.weights[name]

    def _constant(self, name: str, value: Tensor) -> str:
        """The name of a constant: the first of those that are equal."""
        if self.calls and isinstance(value, FakeTensor):
            raise TraceError(f"{name}: a tensor that a repeated module made is read elsewhere")
        for first, other in self.constants.items():
            if other is value or (other.dtype == value.dtype and torch.equal(other, value)):
                return first
        self.constants[name] = value
        return name

    def _region(self, node: Node, scope: _Scope) -> list[Any]:
        """What comes out of a `fxq.region`: what goes in where it is a mark, else what a copy makes of it."""
        call = self.calls[int_at(node, 0)]
        tensors = [self._find(n, scope) for n in nodes_at(node, 1)]
        if call.closes or call.first == node.args[0]:
            return tensors
        first = self.stretches[call.first]
        renamed = self._renamed(self.calls[call.first].module, call.module)
        copy = _Scope({first.opening: tensors}, renamed, scope)
        for inner in first.body:
            if not _is_size(inner):
                self.place(inner, copy)
        return [self._find(n, copy) for n in nodes_at(first.closing, 1)]

    def _renamed(self, first: str, other: str) -> dict[str, str]:
        """The weights of one module -> those of another of its kind."""
        renamed: dict[str, str] = {}
        for name, _ in named_tensors(self.model.get_submodule(first)):
            renamed.setdefault(self.first_names[f"{first}.{name}"], self.first_names[f"{other}.{name}"])
        return renamed


def _stretches(graph: Graph, calls: Sequence[Call]) -> dict[int, _Stretch]:
    """The traces of modules that others repeat, by the call that opens them; TraceError if something outside
    reads from within one but through its results."""
    found: dict[int, _Stretch] = {}
    open_: list[tuple[int, Node, list[Node]]] = []
    within: dict[Node, tuple[int, ...]] = {}
    for node in graph.nodes:
        call = calls[int_at(node, 0)] if node.target is REGION else None
        if call is not None and call.closes:
            first, opening, body = open_.pop()
            found[first] = _Stretch(opening, body, node)
        within[node] = here = tuple(first for first, _, _ in open_)
        for _, _, body in open_:
            body.append(node)
        if call is not None and call.closes:
            continue
        if call is not None and call.first == node.args[0]:
            open_.append((call.first, node, []))
        for source in node.all_input_nodes if call is None else nodes_at(node, 1):
            there = within[source]
            if there != here[: len(there)] and not _is_size(source):
                raise TraceError(f"%{node.name} reads %{source.name}, of inside a repeated module")
    return found


def _is_size(node: Node) -> bool:
    """Whether a node is a number that follows from the inputs' sizes: one for all who ask."""
    val = node.meta.get("val")
    return isinstance(val, torch.SymInt) and not data_symbols(val)


def _is_result_of_region(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(source, Node) and source.target is REGION


class _Examples:
    """The concrete type that a symbolic value has at the example sizes.

    A number that only the data knows (how many tokens an expert gets) has no example; it is given one such
    that the sizes of every split add up.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self.unknown: dict[Any, int] = {}
        for node in exported.graph.nodes:
            if node.target is torch.ops.aten.split_with_sizes.default:
                whole = node.args[0].meta["val"].shape[node.args[2] if len(node.args) > 2 else 0]
                self._share_out(
                    self.of(whole, node), [getattr(n, "meta", {}).get("val", n) for n in nodes_at(node, 1)]
                )

    def _share_out(self, whole: int, parts: list[Any]) -> None:
        free = [s for part in parts for s in data_symbols(part) if s not in self.unknown]
        rest = whole - sum(self.unknown.get(s, 0) for part in parts for s in data_symbols(part))
        for i, symbol in enumerate(free):
            self.unknown[symbol] = rest // len(free) + (i < rest % len(free))

    def of(self, val: Any, node: Node) -> Any:
        try:
            match val:
                case Tensor():
                    return torch.empty([self.of(s, node) for s in val.shape], dtype=val.dtype, device="meta")
                case list() | tuple():
                    return type(val)(self.of(v, node) for v in val)
                case torch.SymInt() if unknown := data_symbols(val):
                    at = {s: self.unknown.setdefault(s, EXAMPLE_UNKNOWN) for s in unknown}
                    return size_at(val, {**examples([val]), **at})
                case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                    return val.node.hint
        except (TypeError, AttributeError, ValueError) as error:
            raise TraceError(f"%{node.name}: its size depends on the data: {node.format_node()}") from error
        return val


def _arguments(node: Node) -> tuple[Any, ...]:
    """A node's arguments; one form of a slice from the start, which export writes as None or as 0."""
    if node.target is torch.ops.aten.slice.Tensor and len(node.args) > 2 and node.args[2] is None:
        return (*node.args[:2], 0, *node.args[3:])
    return node.args


def _no_op(node: Node) -> Node | None:
    """The input of a slice that keeps everything, or an alias; export leaves hundreds."""
    target, args = node.target, node.args
    source = args[0] if args and isinstance(args[0], Node) else None
    if target is torch.ops.aten.slice.Tensor and len(args) >= 4:
        whole = args[2] == 0 and args[3] == _END and (len(args) < 5 or args[4] == 1)
        return source if whole else None
    if target in (
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.lift_fresh_copy.default,
    ):
        return source
    return None


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tied parameter or buffer -> its first name: one tensor, one name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model)}
