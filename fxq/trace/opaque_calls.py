"""Opaque calls: functions that are traced as one node, because a trace would freeze their loops over the
sequence.

A modelling file keeps such scans (gated delta rule, selective scan, chunked SSD, ...) in functions of the
module, outside any class. Which of them become opaque calls is decided by what they look like: they loop, or
take a `chunk_size`, and no matrix of weights is handed to them, so that quantization loses nothing by not
looking inside. Run, an opaque call is the very function that the model calls.
"""

import contextlib
import copy
import dis
import functools
import inspect
import json
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxq.graph.dialect import operator
from fxq.trace.symbols import examples, size_at

Function = Callable[..., Any]

_FUNCTIONS: dict[str, Function] = {}
_tracing = threading.local()
# Added to a symbol's value to learn which sizes of a result follow it.
_SHIFT = 4
_MODULE = "module:"


def function(name: str) -> Function:
    """The function behind an opaque call's name; KeyError unless a trace in this process met it."""
    return _FUNCTIONS[name]


def run(name: str, tensors: Sequence[Tensor], sizes: Sequence[int], arguments: str) -> list[Tensor]:
    """Make an opaque call; its tensor results in order."""
    if name not in _FUNCTIONS:
        raise RuntimeError(f"fxq.opaque({name!r}): no model traced in this process has that function")
    plan = json.loads(arguments)
    args, kwargs = _filled(plan["call"], tensors, sizes)
    values = pytree.tree_leaves(_FUNCTIONS[name](*args, **kwargs))
    return [value for value in values if isinstance(value, Tensor)]


def shapes(name: str, tensors: Sequence[Tensor], sizes: Sequence[int], arguments: str) -> list[Tensor]:
    """The types of `run`'s results: each size is a number, or "t.d" for size d of tensor t."""
    plan = json.loads(arguments)

    def size(text: int | str) -> Any:
        if isinstance(text, int):
            return text
        t, d = text.split(".")
        return tensors[int(t)].shape[int(d)]

    return [
        torch.empty([size(s) for s in result["shape"]], dtype=getattr(torch, result["dtype"]), device="meta")
        for result in plan["results"]
    ]


@contextlib.contextmanager
def opaque(model: nn.Module, *, but: Container[str] = (), classes: Container[type] = ()) -> Iterator[None]:
    """Within, on this thread, the scans of the files that define `model`'s modules become opaque
    calls, except those named in `but`; so are whole modules of the given classes."""
    patched: list[tuple[Any, str, Function]] = []
    whole = [(name, module) for name, module in model.named_modules() if type(module) in classes]
    try:
        for name, module in whole:
            module.forward = _opaque_module(f"{_MODULE}{name}", module)
        for module in _files(model):
            for name, value in list(vars(module).items()):
                if inspect.isroutine(value) and _is_scan(value, module.__name__):
                    key = f"{module.__name__}:{name}"
                    if key in but:
                        continue
                    _FUNCTIONS[key] = value
                    patched.append((module, name, value))
                    setattr(module, name, _opaque_function(key, value))
        _tracing.model, _tracing.plans = model, {}
        yield
    finally:
        _tracing.model = None
        for _, module in whole:
            del module.forward
        for module, name, value in patched:
            setattr(module, name, value)


def _files(model: nn.Module) -> list[Any]:
    """The python modules that define the classes of `model` and of everything inside it."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    return [sys.modules[n] for n in sorted(names) if n in sys.modules and n.partition(".")[0] != "torch"]


def _is_scan(value: Function, file: str) -> bool:
    body = inspect.unwrap(value)
    if not inspect.isfunction(body) or body.__module__ != file:
        return False
    if "chunk_size" in inspect.signature(body).parameters:
        return True
    return any(instruction.opname == "FOR_ITER" for instruction in dis.get_instructions(body))


def _opaque_function(key: str, original: Function) -> Function:
    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        model = getattr(_tracing, "model", None)
        if model is None or not torch.compiler.is_exporting():
            return original(*args, **kwargs)
        matrices = {id(p) for p in model.parameters() if p.dim() > 1}
        try:
            return _opaque_call(key, original, args, kwargs, matrices)
        except _Unplanned:
            return original(*args, **kwargs)

    return called


def _opaque_module(key: str, module: nn.Module) -> Function:
    """A module's forward as an opaque call whose first argument is the list of its parameters and buffers."""
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    forward, apart = module.forward, copy.deepcopy(module)
    for (
        part
    ) in apart.modules():  # while layers that repeat are traced once, a forward is that of the original
        vars(part).pop("forward", None)

    def functional(state: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(apart, dict(zip(names, state, strict=True)), args, kwargs)

    def called(*args: Any, **kwargs: Any) -> Any:
        if getattr(_tracing, "model", None) is None or not torch.compiler.is_exporting():
            return forward(*args, **kwargs)
        state = [*module.parameters(), *module.buffers()]
        try:
            return _opaque_call(key, functional, (state, *args), kwargs, frozenset())
        except _Unplanned:
            return forward(*args, **kwargs)

    _FUNCTIONS[key] = functional
    return called


def is_module(name: str) -> bool:
    """Whether an opaque call is a whole module, whose parameters it is given."""
    return name.startswith(_MODULE)


def _opaque_call(
    key: str, original: Function, args: tuple[Any, ...], kwargs: dict[str, Any], matrices: Container[int]
) -> Any:
    """`original(*args, **kwargs)` as one operator; _Unplanned if that cannot be said."""
    tensors, sizes, call = _taken_apart(args, kwargs, matrices)
    types = [(str(tuple(t.shape)), t.dtype) for t in tensors]
    seen = (key, str(call), str(types), str(sizes))
    if seen not in _tracing.plans:
        _tracing.plans[seen] = _plan(original, tensors, sizes, call)
    plan: _Plan | None = _tracing.plans[seen]
    if plan is None:
        raise _Unplanned
    results = iter(OPAQUE(key, tensors, sizes, arguments=plan.arguments))
    return pytree.tree_unflatten(
        [next(results) if isinstance(x, Tensor) else x for x in plan.values], plan.spec
    )


class _Unplanned(Exception):
    """An argument that is a matrix of weights, or neither a tensor nor plain data."""


@dataclass(frozen=True)
class _Plan:
    """How to make an opaque call: the operator's JSON, and the structure and example values of its result."""

    arguments: str
    spec: Any
    values: list[Any]


def _taken_apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], matrices: Container[int]
) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """(tensors, symbolic sizes, the call as plain data that refers to them by number)."""
    tensors: list[Tensor] = []
    sizes: list[Any] = []

    def written(value: Any) -> Any:
        match value:
            case Tensor():
                if id(value) in matrices:
                    raise _Unplanned
                tensors.append(value)
                return {"tensor": len(tensors) - 1}
            case torch.SymInt():
                sizes.append(value)
                return {"size": len(sizes) - 1}
            case None | bool() | int() | str():
                return value
            case float():
                return {"float": str(value)}
            case torch.dtype():
                return {"dtype": str(value).removeprefix("torch.")}
            case tuple() | list():
                return {"items": [written(v) for v in value], "list": isinstance(value, list)}
        raise _Unplanned

    call = {"args": [written(a) for a in args], "kwargs": {k: written(v) for k, v in kwargs.items()}}
    if not tensors:
        raise _Unplanned
    return tensors, sizes, call


