"""calibrate-bootstrap: every amax of activations has an answer, whether data reaches it or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.experts import expert_lists
from fxq.graph.structure.matmuls import input_quantize
from fxq.graph.structure.views import statistics
from fxq.numbers.formats import UNSEEN_INPUT_AMAX
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import Fact, amaxes_filled


@dataclass(frozen=True)
class CalibrateBootstrap(Pass):
    """Give every amax of activations what takes its place if no token reaches it: the largest of the other
    experts' in its layer, and if none was reached a constant. An expert's weight has its own amax."""

    name: ClassVar[str] = "calibrate-bootstrap"
    ensures: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every rounding of activations that a statistic scales; those that have an answer already miss."""
        taken = set(statistics(program.graph))
        for node in program.graph.nodes:
            if not is_rounding(node):
                continue
            amax = node_at(node, 1)
            if amax.target is dialect.FIRST:
                yield Miss("amax of activations", node, f"%{amax.name} has an answer already", depth=1)
            elif not taken.isdisjoint(nodes_at(amax, 0) if amax.target is dialect.SYNC else [amax]):
                yield Match("amax of activations", node, {"amax": amax})

    def run(self, program: Program) -> int:
        others = _others(program.graph)
        answers: dict[Node, Node] = {}
        sites = [site for site in self.sites(program) if isinstance(site, Match)]
        for site in sites:
            amax = site["amax"]
            if amax not in answers:
                unseen = edit.call(
                    amax.graph,
                    f"{amax.name}_unseen",
                    torch.ops.aten.scalar_tensor.default,
                    UNSEEN_INPUT_AMAX,
                    dtype=torch.float32,
                )
                choices = [amax, *others.get(amax, ()), unseen]
                answers[amax] = edit.call(amax.graph, f"{amax.name}_or", dialect.FIRST, choices)
            site.node.args = (site.node.args[0], answers[amax], *site.node.args[2:])
        return len(answers)


def _others(graph: Graph) -> dict[Node, list[Node]]:
    """Amax of what one expert of several reads -> [the largest amax of what they all read]."""
    found: dict[Node, list[Node]] = {}
    for experts in expert_lists(graph):
        quantizes = [quantize for m in experts if (quantize := input_quantize(m.x)) is not None]
        amaxes = list(dict.fromkeys(node_at(quantize, 1) for quantize in quantizes))
        if len(amaxes) > 1:
            shared = edit.call(graph, f"{amaxes[0].name}_others", dialect.SYNC, amaxes)
            found.update((amax, [shared]) for amax in amaxes)
    return found
