"""resolve-choices: every choice between formats gives way to what was chosen."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxq.graph import edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.choices import chooses, which_of
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.base import Pass
from fxq.pipeline.choosing import notes
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared, groups_whole, tensors_whole


@dataclass(frozen=True)
class ResolveChoices(Pass):
    """Let what reads a choice read the format that `choose-formats` chose.

    Without calibration nothing is chosen: what a spec would do is then shown with the first of the formats.
    """

    name: ClassVar[str] = "resolve-choices"
    ensures: ClassVar[tuple[Fact, ...]] = (groups_whole, amaxes_shared, tensors_whole, amaxes_filled)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every choice."""
        for node in chooses(program.graph):
            yield Match("choice", node, {"which": node_at(node, 1)})

    def run(self, program: Program) -> int:
        program.notes += notes(program)
        known = {choice.which: choice for choice in program.choices}
        found = chooses(program.graph)
        for node in found:
            name = which_of(node)
            place = known[name].place(program.values) if name in known else int(program.values.get(name, 0))
            edit.replace(node, nodes_at(node, 0)[place])
        return len(found)
