"""A graph as text and back: `dump` and `parse` are inverse, so that any dump can be cut into a test.

One node a line, `%name : type = target(arguments)`; `@fqn` is a parameter, buffer or constant of the model:

    %x : bf16[3,17,64] = placeholder()
    %w : bf16[32,64] = @model.layers.0.mlp.up_proj.weight
    %y : bf16[3,17,32] = aten.linear(%x, %w)
    return [%y]

Shapes are those of the example input a graph was traced with; the graph itself computes sizes by nodes and
runs at others.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from fxq.errors import VerifyError
from fxq.graph import dialect as _dialect  # noqa: F401 (its operators can be parsed once it is imported)

OpOverload = type(torch.ops.aten.add.Tensor)
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.complex64: "c64",
}
_LONG = {short: dtype for dtype, short in SHORT.items()}
_MODULES: dict[str, ModuleType] = {"operator": operator, "math": math, "torch": torch}
_LINE = re.compile(r"%(?P<name>\w+)\s*:\s*(?P<type>.+?)\s+=\s+(?P<rest>.+)")
_TOKEN = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|%\w+|#.*")


def dump(graph: Graph, values: Mapping[str, float] | None = None) -> str:
    """The whole graph as text; `values` (node name -> calibrated amax) are shown as trailing comments."""
    lines = []
    for node in graph.nodes:
        line = format_node(node)
        if values and node.name in values:
            line += f"  # = {float(values[node.name]):.6g}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def format_node(node: Node) -> str:
    """One line of `dump`."""
    if node.op == "output":
        return f"return {format_argument(node.args[0])}"
    head = f"%{node.name} : {format_type(node.meta.get('val'))} = "
    if node.op == "placeholder":
        return head + "placeholder()"
    if node.op == "get_attr":
        return head + f"@{node.target}"
    if node.op != "call_function":
        raise VerifyError(
            f"%{node.name}: expected placeholder, get_attr, call_function or output, found {node.op}"
        )
    arguments = [format_argument(a) for a in node.args]
    arguments += [f"{key}={format_argument(value)}" for key, value in node.kwargs.items()]
    return head + f"{format_target(node.target)}({', '.join(arguments)})"


def format_target(target: object) -> str:
    """`aten.linear`, `aten.add.Tensor`, `fxq.quantize`, `operator.getitem`: what `parse` resolves again."""
    if isinstance(target, OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    module = getattr(target, "__module__", "")
    name = getattr(target, "__name__", str(target))
    return f"{module.removeprefix('_')}.{name}"


def format_type(val: object) -> str:
    """`bf16[3,17]`, `int(51)`, `(f32[4], i64[4])`; `none` for a node without a value."""
    match val:
        case torch.Tensor():
            return f"{SHORT.get(val.dtype, str(val.dtype))}[{','.join(str(int(s)) for s in val.shape)}]"
        case None:
            return "none"
        case bool() | int() | float():
            return f"{type(val).__name__}({val!r})"
        case tuple():
            return f"({', '.join(format_type(v) for v in val)})"
        case list():
            return f"[{', '.join(format_type(v) for v in val)}]"
    return f"unknown({type(val).__name__})"


def format_argument(value: object) -> str:
    """A node argument: `%node`, a number, string, dtype, device, or a nesting of them."""
    match value:
        case Node():
            return f"%{value.name}"
        case list() | tuple():
            items = ", ".join(format_argument(v) for v in value)
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        case torch.device():
            return f"device('{value}')"
        case float() if not math.isfinite(value):
            return f"float('{value}')"
        case dict():
            return "{" + ", ".join(f"{k!r}: {format_argument(v)}" for k, v in value.items()) + "}"
    return str(value) if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) else repr(value)


def parse(text: str) -> Graph:
    """The graph a dump describes; raises VerifyError with the line number when it cannot be read."""
    graph, nodes = Graph(), dict[str, Node]()
    for number, raw in enumerate(text.splitlines(), 1):
        line = _TOKEN.sub(lambda m: "" if m[0].startswith("#") else m[0], raw).strip()
        if not line:
            continue
        try:
            _parse_line(graph, nodes, line)
        except (SyntaxError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise VerifyError(f"line {number}: {error}\n  {raw.strip()}") from error
    return graph


def _parse_line(graph: Graph, nodes: dict[str, Node], line: str) -> None:
    if line.startswith("return "):
        graph.output(_argument(_expression(line.removeprefix("return ")), nodes))
        return
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("expected `%name : type = target(arguments)` or `return value`")
    name, rest = match["name"], match["rest"]
    if rest == "placeholder()":
        node = graph.create_node("placeholder", name, (), {}, name)
    elif rest.startswith("@"):
        node = graph.create_node("get_attr", rest[1:], (), {}, name)
    else:
        call = _expression(rest)
        if not isinstance(call, ast.Call):
            raise ValueError(f"expected a call, found {rest}")
        args = tuple(_argument(a, nodes) for a in call.args)
        kwargs = {str(k.arg): _argument(k.value, nodes) for k in call.keywords}
        node = graph.create_node("call_function", resolve_target(ast.unparse(call.func)), args, kwargs, name)
    if node.name != name or name in nodes:
        raise ValueError(f"%{name} is taken, or is a word that torch.fx reserves")
    node.meta["val"] = parse_type(match["type"])
    nodes[name] = node


def is_operator(target: object) -> bool:
    """True for what a node may call: a torch.ops overload, a function of operator or math, or torch.sym_*."""
    if isinstance(target, OpOverload):
        return True
    name = getattr(target, "__name__", "")
    return any(getattr(module, name, None) is target for module in _MODULES.values()) and (
        not name.startswith("_") and (target is not getattr(torch, name, None) or name.startswith("sym_"))
    )


def resolve_target(name: str) -> Callable[..., object]:
    """The operator that `format_target` wrote as `name`; ValueError if there is none."""
    namespace, _, rest = name.partition(".")
    if namespace in _MODULES:
        found = getattr(_MODULES[namespace], rest, None)
        if found is None or not is_operator(found):
            raise ValueError(f"no operator is called {name}")
        return cast(Callable[..., object], found)
    try:
        op, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")
    except AttributeError:
        raise ValueError(f"no operator is called {name}") from None
    if not is_operator(found):
        raise ValueError(f"no operator is called {name}")
    return cast(Callable[..., object], found)


def parse_type(text: str) -> object:
    """The inverse of `format_type`; tensors come back on the meta device."""
    text = text.strip()
    if text == "none":
        return None
    if match := re.fullmatch(r"(\w+)\[([\d,\s]*)\]", text):
        shape = [int(s) for s in match[2].split(",") if s.strip()]
        if match[1] not in _LONG:
            raise ValueError(f"no dtype is called {match[1]}; there are {', '.join(_LONG)}")
        return meta(tuple(shape), _LONG[match[1]])
    if match := re.fullmatch(r"(int|bool|float)\((.+)\)", text):
        return float(match[2]) if match[1] == "float" else ast.literal_eval(match[2])
    if text[:1] + text[-1:] in ("()", "[]"):
        items = [parse_type(part) for part in _top_level(text[1:-1])]
        return tuple(items) if text[0] == "(" else items
    raise ValueError(f"expected a type such as bf16[3,17], found {text}")


@lru_cache(maxsize=4096)
def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The one meta tensor of its shape and dtype: ten thousands of slices need not have one each."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _top_level(text: str) -> Iterator[str]:
    """The parts of a comma-separated list whose items may hold brackets."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    if text[start:].strip():
        yield text[start:]


def _expression(text: str) -> ast.expr:
    """Python's own grammar reads the arguments once `%name` is spelt as an attribute."""
    spelt = _TOKEN.sub(lambda m: f"_node_.{m[0][1:]}" if m[0].startswith("%") else m[0], text)
    return ast.parse(spelt, mode="eval").body


def _argument(tree: ast.expr, nodes: Mapping[str, Node]) -> Any:
    match tree:
        case ast.Attribute(value=ast.Name(id="_node_"), attr=name):
            if name not in nodes:
                raise ValueError(f"%{name} is used before it is defined")
            return nodes[name]
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            value = getattr(torch, name)
            if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
                return value
        case ast.Call(func=ast.Name(id="device"), args=[ast.Constant(value=str(name))]):
            return torch.device(name)
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str(number))]):
            return float(number)
        case ast.List(elts=items):
            return [_argument(item, nodes) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_argument(item, nodes) for item in items)
        case ast.Dict(keys=keys, values=items):
            return {
                ast.literal_eval(k): _argument(v, nodes)
                for k, v in zip(keys, items, strict=True)
                if k is not None
            }
    return ast.literal_eval(tree)
