"""Every rule a graph must keep between passes: order, known operators, the operators' own rules, and types
that they really give."""

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.text import format_node, format_target, format_type, is_operator

# Operators whose result's size or value only the data knows: its recorded example is all there is.
_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

# What torch's shape rules raise for arguments they cannot take; which one differs by operator and version.
_REJECTIONS = (
    RuntimeError,
    TypeError,
    NotImplementedError,
    IndexError,
    ValueError,
    AttributeError,
    AssertionError,
)


Checked = dict[Node, tuple[object, ...]]  # a call -> what it was when it was found good


def verify(graph: Graph, checked: Checked | None = None) -> Checked:
    """Raise VerifyError, naming the node, unless the graph keeps every rule.

    checked: what an earlier call returned; calls that are still the same are not checked again.
    """
    before, good = checked or {}, Checked()
    seen: set[Node] = set()
    outputs = 0
    for node in graph.nodes:
        if outputs:
            raise _broken(node, "comes after the return")
        for source in node.all_input_nodes:
            if source not in seen:
                raise _broken(node, f"reads %{source.name}, which comes later or is not in the graph")
        if node.op == "call_function":
            state = (node.target, node.args, node.kwargs, *_types(node))
            if not _same_objects(state, before.get(node)):
                _verify_call(node)
            good[node] = state
        elif node.op == "output":
            outputs += 1
        elif node.op not in ("placeholder", "get_attr"):
            raise _broken(node, f"expected placeholder, get_attr, call_function or output, found {node.op}")
        elif "val" not in node.meta:
            raise _broken(node, "has no type")
        seen.add(node)
    if outputs != 1:
        raise VerifyError(f"expected one `return`, found {outputs}")
    return good


def _types(node: Node) -> Iterator[object]:
    yield node.meta.get("val")
    for source in node.all_input_nodes:
        yield source.meta.get("val")


def _same_objects(a: Sequence[object], b: Sequence[object] | None) -> bool:
    return b is not None and len(a) == len(b) and all(map(operator.is_, a, b))


def _verify_call(node: Node) -> None:
    if not is_operator(node.target):
        raise _broken(node, f"expected an operator of torch.ops, operator or math, found {node.target!r}")
    known = dialect.find(node.target)
    for holds, rule in known.rules if known is not None else ():
        try:
            good = holds(node)
        except (IndexError, TypeError, AttributeError):
            good = False
        if not good:
            raise _broken(node, rule)
    expected = format_type(infer(node))
    found = format_type(node.meta.get("val"))
    if expected != found:
        raise _broken(node, f"expected type {expected}, found {found}")


def _broken(node: Node, reason: str) -> VerifyError:
    return VerifyError(f"%{node.name}: {reason}\n  {format_node(node)[:200]}")


def infer(node: Node) -> object:
    """The value's type (meta tensors, numbers) that the node's operator gives for its inputs' types."""
    args: Any = map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        if (known := dialect.find(node.target)) is not None:
            return known.shape(*args, **kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is torch.ops.aten.where.default or _DATA & set(getattr(node.target, "tags", ())):
            return node.meta.get("val")
        return _run(cast(Callable[..., object], node.target), _key((args, kwargs)))
    except _REJECTIONS as error:
        raise _broken(
            node, f"{format_target(node.target)} rejects its arguments: {str(error).splitlines()[0]}"
        ) from error


def _key(value: object) -> object:
    """A hashable stand-in for arguments: repeated layers hit the cache instead of dispatching again."""
    match value:
        case torch.Tensor():
            return (torch.Tensor, tuple(value.shape), value.dtype)
        case list() | tuple():
            return (list if isinstance(value, list) else tuple, *map(_key, value))
        case dict():
            return (dict, *((k, _key(v)) for k, v in value.items()))
        case bool() | int() | float():
            return (type(value).__name__, value)
    return value


def _unkey(key: Any) -> Any:
    match key:
        case (kind, shape, dtype) if kind is torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")
        case (kind, *items) if kind is list or kind is tuple:
            return kind(map(_unkey, items))
        case (kind, *items) if kind is dict:
            return {k: _unkey(v) for k, v in items}
        case (str(), value):
            return value
    return torch.device("meta") if isinstance(key, torch.device) else key


@lru_cache(maxsize=4096)
def _run(target: Callable[..., object], key: object) -> object:
    args, kwargs = _unkey(key)
    with torch.device("meta"):
        return target(*args, **kwargs)
