"""calibrate-bootstrap: fill every amax that data did not reach."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxq.graph import dialect
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.base import CalibrationPass, Session
from fxq.pipeline.facts import Fact, amaxes_filled
from fxq.run.bootstrap import Bootstrap


@dataclass(frozen=True)
class CalibrateBootstrap(CalibrationPass):
    """A weight's amax comes from the weight; an input's from its layer's inputs, else a constant.

    If the program is written at once, the amax that only its own weight needs is found when that is packed.
    """

    name: ClassVar[str] = "calibrate-bootstrap"
    ensures: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    needs_data: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every amax node: empty ones fire."""
        for node in program.graph.nodes:
            if node.target is dialect.AMAX and node.name not in program.values:
                yield Match("empty amax", node, {"t": node.args[0]})
            elif node.target is dialect.AMAX:
                yield Miss("empty amax", node, "calibration data reached it", depth=1)

    def calibrate(self, program: Program, session: Session) -> int:
        empty = [site.node.name for site in self.sites(program) if isinstance(site, Match)]
        with session.progress("calibrate-bootstrap", len(empty)) as step:
            bootstrap = Bootstrap(program, session.source, session.device)
            later = session.writes and not session.values_are_read
            program.values.update(bootstrap.run(step, shared_only=later))
        program.bootstrapped.update(empty)
        return len(empty)
