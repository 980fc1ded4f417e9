"""Folded text of a graph that fits a screen: a line a landmark, repeated experts and layers once."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.arguments import nodes_at
from fxq.graph.structure.matmuls import MATMULS
from fxq.graph.structure.views import VIEWS, shape_of
from fxq.graph.text import OpOverload, format_argument, format_node, format_target, format_type

NUMBER = re.compile(r"\d+")
NODE = re.compile(r"%\w+")
_LONGEST_INLINE = 72
# Spelt out on a line of their own; everything else that has one user is written into its user's line.
_LANDMARKS = MATMULS | {
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.embedding.default,
    torch.ops.aten.topk.default,
    *(op for name, op in vars(dialect).items() if name.isupper() and isinstance(op, OpOverload)),
}


@dataclass(frozen=True)
class Fold:
    """`count` consecutive runs of alike items, of which the first are kept: nested folds, and lines or
    numbers that stand for lines."""

    items: tuple[Any, ...]
    count: int


class Printed(Graph):
    """A graph, the same nodes, that prints folded."""

    def __init__(self, graph: Graph) -> None:
        vars(self).update(vars(graph))

    def __str__(self) -> str:
        return fold(self)


def fold(graph: Graph) -> str:
    """One line a landmark (matmul, attention, choice, dialect node), what leads to it written into it;
    repeats folded.

    For reading only: `fxq.graph.text.dump` prints what can be parsed back.
    """
    return "\n".join(_render(folded(list(_lines(graph))), "")) + "\n"


def _lines(graph: Graph) -> Iterable[str]:
    inlined: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            inlined[node] = f"@{node.target}"
        elif node.op == "call_function" and node.target not in _LANDMARKS and _hidden(node, inlined):
            inlined[node] = _inline(node, inlined)
        elif node.op == "placeholder":
            yield format_node(node)
        elif node.op == "output":
            yield f"return {_argument(node.args[0], inlined)}"
        else:
            val = format_type(node.meta.get("val"))
            yield f"%{node.name} : {val} = {_call(node, inlined)}"


def _hidden(node: Node, inlined: dict[Node, str]) -> bool:
    """Sizes always; a value with one user, but for the residual stream; and a view, however many read it."""
    tensor = isinstance(node.meta.get("val"), torch.Tensor)
    return not tensor or node.target in VIEWS or (len(node.users) <= 1 and not _is_residual(node, inlined))


def _is_residual(node: Node, inlined: dict[Node, str]) -> bool:
    """A sum of two values of one shape, one of which has a line of its own: every layer ends in one."""
    operands = [a for a in node.args[:2] if isinstance(a, Node)]
    return (
        node.target is torch.ops.aten.add.Tensor
        and len(operands) == 2
        and shape_of(operands[0]) == shape_of(operands[1])
        and any(operand not in inlined for operand in operands)
    )


def _inline(node: Node, inlined: dict[Node, str]) -> str:
    """A chain such as `%x.view.transpose`; long expressions are cut."""
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), (torch.Tensor, tuple, list))]
    name = format_target(node.target).split(".")[1].strip("_")
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return f"%{node.name}"
    if len(tensors) == 1:
        return f"{_name(tensors[0], inlined)}.{name}"
    parts = ", ".join(dict.fromkeys(_name(t, inlined) for t in tensors))
    text = f"{name}({parts})"
    return (
        text
        if len(NUMBER.sub("", NODE.sub("%node", text))) <= _LONGEST_INLINE
        else f"{name}({', '.join(dict.fromkeys(_sources(tensors, inlined)))})"
    )


def _sources(nodes: Sequence[Node], inlined: dict[Node, str]) -> Iterable[str]:
    """What is printed, and the parameters, behind an expression too long to write."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop(0)
        if node.op != "call_function" or node not in inlined:
            yield f"@{node.target}" if node.op == "get_attr" else f"%{node.name}"
            continue
        new = [
            n for n in node.all_input_nodes if n not in seen and isinstance(n.meta.get("val"), torch.Tensor)
        ]
        seen.update(new)
        stack.extend(new)


def _name(node: Node, inlined: dict[Node, str]) -> str:
    return inlined.get(node, f"%{node.name}")


def _call(node: Node, inlined: dict[Node, str]) -> str:
    if node.target is dialect.STACK:
        slices = list(nodes_at(node, 0))
        return f"fxq.stack([{format_argument(slices[0])} .. {format_argument(slices[-1])}])"
    arguments = [_argument(a, inlined) for a in node.args]
    arguments += [f"{k}={_argument(v, inlined)}" for k, v in node.kwargs.items() if k != "device"]
    return f"{format_target(node.target)}({', '.join(arguments)})"


def _argument(value: Any, inlined: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return _name(value, inlined)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v, inlined) for v in value)}]"
    return format_argument(value)


def folded(items: list[Any]) -> list[Any]:
    """Fold short repeats before long ones: experts first, then the layers that hold them. n log n in the
    items, which are lines, or numbers that are equal for alike lines."""
    longest = 1
    while longest < 2 * len(items):
        items = _fold_once(items, longest)
        longest *= 2
    return items


def _fold_once(items: list[Any], longest: int) -> list[Any]:
    """Fold what repeats at once with a period of at most `longest` items."""
    keys = [_key(item) for item in items]
    following: dict[Any, int] = {}
    distance = [0] * len(items)
    for i in reversed(range(len(items))):
        distance[i] = following.get(keys[i], i) - i
        following[keys[i]] = i
    made: list[Any] = []
    i = 0
    while i < len(items):
        period, count = distance[i], 1
        if 0 < period <= longest:
            while keys[i : i + period] == keys[i + count * period : i + (count + 1) * period]:
                count += 1
        if count > 1:
            made.append(Fold(tuple(items[i : i + period]), count))
            i += count * period
        else:
            made.append(items[i])
            i += 1
    return made


def _key(item: Fold | str | int) -> Any:
    """Alike but for node names and for the numbers in parameter names and arguments; types count in full."""
    if isinstance(item, Fold):
        return (item.count, tuple(map(_key, item.items)))
    if isinstance(item, int):
        return item
    head, _, rest = item.partition(" = ")
    return (NODE.sub("%", head), NUMBER.sub("#", NODE.sub("%", rest)))


def _render(items: Iterable[Fold | str], indent: str) -> Iterable[str]:
    for item in items:
        if isinstance(item, str):
            yield indent + item
        else:
            lines = list(_render(item.items, ""))
            yield f"{indent}{item.count} x {{"
            yield from (f"{indent}  {line}" for line in lines)
            yield f"{indent}}}"
