"""Typed access to node arguments (fx types them as almost anything, the dialect knows what stands where), and
sets of nodes."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar, cast

from torch.fx import Node

T = TypeVar("T", bound=Hashable)


def node_at(node: Node, position: int) -> Node:
    """The argument at `position`, which is a node."""
    found = node.args[position]
    assert isinstance(found, Node), f"%{node.name}: argument {position} is {found!r}, not a node"
    return found


def nodes_at(node: Node, position: int) -> Sequence[Node]:
    """The argument at `position`, which is a list of nodes."""
    return cast(Sequence[Node], node.args[position])


def int_at(node: Node, position: int) -> int:
    """The argument at `position`, which is a literal integer."""
    return cast(int, node.args[position])


def joined(sets: Iterable[Sequence[T]]) -> list[list[T]]:
    """Sets of nodes (or names), those that overlap made one, in order of their first node."""
    parent: dict[T, T] = {}

    def head(node: T) -> T:
        while (above := parent.setdefault(node, node)) is not node:
            parent[node] = parent[above]
            node = above
        return node

    for nodes in sets:
        for node in nodes:
            parent[head(node)] = head(nodes[0])
    groups: dict[T, list[T]] = {}
    for node in parent:
        groups.setdefault(head(node), []).append(node)
    return list(groups.values())
