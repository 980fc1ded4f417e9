"""fix-input-scales: inputs of linears and experts get a scale that the spec states, instead of one found by
calibration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.errors import SpecError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import quantizes_input
from fxq.graph.structure.views import statistics
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled


@dataclass(frozen=True)
class FixInputScales(Pass):
    """Give every quantized input the amax whose `input_scale` is the stated one, so that nothing is
    calibrated.

    In NVFP4 each block of 16 inputs still has a scale of its own, found while serving. Under 1.0 it is exact
    to e4m3 for blocks that reach 0.09 to 2688; what is smaller loses precision, and is zero below 0.006. FP8
    inputs have the stated scale alone.

    scale: the `input_scale` of all of them, more than 0.
    """

    scale: float = 1.0

    name: ClassVar[str] = "fix-input-scales"
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.scale < 1e30:
            raise SpecError(f"{self.name}: scale is a number above 0; found {self.scale}")

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantized input that a statistic scales."""
        found = set(statistics(program.graph))
        for node in program.graph.nodes:
            if node.target is not dialect.QUANTIZE or not quantizes_input(node):
                continue
            amax = node_at(node, 1)
            of = list(amax.all_input_nodes) if amax.target is dialect.SYNC else [amax]
            if found.issuperset(of):
                yield Match("input", node, {"amax": amax})
            else:
                yield Miss("input", node, f"%{amax.name} follows from no calibration", depth=1)

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        if not sites:
            raise nothing_matched(self, program, "quantized inputs")
        fixed: dict[tuple[Node, str], Node] = {}  # siblings keep one amax
        matches = [site for site in sites if isinstance(site, Match)]
        for site in matches:
            amax, format = site["amax"], str(site.node.kwargs["format"])
            if (amax, format) not in fixed:
                scalar, value = torch.ops.aten.scalar_tensor.default, self.scale * FORMATS[format].largest
                name = f"{amax.name}_fixed"
                fixed[amax, format] = edit.call(amax.graph, name, scalar, value, dtype=torch.float32)
            site.node.args = (site.node.args[0], fixed[amax, format], *site.node.args[2:])
        return len(matches)
