"""From a model's twin to a functional graph with names and shapes.

The twin is exported with symbolic batch and sequence sizes. Experts are traced as `index > bmm`, the form in
which a token's expert is visible; fuse-experts turns it into something that can be executed at scale.
"""

import functools
import inspect
import traceback
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fxq import dialect, sizes
from fxq.edit import parameter, tidy
from fxq.errors import TraceError
from fxq.leaves import is_module, opaque
from fxq.normalize import linears
from fxq.program import Program
from fxq.structure import root, shape_of
from fxq.twin import Twin, first_line, quiet

# Unlikely sizes, so that a dimension in a dump tells where it comes from.
EXAMPLE_BATCH, EXAMPLE_LENGTH, EXAMPLE_UNKNOWN = 3, 17, 5
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


class _Logits(nn.Module):
    """`input_ids, attention_mask -> logits` of the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters.values()
        caches = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in takes)
        self.options = {"use_cache": False} if caches else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.model(input_ids=input_ids, **masked, **self.options).logits


class _EveryItem(TorchFunctionMode):
    """A python loop over `mask.nonzero()` visits every index, hit or not.

    Loops over the experts that some token chose do nothing for the others, and a trace must hold all of them.
    Shortcuts for an expert that got no token (or one) are not traced: what follows is right for any number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hits: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.unbind and id(args[0]) in self.hits:
            return tuple(torch.tensor([index]) for index in range(self.hits[id(args[0])][1]))
        result = func(*args, **(kwargs or {}))
        if (
            func in (Tensor.nonzero, torch.nonzero)
            and args[0].dim() == 1
            and isinstance(args[0].shape[0], int)
        ):
            self.hits[id(result)] = (result, args[0].shape[0])
        if func in (Tensor.nonzero, torch.nonzero, torch.where):
            for found in result if isinstance(result, (tuple, list)) else [result]:
                if sizes.data_symbols(found.shape[0]):
                    torch._check(found.shape[0] > 1)
        return result


def trace(twin: Twin, *, padded: bool = False) -> Program:
    """Export `input_ids [B, S] -> logits [B, S, vocab]` as a functional aten graph whose parameters are
    `@fqn` nodes and whose matmuls by a matrix of weights are all `aten.linear`.

    padded: the graph takes an `attention_mask` int64 [B, S] as well, 0 where there is padding.
    """
    transparent: set[str] = set()
    opaque_classes: set[type] = set()
    while True:
        try:
            exported, guards = _export(twin, padded, transparent, opaque_classes)
        except Exception as error:
            culprit = _asks_for_data(error, twin.model)
            if culprit is None or type(culprit) in opaque_classes:
                raise TraceError(
                    f"{twin.config.model_type}: {_where(error, twin.model)}torch.export cannot follow it: "
                    f"{first_line(error)}"
                ) from error
            opaque_classes.add(type(culprit))
            continue
        program = Program(Graph(), accepts=functools.partial(_refusal, twin, guards, padded))
        _copy_graph(exported, twin, program)
        hiding = {
            str(node.args[0])
            for node in program.graph.nodes
            if node.target is dialect.LEAF
            and not is_module(str(node.args[0]))
            and any(map(_is_matrix, node.all_input_nodes))
        }
        if not hiding:
            break
        transparent |= hiding
    linears(program.graph)
    _check_buffers(program, twin)
    return program


def _export(
    twin: Twin, padded: bool, transparent: Container[str], opaque_classes: Container[type]
) -> tuple[ExportedProgram, Any]:
    """The functional graph and the guards it came with; `transparent` names scans to look into."""
    size: Any = Dim.AUTO
    leaves = opaque(twin.model, but=transparent, classes=opaque_classes)
    with quiet(), torch.no_grad(), twin.mode, leaves, _EveryItem():
        shape = EXAMPLE_BATCH, EXAMPLE_LENGTH
        inputs = tuple(torch.ones(shape, dtype=torch.long) for _ in range(2 if padded else 1))
        exported = torch.export.export(
            _Logits(twin.model),
            inputs,
            dynamic_shapes=tuple({0: size, 1: size} for _ in inputs),
            strict=False,
        )
        guards = getattr(exported.module(), "_guards_fn", None)
        return exported.run_decompositions({}), guards


def _asks_for_data(error: BaseException, model: nn.Module) -> nn.Module | None:
    """The submodule whose forward needs values that a trace does not have, if it may be one opaque call: it
    holds no stack of matrices, whose quantization would be lost."""
    if not isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException)):
        return None
    modules = {id(module) for module in model.modules()} - {id(model)}
    found: nn.Module | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in modules:
            found = owner
    holds_stack = found is not None and any(p.dim() > 2 for p in found.parameters())
    return None if holds_stack else found


