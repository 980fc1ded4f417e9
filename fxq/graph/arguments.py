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
    """Sets of nodes (or names), those that overlap made one; groups and their members in order of first
    appearance."""
    from networkx.utils import UnionFind  # 0.4 s, which a program that joins nothing need not wait for

    union: UnionFind[T] = UnionFind()
    for nodes in sets:
        union.union(*nodes)
    groups: dict[T, list[T]] = {}
    for node in union:
        groups.setdefault(union[node], []).append(node)
    return list(groups.values())
