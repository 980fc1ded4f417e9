"""Measurements of one compilation, put into its report: time, memory, and what writing found."""

import dataclasses
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxq.checkpoint.plan import Plan
from fxq.checkpoint.writer import Written
from fxq.graph import dialect
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.report import choices, files
from fxq.report.files import Details
from fxq.report.reasons import excluded, groups
from fxq.report.summary import Report

_LOG = logging.getLogger(__name__)


@contextmanager
def timed(report: Report, stage: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of a stage."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    report.seconds[stage] = report.seconds.get(stage, 0.0) + seconds
    _LOG.info("%s: %.1f s", stage, seconds)


def measure_memory(report: Report, device: torch.device) -> None:
    """The peaks of this process so far, in bytes."""
    report.peak_host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        report.peak_device_bytes = torch.cuda.max_memory_allocated(device)


@dataclass
class WritingReport:
    """What the writer calls when all weights are written: completes the report and puts its files beside
    them. title: the model's name. source: where the weights come from. out: where the directory will be.
    chosen: the YAML of the spec that says which formats were chosen."""

    report: Report
    title: str
    program: Program
    plan: Plan
    source: WeightSource
    out: Path
    device: torch.device
    chosen: str = ""
    start: float = field(default_factory=time.perf_counter)

    def __call__(self, directory: Path, written: Written) -> None:
        self._complete(written)
        measure_memory(self.report, self.device)
        seconds = {**self.report.seconds, "write": time.perf_counter() - self.start}
        files.write(dataclasses.replace(self.report, seconds=seconds), self._details(written), directory)
        title = f"{self.title}, {self.report.spec}"
        choices.write(self.program, title, self.chosen, directory / files.DIRECTORY)

    def _complete(self, written: Written) -> None:
        """Counts, sizes and errors of what was written."""
        report = self.report
        if not report.quantize_nodes:  # calibrated while it was written
            report.count(self.program)
        report.measure({name: (own.error, own.energy) for name, own in written.qualities.items()})
        report.measure_inputs(written.inputs)
        report.add_warnings(report.massive())
        zeros = [key for own in written.qualities.values() for key in own.zeros]
        decided = any(pack.target is dialect.PACK_ROUNDED for pack in self.program.packs.values())
        report.add_warnings(report.losses(zeros, written.not_finite, decided=decided))
        report.cast_blocks, report.inexact_blocks = written.cast, written.inexact
        report.tensors_quantized, report.tensors_excluded = len(written.linears), len(written.excluded)
        report.bits_per_weight = 8 * written.quantized_bytes / written.weights
        report.source_bytes_read = self.source.bytes_read
        report.source_bytes, report.output_bytes = written.source_bytes, written.bytes
        report.out = str(self.out)

    def _details(self, written: Written) -> Details:
        return Details(
            self.title,
            weights=written.qualities,
            tokens=self.program.tokens,
            groups=tuple(groups(self.program.graph)),
            excluded=tuple(excluded(self.program, self.plan)),
            sizes={
                "weights": written.packed_bytes,
                "scales": written.quantized_bytes - written.packed_bytes,
                "untouched": written.bytes - written.quantized_bytes,
            },
            steps=written.steps,
        )
