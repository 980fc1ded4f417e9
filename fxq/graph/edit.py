"""Edits to a graph: new nodes get derived names and their value's type at birth; `tidy` orders and drops
what is unused."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.structure.views import VIEWS, shape_of, swaps_matrix
from fxq.graph.text import meta
from fxq.graph.verify import infer
from fxq.numbers.formats import FORMATS


def parameter(graph: Graph, name: str, shape: Iterable[int], dtype: torch.dtype) -> Node:
    """A node that stands for the model's tensor `name`; its node name is the path with dots replaced."""
    node = graph.create_node("get_attr", name, (), {}, name.replace(".", "_"))
    node.meta["val"] = meta(tuple(shape), dtype)
    return node


def call(graph: Graph, name: str, target: Callable[..., object], *args: object, **kwargs: object) -> Node:
    """A new call, anywhere in the graph (`tidy` moves it before its users), typed by the target's shape
    rule."""
    node = graph.create_node("call_function", target, cast(Any, args), cast(Any, kwargs), name)
    node.meta["val"] = map_aggregate(cast(Any, infer(node)), _shared)
    return node


def _shared(val: Any) -> Any:
    if type(val) is torch.Tensor and val.is_meta and val.is_contiguous():
        return meta(tuple(val.shape), val.dtype)
    return val


def value(graph: Graph, name: str, val: torch.Tensor) -> Node:
    """A new `fxq.value` of that name, of the type of `val`."""
    typed: dict[str, object] = {"shape": list(val.shape)} if val.shape else {}
    typed |= {} if val.dtype == torch.float32 else {"dtype": val.dtype}
    return call(graph, name, dialect.VALUE, name, **typed)


def quantize(t: Node, name: str, *, format: str, scale: str, amax: Node | None = None) -> Node:
    """A new node `name_q` that stands for `t` in a format, scaled by `amax` or by its own, `name_amax`; a
    constant, of which nothing follows, in a format without."""
    if amax is None and FORMATS[format].has_amaxes:
        amax = call(t.graph, f"{name}_amax", dialect.AMAX, t)
    elif amax is None:
        one = torch.ops.aten.scalar_tensor.default
        amax = call(t.graph, f"{name}_amax", one, 1.0, dtype=torch.float32)
    return call(t.graph, f"{name}_q", dialect.QUANTIZE, t, amax, format=format, scale=scale)


def transposed(w: Node) -> Node:
    """A weight with its last two dimensions exchanged, the same node for all who ask; undoes a transpose
    rather than stacking a second one.

    %w_t : bf16[8,32,64] = aten.transpose.int(%w, 1, 2)   of %w this, of %w_t %w
    """
    if w.target in VIEWS and swaps_matrix(w):
        return node_at(w, 0)
    views = (user for user in w.users if user.target in VIEWS and swaps_matrix(user))
    rank = len(shape_of(w))
    return next(views, None) or (
        call(w.graph, f"{w.name}_t", torch.ops.aten.t.default, w)
        if rank == 2
        else call(w.graph, f"{w.name}_t", torch.ops.aten.transpose.int, w, rank - 2, rank - 1)
    )


def replace(old: Node, new: Node, users: Iterable[Node] | None = None) -> None:
    """Let `users` (default: all but `new`) read `new` instead of `old`."""
    for user in list(old.users if users is None else users):
        if user is not new:
            user.replace_input_with(old, new)


def tidy(graph: Graph) -> None:
    """Drop unused nodes and put every node after its inputs, keeping the given order where it is free.

    Parameters go right before their first use, so that a streaming interpreter reads them as late as
    possible.
    """
    unused = [node for node in graph.nodes if _is_unused(node)]
    while unused:
        node = unused.pop()
        inputs = node.all_input_nodes
        graph.erase_node(node)
        unused += [source for source in inputs if _is_unused(source)]
    placed: dict[Node, None] = {}
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for node in [n for n in graph.nodes if n.op != "get_attr" and n is not output] + [output]:
        _place(node, placed)
    for node in placed:
        if node is not output:
            output.prepend(node)


def _is_unused(node: Node) -> bool:
    if node.users or node.op not in ("call_function", "get_attr"):
        return False
    known = dialect.find(node.target)
    return known is None or known.has_result


def _place(node: Node, placed: dict[Node, None]) -> None:
    """Depth first without recursion: graphs are tens of thousands of nodes deep."""
    if node in placed:
        return
    stack, open_ = [(node, _inputs(node))], {node}
    while stack:
        current, inputs = stack[-1]
        for source in inputs:
            if source in open_:
                raise VerifyError(
                    f"%{source.name} and %{current.name} need each other: the graph has a cycle"
                )
            if source not in placed:
                stack.append((source, _inputs(source)))
                open_.add(source)
                break
        else:
            placed[current] = None
            open_.discard(current)
            stack.pop()


def _inputs(node: Node) -> Iterator[Node]:
    """What a node needs, parameters last: what else must be placed does not come between them and it."""
    return iter(sorted(node.all_input_nodes, key=lambda source: source.op == "get_attr"))
