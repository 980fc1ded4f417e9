"""Export of a fake model to a functional graph with names and shapes.

Batch and sequence sizes are symbolic. Experts are traced as `index > bmm`, the form in which a token's expert
is visible; fuse-experts turns it into something that can be executed at scale.
"""

import contextlib
import functools
import inspect
import traceback
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fxq.errors import TraceError
from fxq.graph.program import Program
from fxq.graph.structure.views import is_opaque_call, root, shape_of
from fxq.trace.canonical import linears
from fxq.trace.fake_model import FakeModel, first_line, quiet
from fxq.trace.opaque_calls import is_module, opaque
from fxq.trace.read_export import read
from fxq.trace.repeated_layers import Call, RepeatedLayers
from fxq.trace.symbols import data_symbols

# Unlikely sizes, so that a dimension in a dump tells where it comes from.
EXAMPLE_BATCH, EXAMPLE_LENGTH = 3, 17


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
                if data_symbols(found.shape[0]):
                    torch._check(found.shape[0] > 1)
        return result


def trace(fake: FakeModel, *, padded: bool = False, repeats: bool = True) -> Program:
    """Export `input_ids [B, S] -> logits [B, S, vocab]` as a functional aten graph whose parameters are
    `@fqn` nodes and whose matmuls by a matrix of weights are all `aten.linear`.

    padded: the graph takes an `attention_mask` int64 [B, S] as well, 0 where there is padding. repeats: trace
    modules that compute the same once (the graph is the same, only later).
    """
    transparent: set[str] = set()
    opaque_classes: set[type] = set()
    while True:
        try:
            program = _traced(fake, padded, transparent, opaque_classes, repeats)
        except TraceError:
            raise
        except Exception as error:
            culprit = _asks_for_data(error, fake.model)
            if culprit is None or type(culprit) in opaque_classes:
                raise TraceError(
                    f"{fake.config.model_type}: {_where(error, fake.model)}torch.export cannot follow it: "
                    f"{first_line(error)}"
                ) from error
            opaque_classes.add(type(culprit))
            continue
        hiding = {
            str(node.args[0])
            for node in program.graph.nodes
            if is_opaque_call(node)
            and not is_module(str(node.args[0]))
            and any(map(_is_matrix, node.all_input_nodes))
        }
        if not hiding:
            break
        transparent |= hiding
    linears(program.graph)
    _check_buffers(program, fake)
    return program


def _traced(
    fake: FakeModel, padded: bool, transparent: Container[str], opaque_classes: Container[type], repeats: bool
) -> Program:
    """The graph as exported."""
    if repeats:
        repeated = RepeatedLayers(fake.model, _EveryItem)
        with contextlib.suppress(Exception):  # what is wrong with a model, a full trace says
            with repeated.installed():
                exported, guards = _export(fake, padded, transparent, opaque_classes)
            return _program(exported, guards, fake, padded, repeated.calls)
    exported, guards = _export(fake, padded, transparent, opaque_classes)
    return _program(exported, guards, fake, padded, ())


def _program(
    exported: ExportedProgram, guards: Any, fake: FakeModel, padded: bool, calls: Sequence[Call]
) -> Program:
    graph, constants = read(exported, fake.model, calls)
    refusal = functools.partial(_refusal, fake, guards, padded)
    return Program(graph, constants=constants, accepts=refusal)


def _export(
    fake: FakeModel, padded: bool, transparent: Container[str], opaque_classes: Container[type]
) -> tuple[ExportedProgram, Any]:
    """The functional graph and the guards it came with; `transparent` names scans to look into."""
    size: Any = Dim.AUTO
    calls = opaque(fake.model, but=transparent, classes=opaque_classes)
    with quiet(), torch.no_grad(), fake.mode, calls, _EveryItem():
        shape = EXAMPLE_BATCH, EXAMPLE_LENGTH
        inputs = tuple(torch.ones(shape, dtype=torch.long) for _ in range(2 if padded else 1))
        exported = torch.export.export(
            _Logits(fake.model),
            inputs,
            dynamic_shapes=tuple({0: size, 1: size} for _ in inputs),
            strict=False,
        )
        guards = getattr(exported.module(), "_guards_fn", None)
        decomposed = exported.run_decompositions({})
    return decomposed, guards


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


def _refusal(fake: FakeModel, guards: Any, padded: bool, batch: int, length: int) -> str | None:
    """Why the trace does not hold for [batch, length]: export notes what it assumed about the sizes."""
    if fake.longest is not None and length > fake.longest:
        return f"rotary embeddings change beyond {fake.longest} tokens"
    if guards is None:
        return None
    try:
        guards(*[torch.empty(batch, length, dtype=torch.long, device="meta")] * (2 if padded else 1))
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def _check_buffers(program: Program, fake: FakeModel) -> None:
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in fake.buffers:
            value = fake.buffers[str(node.target)]
            if value.is_floating_point() and bool(value.isnan().any()):
                raise TraceError(
                    f"{node.target}: a buffer that no checkpoint holds, and transformers does not say "
                    "how to compute it"
                )
            program.constants[str(node.target)] = value
