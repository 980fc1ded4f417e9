"""calibrate-mse: every quantized weight's block scales are those of least squared error under its group's
amax."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxq.graph.dialect import is_rounding
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.text import format_target
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared, is_weight_quantize


@dataclass(frozen=True)
class CalibrateMse(Pass):
    """Mark the quantize nodes of weights `scale='mse'`.

    The scales follow from the weight and the group's amax alone, so they are found where the weight is read
    anyway: by the writer in the launch that packs it, and by the simulator.
    """

    name: ClassVar[str] = "calibrate-mse"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantize node; activations and other formats miss."""
        for node in program.graph.nodes:
            if not is_rounding(node):
                continue
            if not is_weight_quantize(node):
                yield Miss(
                    "weight quantize",
                    node,
                    "its operand is an activation: its scales are found while serving",
                )
            elif "mse" not in FORMATS[str(node.kwargs["format"])].scales:
                reason = f"{node.kwargs['format']} has one scale, that of its maximum: there are no blocks"
                yield Miss("weight quantize", node, reason)
            elif "scale" not in node.kwargs:
                yield Miss("weight quantize", node, f"{format_target(node.target)} decides its own scales")
            elif node.kwargs["scale"] == "mse":
                yield Miss("weight quantize", node, "its scales are searched already", depth=1)
            else:
                yield Match("weight quantize", node, {"w": node.args[0]})

    def run(self, program: Program) -> int:
        if not any(isinstance(site, Match) or site.depth for site in self.sites(program)):
            raise nothing_matched(self, program, "quantized weights in blocks")
        return super().run(program)

    def rewrite(self, site: Match) -> None:
        site.node.kwargs = {**site.node.kwargs, "scale": "mse"}
