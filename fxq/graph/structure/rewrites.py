"""Rewrites: what the checkpoint holds in place of a parameter, whole or expert by expert.

%half : bf16[64] = aten.mul.Tensor(%norm, 0.5)
%new : bf16[64] = fxq.rewrite(%norm, %half)         Rewritten(whole=%new) of %norm
%e3 : bf16[64,32] = fxq.slice(%w, 3)
%e3_new : bf16[64,32] = fxq.rewrite(%e3, %scaled)   Rewritten(experts={3: %e3_new}) of %w
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from fxq.errors import VerifyError
from fxq.graph import dialect
from fxq.graph.arguments import int_at, node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.structure.views import (
    SAME_PLACE,
    VIEWS,
    is_on_weight_path,
    of_the_model,
    shape_of,
    strip,
    swaps_matrix,
    varying,
)


@dataclass
class Rewritten:
    """A parameter as what multiplies by it, or otherwise uses it, reads it. whole: the last rewrite of all of
    it. experts: that of single slices, by expert. readers: the nodes that read it so."""

    whole: Node | None = None
    experts: dict[int, Node] = field(default_factory=dict)
    readers: list[Node] = field(default_factory=list)

    @property
    def state(self) -> tuple[Node | None, tuple[tuple[int, Node], ...]]:
        """Equal for readers that read the same."""
        return self.whole, tuple(sorted(self.experts.items()))


def rewritten(graph: Graph) -> dict[Node, list[Rewritten]]:
    """Parameter -> what its readers see, for those with a rewrite: one entry if all see the same.

    Readers of single experts are one. Raises VerifyError for a rewrite of what is no matrix of a parameter.
    """
    found: dict[Node, list[Rewritten]] = {}
    for reader, operand in _readers(graph):
        seen = dict(_seen(operand))
        for parameter in {parameter for parameter, _ in seen}:
            own = {expert: node for (p, expert), node in seen.items() if p is parameter}
            entry = Rewritten(
                own.get(None), {e: n for e, n in own.items() if e is not None and n is not None}
            )
            entry.readers.append(reader)
            _join(found.setdefault(parameter, []), entry, set(own))
    return {p: entries for p, entries in found.items() if any(e.whole or e.experts for e in entries)}


def _join(entries: list[Rewritten], entry: Rewritten, experts: set[int | None]) -> None:
    """Add what a reader sees: to the entry that says the same, or that says it of other experts."""
    for known in entries:
        by_expert = None not in experts and known.whole is None and not known.experts.keys() & experts
        if known.state == entry.state or by_expert:
            known.experts |= entry.experts
            known.readers += entry.readers
            return
    entries.append(entry)


def _readers(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """(node of the model that computes with it, operand that no batch changes)."""
    varies, computing = varying(graph), of_the_model(graph)
    for node in graph.nodes:
        if node in computing and (node in varies or not is_on_weight_path(node)):
            yield from ((node, source) for source in node.all_input_nodes if source not in varies)


def _seen(operand: Node) -> Iterator[tuple[tuple[Node, int | None], Node | None]]:
    """((parameter, expert or None), last rewrite of it or None) for all that an operand is made of by views,
    picks, stacks, roundings and rewrites."""
    stack: list[tuple[Node, int | None, Node | None]] = [(operand, None, None)]
    while stack:
        node, expert, rewrite = stack.pop()
        if node.op == "get_attr":
            yield (node, expert), rewrite
        elif node.target is dialect.STACK:
            pieces = nodes_at(node, 0)
            if rewrite is not None:  # of all that is stacked
                stack.append((node_at(strip(pieces[0], SAME_PLACE), 0), None, rewrite))
            else:
                stack += [(piece, None, None) for piece in (pieces if expert is None else [pieces[expert]])]
        elif node.target is dialect.SLICE:
            stack.append((node_at(node, 0), int_at(node, 1), rewrite))
        elif node.target is dialect.REWRITE:
            stack.append((node_at(node, 0), expert if rewrite is not None else None, rewrite or node))
        elif node.op == "call_function" and (node.target in VIEWS or is_rounding(node)):
            if rewrite is not None and not _keeps_place(node):
                raise VerifyError(
                    f"%{rewrite.name}: expected to rewrite a parameter, its transpose or one expert of it, "
                    f"found %{node.name} of one"
                )
            stack.append((node_at(node, 0), expert, rewrite))


def _keeps_place(node: Node) -> bool:
    """Whether rows of a node are rows or columns of what it is made of."""
    return is_rounding(node) or swaps_matrix(node) is not None or shape_of(node) == shape_of(node_at(node, 0))


def is_turned(rewrite: Node) -> bool:
    """Whether a rewrite is of a parameter's, or an expert's, matrix with its dimensions swapped."""
    turned, node = False, node_at(rewrite, 0)
    while node.op != "get_attr":
        if node.target in VIEWS:
            turned ^= bool(swaps_matrix(node))
        node = node_at(node, 0)
    return turned