def _where(error: BaseException, model: nn.Module) -> str:
    """The innermost submodule whose forward an error passed through, and the line of it."""
    names = {id(module): name for name, module in model.named_modules()}
    files = {inspect.getsourcefile(type(module)) for module in model.modules()}
    found, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if names.get(id(owner)):
            found = f"{names[id(owner)]} ({type(owner).__name__})"
        if frame.f_code.co_filename in files:
            line = f"{Path(frame.f_code.co_filename).name}:{number}"
    return f"{found}, {line}: " if found else ""


def _is_matrix(node: Node) -> bool:
    parameter = root(node)
    return parameter is not None and len(shape_of(parameter)) > 1


def _refusal(twin: Twin, guards: Any, padded: bool, batch: int, length: int) -> str | None:
    """Why the trace does not hold for [batch, length]: export notes what it assumed about the sizes."""
    if twin.longest is not None and length > twin.longest:
        return f"rotary embeddings change beyond {twin.longest} tokens"
    if guards is None:
        return None
    try:
        guards(*[torch.empty(batch, length, dtype=torch.long, device="meta")] * (2 if padded else 1))
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def _copy_graph(exported: ExportedProgram, twin: Twin, program: Program) -> None:
    aliases = _canonical_names(twin.model)
    graph, made, examples = program.graph, dict[Node, Any](), _Examples(exported)
    parameters: dict[str, Node] = {}
    inputs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            val = examples.of(node.meta["val"], node)
            if spec.kind is InputKind.USER_INPUT:
                made[node] = graph.create_node("placeholder", node.name, (), {}, node.name)
                made[node].meta["val"] = val
                continue
            name = str(spec.target).removeprefix("model.")
            if spec.kind is InputKind.CONSTANT_TENSOR:
                program.constants[name] = exported.constants[str(spec.target)]
            name = aliases.get(name, name)
            if name not in parameters:
                parameters[name] = parameter(graph, name, val.shape, val.dtype)
            made[node] = parameters[name]
        elif node.target in _ASSERTIONS:
            continue
        elif (same := _no_op(node)) is not None:
            made[node] = made[same]
        elif node.op == "get_attr":
            raise TraceError(
                f"%{node.name}: the trace holds a nested graph ({node.target}), which fxq cannot read"
            )
        elif node.op == "output":
            # A model that changes its own weights while running returns them too, before its result.
            graph.output(tuple(made[n] for n in node.args[0][-len(exported.graph_signature.user_outputs) :]))
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].meta = {"val": examples.of(node.meta["val"], node)} if "val" in node.meta else {}
    tidy(graph)


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
                    self.of(whole, node), [getattr(n, "meta", {}).get("val", n) for n in node.args[1]]
                )

    def _share_out(self, whole: int, parts: list[Any]) -> None:
        free = [s for part in parts for s in sizes.data_symbols(part) if s not in self.unknown]
        rest = whole - sum(self.unknown.get(s, 0) for part in parts for s in sizes.data_symbols(part))
        for i, symbol in enumerate(free):
            self.unknown[symbol] = rest // len(free) + (i < rest % len(free))

    def of(self, val: Any, node: Node) -> Any:
        try:
            match val:
                case Tensor():
                    return torch.empty([self.of(s, node) for s in val.shape], dtype=val.dtype, device="meta")
                case list() | tuple():
                    return type(val)(self.of(v, node) for v in val)
                case torch.SymInt() if unknown := sizes.data_symbols(val):
                    examples = {s: self.unknown.setdefault(s, EXAMPLE_UNKNOWN) for s in unknown}
                    return sizes.value(val, {**sizes.symbols([val]), **examples})
                case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                    return val.node.hint
        except (TypeError, AttributeError, ValueError) as error:
            raise TraceError(f"%{node.name}: its size depends on the data: {node.format_node()}") from error
        return val


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


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tied parameter -> its first name: one tensor, one name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _check_buffers(program: Program, twin: Twin) -> None:
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in twin.buffers:
            value = twin.buffers[str(node.target)]
            if value.is_floating_point() and bool(value.isnan().any()):
                raise TraceError(
                    f"{node.target}: a buffer that no checkpoint holds, and transformers does not say "
                    "how to compute it"
                )
            program.constants[str(node.target)] = value
