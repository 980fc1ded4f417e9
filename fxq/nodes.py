"""Typed access to node arguments: fx types them as almost anything, the dialect knows what stands where."""

from collections.abc import Sequence
from typing import cast

from torch.fx import Node


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