def _plan(
    original: Function, tensors: Sequence[Tensor], sizes: Sequence[Any], call: dict[str, Any]
) -> _Plan | None:
    """Learn the result's shapes by calling `original` on two sets of sizes; None if they do not follow the
    inputs'."""
    first = examples([d for t in tensors for d in t.shape] + list(sizes))
    second = {s: example + _SHIFT + 2 * i for i, (s, example) in enumerate(first.items())}
    try:
        spec, values = _probe(original, call, tensors, sizes, first)
        _, others = _probe(original, call, tensors, sizes, second)
    except Exception:  # whatever a function of the modelling file raises for sizes it was not made for
        return None
    results = []
    for a, b in zip(values, others, strict=True):
        if isinstance(a, Tensor):
            shape = [_source(m, n, tensors, first, second) for m, n in zip(a.shape, b.shape, strict=True)]
            if None in shape:
                return None
            results.append({"shape": shape, "dtype": str(a.dtype).removeprefix("torch.")})
        elif a is not None:
            return None
    return _Plan(json.dumps({"call": call, "results": results}), spec, values)


def _filled(call: Any, tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    def read(value: Any) -> Any:
        match value:
            case {"tensor": i}:
                return tensors[i]
            case {"size": i}:
                return sizes[i]
            case {"float": text}:
                return float(text)
            case {"dtype": name}:
                return getattr(torch, name)
            case {"items": items, "list": as_list}:
                return (list if as_list else tuple)(read(v) for v in items)
        return value

    return [read(a) for a in call["args"]], {k: read(v) for k, v in call["kwargs"].items()}


def _probe(
    original: Function, call: Any, tensors: Sequence[Tensor], sizes: Sequence[Any], at: dict[Any, int]
) -> tuple[Any, list[Any]]:
    """Run the function with every symbol at the given value: on shapes alone, or on ones if it asks for
    values."""

    def run_on(device: str) -> tuple[Any, list[Any]]:
        inputs = [
            torch.ones([size_at(d, at) for d in t.shape], dtype=t.dtype, device=device) for t in tensors
        ]
        args, kwargs = _filled(call, inputs, [size_at(s, at) for s in sizes])
        values, spec = pytree.tree_flatten(original(*args, **kwargs))
        return spec, values

    with _disable_current_modes():
        try:
            return run_on("meta")
        except RuntimeError:  # NotImplementedError included
            return run_on("cpu")


def _source(
    a: int, b: int, tensors: Sequence[Tensor], first: dict[Any, int], second: dict[Any, int]
) -> int | str | None:
    """Where a result's size comes from: itself if it never changes, else an input size that changes alike."""
    if a == b:
        return int(a)
    for t, tensor in enumerate(tensors):
        for d, dim in enumerate(tensor.shape):
            if size_at(dim, first) == a and size_at(dim, second) == b:
                return f"{t}.{d}"
    return None


# A call that a trace left whole. The core knows it by name: `fxq.graph.structure.views.is_opaque_call`.
OPAQUE = operator(
    "opaque(str function, Tensor[] tensors, SymInt[] sizes, *, str arguments) -> Tensor[]",
    run=lambda function, tensors, sizes, *, arguments: run(function, tensors, sizes, arguments),
    shape=lambda function, tensors, sizes, *, arguments: shapes(function, tensors, sizes, arguments),
)
