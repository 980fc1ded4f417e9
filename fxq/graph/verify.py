"""Every rule a graph must keep between passes: order, known operators, and types that the operators
really give."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.text import format_node, format_target, format_type, is_operator

_FXQ_SHAPES: dict[object, Callable[..., object]] = {
    getattr(torch.ops.fxq, name).default: rule for name, rule in dialect.SHAPES.items()
}

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
    for holds, rule in RULES.get(node.target, ()):
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


def _is_amax(node: object) -> bool:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(val, torch.Tensor) and val.dtype == torch.float32 and val.shape == ()


def _rank(position: int, rank: int) -> Callable[[Node], bool]:
    return lambda node: (
        _shape(node.args[position]) is not None and len(_shape(node.args[position]) or ()) == rank
    )


def _shape(node: object) -> tuple[int, ...] | None:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def _is_index(node: Node) -> bool:
    val = node_at(node, 2).meta["val"]
    return len(val.shape) == 1 and val.dtype in (torch.int32, torch.int64)


def _same_shapes(node: Node) -> bool:
    slices = node.args[0]
    return isinstance(slices, (list, tuple)) and len({_shape(s) for s in slices}) == 1


def _option(node: Node, name: str) -> Any:
    return node.kwargs[name]


def _fits_tensor(node: Node) -> bool:
    """Whether rows [start, end) of a packed weight fit range(*rows) of one expert of the stored tensor."""
    *tall, width = _option(node, "shape")
    experts = _option(node, "experts")
    sizes = [math.prod(tall) // experts, width]
    out, columns = reversed(sizes) if _option(node, "transposed") else sizes
    weight = node_at(node, 1).meta["val"][0].shape
    fits = columns == 2 * weight[1] and range(*_option(node, "rows"))[-1] < out
    return fits and _option(node, "end") <= weight[0] and math.prod(tall) % experts == 0


RULES: dict[object, tuple[tuple[Callable[[Node], bool], str], ...]] = {
    dialect.EXPERT_LINEAR: (
        (_rank(0, 2), "expected tokens x [T, in]"),
        (_rank(1, 3), "expected a fused weight w [E, out, in]"),
        (_is_index, "expected expert_ids, integers [T]"),
        (
            lambda n: (_shape(n.args[0]) or (0, -1))[1] == (_shape(n.args[1]) or (0, 0, 0))[2],
            "x and w disagree on `in`",
        ),
    ),
    dialect.SLICE: (
        (_rank(0, 3), "expected a fused weight w [E, out, in]"),
        (lambda n: 0 <= int_at(n, 1) < (_shape(n.args[0]) or (0,))[0], "the expert index is out of range"),
    ),
    dialect.SYNC: (
        (lambda n: bool(n.args[0]) and all(map(_is_amax, nodes_at(n, 0))), "expected amaxes, f32[] each"),
    ),
    dialect.QUANTIZE: (
        (lambda n: _is_amax(n.args[1]), "expected an amax of type f32[]"),
        (
            lambda n: n.kwargs.get("format") in dialect.FORMATS,
            f"format is one of {', '.join(dialect.FORMATS)}",
        ),
        (lambda n: n.kwargs.get("scale") in dialect.SCALES, f"scale is one of {', '.join(dialect.SCALES)}"),
        (
            lambda n: n.kwargs.get("format") != "nvfp4" or (_shape(n.args[0]) or (1,))[-1] % 16 == 0,
            "nvfp4 needs a last dimension that is a multiple of 16",
        ),
    ),
    dialect.STACK: ((_same_shapes, "the slices differ in shape"),),
    dialect.PACK_NVFP4: ((lambda n: _is_amax(n.args[1]), "expected an amax of type f32[]"),),
    dialect.PACK_FP8: ((lambda n: _is_amax(n.args[1]), "expected an amax of type f32[]"),),
    dialect.STORE_ROWS: (
        (lambda n: 0 <= _option(n, "expert") < _option(n, "experts"), "the expert index is out of range"),
        (
            lambda n: len(range(*_option(n, "rows"))) == _option(n, "end") - _option(n, "start"),
            "expected as many rows of the tensor as of the weight",
        ),
        (_fits_tensor, "the rows lie outside of the tensor"),
    ),
}


def infer(node: Node) -> object:
    """The value's type (meta tensors, numbers) that the node's operator gives for its inputs' types."""
    args: Any = map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        if (rule := _FXQ_SHAPES.get(node.target)) is not None:
            return rule(*args, **kwargs)
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
