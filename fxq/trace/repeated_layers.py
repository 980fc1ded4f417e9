"""Export helper: layers that compute the same are traced once; each of the others becomes one call of
`fxq.region` in the export, which gives way to a copy when the graph is read (`fxq.trace.read_export`).

That two layers compute the same is not told by their names, classes or options but seen. Before a layer is
traced, its forward runs on shapes alone, with the export's symbolic sizes, and every operator is noted with
its constants and what it reads: what entered the layer, its weights by their name within it, earlier results.
A layer that is given inputs of the same types and calls exactly these operators is of that kind. Its forward
does run, on what entered the first and on the results that the first got, so that whatever it asks about
sizes guards the trace as ever; it is only spared the tracing. Whatever could tell layers apart without being
an operator (a tensor or an object from elsewhere, state kept on a module, an input changed in place) makes a
layer be traced as if there were no other.

In full, 16 layers of Qwen3-30B-A3B take four times as long. What it costs is private names of torch:

| name | what for | freed when torch.export |
|---|---|---|
| `FakeTensor`, `TorchDispatchMode`, `pytree` | see every operator of a layer | makes them public |
| `func._schema`, `SymInt.node.expr`, `untyped_storage()._cdata` | tell these apart | makes them public |
| `_pop_mode_temporarily`, `_len_torch_function_stack`, `_disable_current_modes` | leave a trace | can pause |
| `ignore_fresh_unbacked_symbols` | sizes that only a rehearsal met are none of the trace's | can pause |
| `_orig_module_call`, `_orig_module_getattr` | no module stack for what is not traced | can pause |
| `_ExcludeDispatchKeyGuard`, `DispatchKeySet` | results are given out again, as no views | can pause |
| all of the above | | exports a submodule as a subgraph that is called many times |
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._symbolic_trace import _orig_module_call, _orig_module_getattr
from torch.overrides import _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxq.trace.symbols import data_symbols

Function = Callable[..., Any]
Key = Any  # compared with ==: stands for a value, a type, an operator with its arguments

_LARGEST_CONSTANT = 4096
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

_VIEWS_NOTED = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_LIB = torch.library.Library("fxq", "FRAGMENT")
_LIB.define("region(int call, Tensor[] tensors, Tensor[] like) -> Tensor[]")
_LIB.impl(
    "region",
    lambda call, tensors, like: [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like
    ],
    "Meta",
)
REGION = torch.ops.fxq.region.default


@dataclass(frozen=True)
class Call:
    """What one `fxq.region(number, tensors, like)` of an export stands for.

    module: a module's name. first: the number of the call at which tensors enter the first of its kind: its
    own, if this is that call; else they leave that module here (`closes`), or enter another of its kind.
    """

    module: str
    first: int
    closes: bool = False


class RepeatedLayers:
    """Stand-ins for layers within one export of `model`.

    around: the function modes that the model is exported under. calls: what each `fxq.region` of the export
    stands for, by number.
    """

    def __init__(self, model: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> None:
        self.model, self.around = model, around
        self.calls: list[Call] = []
        self._kinds: dict[type, list[_Kind]] = {}
        self._weights: dict[int, str] = {}
        self._outside: set[int] = set()
        self._on_shapes = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within, an export of the model calls those of its modules that may repeat through `self`; whatever
        it sets on a module is undone."""
        self._weights = _names(self.model)
        self._outside = {_memory(tensor) for _, tensor in named_tensors(self.model)}
        with _put_back(self.model):
            for name, module in _siblings(self.model):
                module.forward = self._called(name, module, module.forward)
            yield

    def _called(self, name: str, module: nn.Module, forward: Function) -> Function:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._on_shapes or not torch.compiler.is_exporting():
                return forward(*args, **kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
            new = None
            with contextlib.suppress(_Apart):
                arguments = structure, self._types(leaves)
                kinds = self._kinds.setdefault(type(module), [])
                with self._shapes_alone(leaves):
                    same = next(
                        (kind for kind in kinds if self._fits(kind, module, forward, leaves, arguments)), None
                    )
                    new = self._recorded(module, forward, leaves, arguments) if same is None else None
                if same is not None:
                    return self._stand_in(same, name, leaves)
            if new is None:
                return forward(*args, **kwargs)
            result = self._traced(new, name, forward, leaves)
            kinds.append(new)
            return result

        return called

    def _types(self, leaves: Sequence[Any]) -> Key:
        """Arguments: tensors by type, and by which of them are one; of all else, only that it is plain."""
        numbers: dict[int, int] = {}
        found: list[Key] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not isinstance(leaf, FakeTensor) or id(leaf) in self._weights or _unknown(leaf):
                    raise _Apart
                found.append((numbers.setdefault(id(leaf), len(numbers)), _type(leaf)))
            else:
                _plain(leaf)
                found.append(None)
        if not numbers:
            raise _Apart
        return tuple(found)

    @contextlib.contextmanager
    def _shapes_alone(self, leaves: Sequence[Any]) -> Iterator[None]:
        """Outside of the trace, but with its sizes."""
        mode: Any = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
        self._on_shapes = True
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(torch._C._len_torch_function_stack()):
                    stack.enter_context(_pop_mode_temporarily())
                stack.enter_context(_disable_current_modes())
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
                stack.enter_context(self.around())
                stack.enter_context(_called_plainly())
                # A result may be given out again: nothing is to be noted on it about views.
                stack.enter_context(torch._C._ExcludeDispatchKeyGuard(_VIEWS_NOTED))
                stack.enter_context(mode)
                yield
        finally:
            self._on_shapes = False

    def _recorded(
        self, module: nn.Module, forward: Function, leaves: list[Any], arguments: Key
    ) -> "_Kind | None":
        """A new kind, of which `module` is the first; None if operators do not tell what it does."""
        watch = _Record(_names(module), self._weights, _tensors(leaves), self._outside)
        try:
            _, result = watch.run(module, forward, arguments, leaves)
        except Exception:  # whatever a model raises; it will again when it is traced
            return None
        return _Kind(arguments, _types_within(module), leaves, watch.operations, watch.numbers, result)

    def _fits(
        self, kind: "_Kind", module: nn.Module, forward: Function, leaves: list[Any], arguments: Key
    ) -> bool:
        if arguments != kind.arguments or _types_within(module) != kind.weights:
            return False
        watch = _Replay(_names(module), self._weights, kind)
        try:
            _, result = watch.run(module, forward, arguments, kind.given(leaves))
        except Exception:  # whatever a model raises for results that are not its own
            return False
        return watch.position == len(kind.operations) and bool(result == kind.result)

    def _traced(self, kind: "_Kind", name: str, forward: Function, leaves: list[Any]) -> Any:
        """Trace the first module of a kind, with its tensors marked where they enter and leave it."""
        entering = _tensors(leaves)
        kind.call = self._number(Call(name, len(self.calls)))
        entered = REGION(kind.call, entering, entering)
        inner = dict(zip(map(id, entering), entered, strict=True))
        result = _call(forward, kind.arguments, [inner.get(id(leaf), leaf) for leaf in leaves])
        found, kind.structure = pytree.tree_flatten(result)
        through = {id(tensor): _Entered(i) for i, tensor in enumerate(entered)}
        leaving = [tensor for tensor in _tensors(found) if id(tensor) not in through]
        left = REGION(self._number(Call(name, kind.call, closes=True)), leaving, leaving)
        outer = {**through, **dict(zip(map(id, leaving), left, strict=True))}
        kind.outputs = [outer.get(id(leaf), leaf) for leaf in found]
        return _result(kind, entering, kind.outputs)

    def _stand_in(self, kind: "_Kind", name: str, leaves: list[Any]) -> Any:
        entering, like = _tensors(leaves), _tensors(kind.outputs)
        made = REGION(self._number(Call(name, kind.call)), entering, like)
        outputs = dict(zip(map(id, like), made, strict=True))
        return _result(kind, entering, [outputs.get(id(leaf), leaf) for leaf in kind.outputs])

    def _number(self, call: Call) -> int:
        self.calls.append(call)
        return len(self.calls) - 1


class _Apart(Exception):
    """Something that operators and their arguments do not tell."""


@dataclass(frozen=True)
class _Entered:
    """A result that is one of the tensors that entered."""

    position: int


@dataclass(eq=False)
class _Kind:
    """The first module of a kind: what it was called with, did and gave on shapes alone.

    call, outputs, structure: of its trace, the call that opens it and the leaves and structure of its result.
    """

    arguments: Key
    weights: Key
    leaves: list[Any]
    operations: list[tuple[Key, Any]]
    numbers: dict[int, int]
    result: Key
    call: int = -1
    outputs: list[Any] = field(default_factory=list)
    structure: Any = None

    def given(self, leaves: list[Any]) -> list[Any]:
        """Another module's arguments, with the tensors that entered the first."""
        pairs = zip(self.leaves, leaves, strict=True)
        return [mine if isinstance(mine, Tensor) else other for mine, other in pairs]


class _Watch(TorchDispatchMode):
    """Sees every operator of one module.

    own, weights: names of its parameters and buffers within it, and of all of the model's, by identity.
    numbers: values by identity: tensors that entered, then results.
    """

    def __init__(self, own: dict[int, str], weights: dict[int, str], numbers: dict[int, int]) -> None:
        super().__init__()
        self.own, self.weights, self.numbers = own, weights, numbers
        self.refused = False

    def run(
        self, module: nn.Module, forward: Function, arguments: Key, leaves: list[Any]
    ) -> tuple[list[Any], Key]:
        """Call a module's forward: the leaves of its result, and its key. _Apart where operators do not tell
        all that it did."""
        with _put_back(module) as changed, self:
            result = _call(forward, arguments, leaves)
        if changed or self.refused:  # whatever the model made of the exception
            raise _Apart
        found, structure = pytree.tree_flatten(result)
        return found, (structure, tuple(map(self.key, found)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self.see(func, args, kwargs or {})
        except Exception:
            self.refused = True
            raise

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operator's result."""
        raise NotImplementedError

    def key(self, value: Any) -> Key:
        """What stands for an argument: a number for a value, a name for a weight, else what it is."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return (type(value), *map(self.key, value))
        if isinstance(value, dict):
            return (dict, *((name, self.key(v)) for name, v in value.items()))
        return _plain(value)

    def _tensor(self, tensor: Tensor) -> Key:
        if (number := self.numbers.get(id(tensor))) is not None:
            return ("value", number)
        if (name := self.own.get(id(tensor))) is not None:
            return ("own", name)
        if (name := self.weights.get(id(tensor))) is not None:
            return ("weight", name)
        if isinstance(tensor, FakeTensor) or tensor.numel() > _LARGEST_CONSTANT:
            raise _Apart
        with _disable_current_modes():
            return ("constant", tensor.dtype, tuple(tensor.shape), repr(tensor.tolist()))


class _Record(_Watch):
    """Notes every operator with its result.

    outside: the memory of all that enters the module, which it may neither change nor return a view of.
    """

    def __init__(
        self, own: dict[int, str], weights: dict[int, str], entering: Sequence[Tensor], outside: set[int]
    ) -> None:
        super().__init__(own, weights, {id(tensor): i for i, tensor in enumerate(entering)})
        self.entering, self.outside = set(self.numbers), outside | {_memory(t) for t in entering}
        self.operations: list[tuple[Key, Any]] = []

    def run(
        self, module: nn.Module, forward: Function, arguments: Key, leaves: list[Any]
    ) -> tuple[list[Any], Key]:
        found, key = super().run(module, forward, arguments, leaves)
        leaving = [tensor for tensor in _tensors(found) if id(tensor) not in self.entering]
        memory = {_memory(tensor) for tensor in leaving} - self.outside
        if not leaving or len(memory) < len(leaving) or any(map(_unknown, leaving)):
            raise _Apart
        return found, key

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = func, self.key(args), self.key(kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise _Apart
        if func._schema.is_mutable and self.outside & {_memory(t) for t in _written(func, args, kwargs)}:
            raise _Apart
        result = func(*args, **kwargs)
        for tensor in _tensors(pytree.tree_leaves(result)):
            self.numbers.setdefault(id(tensor), len(self.numbers))
        self.operations.append((key, result))
        return result


class _Replay(_Watch):
    """Answers every operator with what it gave the first of a kind; _Apart at one that differs."""

    def __init__(self, own: dict[int, str], weights: dict[int, str], kind: _Kind) -> None:
        super().__init__(own, weights, kind.numbers)
        self.operations, self.position = kind.operations, 0

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.position == len(self.operations):
            raise _Apart
        key, result = self.operations[self.position]
        if (func, self.key(args), self.key(kwargs)) != key:
            raise _Apart
        self.position += 1
        return list(result) if isinstance(result, list) else result


def _siblings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may repeat: of one class, side by side, and made of others."""
    seen: set[nn.Module] = set()
    for parent, module in model.named_modules():
        classes = Counter(type(child) for child in module.children())
        for name, child in module.named_children():
            is_called = type(child).forward is not nn.Module.forward
            if child not in seen and is_called and classes[type(child)] > 1 and [*child.children()]:
                seen.add(child)
                yield f"{parent}.{name}".lstrip("."), child


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _names(module: nn.Module) -> dict[int, str]:
    """The first names of parameters and buffers, by identity."""
    names: dict[int, str] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), name)
    return names


def _types_within(module: nn.Module) -> Key:
    return tuple((name, _type(tensor)) for name, tensor in named_tensors(module))


@contextlib.contextmanager
def _called_plainly() -> Iterator[None]:
    """Undo how fx follows modules in a trace: it would lose its place where one is left by an exception."""
    patched: Any = nn.Module
    call, getattr_ = patched.__call__, patched.__getattr__
    patched.__call__, patched.__getattr__ = _orig_module_call, _orig_module_getattr
    try:
        yield
    finally:
        patched.__call__, patched.__getattr__ = call, getattr_


@contextlib.contextmanager
def _put_back(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Undo what is set on a module, or on one inside it, within; yields the tables that had to be put back,
    filled at the end."""
    kept = [(table, dict(table)) for m in module.modules() for table in (vars(m), m._parameters, m._buffers)]
    changed: list[dict[str, Any]] = []
    try:
        yield changed
    finally:
        for table, before in kept:
            if table.keys() != before.keys() or any(table[name] is not before[name] for name in before):
                changed.append(table)
                table.clear()
                table.update(before)


def _type(tensor: Tensor) -> Key:
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tensor.dim(), tuple(map(_plain, numbers)), tensor.dtype, tensor.device, tensor.requires_grad


def _plain(value: Any) -> Key:
    """A value that is no tensor, with its type; a symbolic size as its expression."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    if not isinstance(value, _PLAIN):
        raise _Apart
    return (type(value), repr(value) if isinstance(value, float) else value)


def _unknown(tensor: Tensor) -> bool:
    """Whether only data knows a size of a tensor."""
    return any(data_symbols(size) for size in tensor.shape)


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    """The tensors among some leaves, each once."""
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator changes in place."""
    written: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return _tensors(pytree.tree_leaves(written))


def _call(forward: Function, arguments: Key, leaves: list[Any]) -> Any:
    """Call with the given leaves in the structure of `arguments`; _Apart if containers among them change."""
    given = pytree.tree_unflatten(leaves, arguments[0])
    result = forward(*given[0], **given[1])
    after = pytree.tree_leaves(given)
    if len(after) != len(leaves) or any(a is not b for a, b in zip(after, leaves, strict=True)):
        raise _Apart
    return result


def _result(kind: _Kind, entering: Sequence[Tensor], outputs: Sequence[Any]) -> Any:
    leaves = [entering[leaf.position] if isinstance(leaf, _Entered) else leaf for leaf in outputs]
    return pytree.tree_unflatten(leaves, kind.structure)
