"""Part of a graph: the nodes that a glob or a cone names, as networkx, JSON or dot."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import networkx
from torch.fx import Graph, Node

from fxq.errors import SpecError
from fxq.graph.text import format_target, format_type


def select(graph: Graph, *, only: str | None = None, cone: str | None = None) -> list[Node]:
    """Nodes whose name, operator or parameter fits the glob `only`, and that lie upstream of or at the
    node `cone`."""
    nodes = list(graph.nodes)
    if cone is not None:
        name = cone.removeprefix("%")
        if name not in {n.name for n in nodes}:
            close = difflib.get_close_matches(name, [n.name for n in nodes], 4, 0.3)
            raise SpecError(
                f"--cone: no node is called {name!r}; the nearest are {', '.join(close) or 'none'}"
            )
        network = as_network(graph)
        kept = {name, *networkx.ancestors(network, name)}
        nodes = [n for n in nodes if n.name in kept]
    if only is not None:
        nodes = [
            n for n in nodes if any(fnmatchcase(text, only) for text in (n.name, _operator(n), str(n.target)))
        ]
    return nodes


def _operator(node: Node) -> str:
    return format_target(node.target) if node.op == "call_function" else node.op


def as_network(graph: Graph, nodes: Iterable[Node] | None = None) -> Any:
    """The graph for networkx: nodes by name with op, target and type; an edge from each input to its
    reader."""
    kept = list(graph.nodes if nodes is None else nodes)
    names = {n.name for n in kept}
    network: Any = networkx.DiGraph()
    for node in kept:
        target = node.target if node.op == "get_attr" else _operator(node)
        network.add_node(node.name, op=node.op, target=str(target), type=format_type(node.meta.get("val")))
    for node in kept:
        network.add_edges_from(
            (source.name, node.name) for source in node.all_input_nodes if source.name in names
        )
    return network


def as_json(graph: Graph, nodes: Iterable[Node] | None = None) -> dict[str, Any]:
    """networkx node-link data."""
    return networkx.node_link_data(as_network(graph, nodes), edges="edges")


def as_dot(graph: Graph, nodes: Iterable[Node] | None = None) -> str:
    """Graphviz source: boxes labelled with name, operator and type."""
    network = as_network(graph, nodes)
    lines = ["digraph fxq {", '  node [shape=box, fontname="monospace", fontsize=9];']
    for name, data in network.nodes(data=True):
        label = "\\n".join(_escape(text) for text in (f"%{name}", data["target"], data["type"]))
        lines.append(f'  "{name}" [label="{label}"];')
    lines += [f'  "{source}" -> "{target}";' for source, target in network.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
