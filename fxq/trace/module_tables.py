"""What modules hold, and how they are called, changed for the time of an export and put back."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx._symbolic_trace import _orig_module_call, _orig_module_getattr

_Table = dict[str, Any]
_HIDDEN = "_fxq_hidden"


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have, hidden ones too."""
    for prefix, inner in module.named_modules(remove_duplicate=False):
        for table in vars(inner).get(_HIDDEN, (inner._parameters, inner._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    yield f"{prefix}.{name}".lstrip("."), tensor


@contextlib.contextmanager
def hidden(module: nn.Module) -> Iterator[None]:
    """Within, the weights of a module and of those inside it are attributes like any other."""
    kept: list[tuple[nn.Module, tuple[_Table, _Table]]] = []
    try:
        for inner in module.modules():
            if _HIDDEN not in vars(inner):
                tables = dict(inner._parameters), dict(inner._buffers)
                kept.append((inner, tables))
                inner._parameters.clear()
                inner._buffers.clear()
                vars(inner).update({**tables[0], **tables[1], _HIDDEN: tables})
        yield
    finally:
        for inner, (parameters, buffers) in kept:
            for name in (*parameters, *buffers, _HIDDEN):
                del vars(inner)[name]
            inner._parameters.update(parameters)
            inner._buffers.update(buffers)


@contextlib.contextmanager
def called_plainly() -> Iterator[None]:
    """Undo how fx follows modules in a trace: it would lose its place where one is left by an exception."""
    patched: Any = nn.Module
    call, getattr_ = patched.__call__, patched.__getattr__
    patched.__call__, patched.__getattr__ = _orig_module_call, _orig_module_getattr
    try:
        yield
    finally:
        patched.__call__, patched.__getattr__ = call, getattr_


@contextlib.contextmanager
def put_back(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
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
