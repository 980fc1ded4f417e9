"""ByInputs: a pass that decides how weights are rounded by statistics of what they multiply."""

from collections.abc import Iterator
from typing import ClassVar

from torch.fx import Node

from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.inputs import InputStatistics, Reader, readers
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared


class ByInputs(Pass):
    """Gives `why_not` and `decide`, for each matmul by quantized weights; a weight that several multiply is
    decided for the first. expected: what a spec that asks for the pass expects to be there."""

    expected: ClassVar[str]
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def is_decided(self, rounding: Node) -> bool:
        """Whether the pass has decided a weight before."""
        raise NotImplementedError(f"{self.name}: a pass by inputs has `is_decided`")

    def why_not(self, rounding: Node) -> str | None:
        """Why a weight is none for the pass; None if it is one."""
        return None

    def decide(self, reader: Reader, statistics: InputStatistics) -> None:
        """Rewrite the roundings of one matmul."""
        raise NotImplementedError(f"{self.name}: a pass by inputs has `decide`")

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by quantized weights."""
        seen: set[Node] = set()
        for reader in readers(program.graph):
            first = reader.roundings[0]
            reason = self.why_not(first)
            if first in seen or self.is_decided(first):
                yield Miss(self.name, reader.node, f"{self.name} decides its weight already", depth=1)
            elif reason is not None:
                yield Miss(self.name, reader.node, reason)
            else:
                seen.add(first)
                yield Match(self.name, reader.node, {"x": reader.x, "w": first})

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        fires = {site.node for site in sites if isinstance(site, Match)}
        if not fires and not any(isinstance(site, Miss) and site.depth for site in sites):
            raise nothing_matched(self, program, self.expected)
        statistics = InputStatistics(program.graph)
        for reader in readers(program.graph):
            if reader.node in fires:
                self.decide(reader, statistics)
        return len(fires)
