"""calibrate-max: interpret the graph on calibration batches and keep the largest magnitudes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fxq.graph import dialect
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.base import CalibrationPass, Session
from fxq.run.statistics import Max


@dataclass(frozen=True)
class CalibrateMax(CalibrationPass):
    """Amax of activations over all tokens, tokens per expert, and the weight amax of the experts that
    were reached."""

    name: ClassVar[str] = "calibrate-max"

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every amax node."""
        for node in program.graph.nodes:
            if node.target is dialect.AMAX:
                yield Match("amax", node, {"t": node.args[0]})

    def calibrate(self, program: Program, session: Session) -> int:
        with session.progress("calibrate-max", len(program.graph.nodes)) as step:
            interpreter = Max(program, session.source, session.device, step=step)
            interpreter.run_batches(session.batches or ())
        program.values.update(interpreter.values)
        program.tokens.update(interpreter.tokens)
        return len(interpreter.values)
