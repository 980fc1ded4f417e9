"""calibrate-max: run the graph on calibration batches and keep what its statistics show."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from fxq.graph.arguments import node_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.views import statistics
from fxq.pipeline.base import CalibrationPass, Session
from fxq.run.statistics import Calibration


@dataclass(frozen=True)
class CalibrateMax(CalibrationPass):
    """Take the statistics of activations (the amax of a linear's inputs, and whatever other passes ask for)
    over all tokens, and count the tokens of each expert.

    prefix: whether activations are those of the original model, or each those of the model whose earlier
    weights and activations are quantized already.
    """

    prefix: Literal["original", "quantized"] = "original"

    name: ClassVar[str] = "calibrate-max"
    can_wait: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every statistic of activations."""
        for node in statistics(program.graph):
            yield Match("statistic", node, {"t": node_at(node, 0)})

    def calibrate(self, program: Program, session: Session) -> int:
        if session.is_deferred:
            program.pending = self.prefix
            return 0
        calibration = Calibration(program, session.source, session.device, prefix=self.prefix)
        batches = session.batches or ()
        with session.progress("calibrate-max", calibration.work(batches)) as step:
            return calibration.run(batches, step)
