"""Compiled: a calibrated model, which `save` writes as a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.fx import Graph

from fxq.checkpoint import writer as checkpoint
from fxq.checkpoint.workdir import Work, check_output, working
from fxq.errors import CheckpointError
from fxq.evaluate import evaluation
from fxq.evaluate.perplexity import perplexities
from fxq.graph.program import Program
from fxq.model import Model, samples_of
from fxq.pipeline.base import Session
from fxq.pipeline.run import NOTHING_TO_WRITE
from fxq.pipeline.spec import Spec, dump
from fxq.report import files
from fxq.report.measured import WritingReport, timed
from fxq.report.summary import Report
from fxq.run.batches import predicted_batches
from fxq.run.weights import amaxes
from fxq.view import folded


class Compiled:
    """A calibrated model.

    graph: the torch.fx graph that simulates the deployed model; `print` shows it folded, layers and experts
    once. program: the lowered checkpoint program and its values. scales: amax node name -> calibrated
    float32 []. report: counts and measurements; `save` completes it. chosen: the spec that says which formats
    a pass chose, if one did.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        session: Session,
        report: Report,
        run: Callable[[int], Mapping[str, Any]],
        chosen: Spec | None = None,
    ) -> None:
        self._model, self._session, self._run = model, session, run
        self.program, self.report, self.chosen = program, report, chosen

    def __repr__(self) -> str:
        state = f"written to {self.report.out}" if self.report.out else "not written: save(DIR) does"
        return f"<Compiled {self._model.name} with {self.report.spec}, {state}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    @property
    def graph(self) -> Graph:
        return folded.Printed(self.program.calibrated or self.program.graph)

    @property
    def scales(self) -> Mapping[str, Tensor]:
        found = amaxes(self.program, self._model.source, self._session.device)
        return MappingProxyType(found)

    def save(
        self, out: str | Path, *, shard_bytes: int = checkpoint.SHARD_BYTES, resume: bool = False
    ) -> Report:
        """Write the checkpoint into `out`, which must not exist or be empty; it appears whole or not at all.

        resume: go on with what an interrupted `save` or `compile` of the same model left beside `out`.
        """
        out = Path(out).expanduser()
        check_output(out, self._model.directory)
        with working(out, resume=resume) as work:
            work.begin(self._run(shard_bytes))
            self.write(work, out, shard_bytes)
        return self.report

    def write(self, work: Work, out: Path, shard_bytes: int) -> None:
        program, model, device = self.program, self._model, self._session.device
        if program.calibrated is None:
            raise CheckpointError(f"{self.report.spec}: {NOTHING_TO_WRITE}")
        plan = checkpoint.plan(program)
        replaced, warnings = model.replaced_files()
        self.report.add_warnings(warnings)
        text = dump(self.chosen) if self.chosen is not None else ""
        writing = WritingReport(self.report, model.name, program, plan, model.source, out, device, text)
        batches = self._session.batches or ()
        label = "calibrate and write" if program.pending is not None else "pack and write"
        work_left = checkpoint.work(program, batches)
        with timed(self.report, "write"), self._session.progress(label, work_left) as step:
            checkpoint.write(
                program,
                plan,
                model.source,
                model.config,
                model.directory,
                work,
                device=device,
                shard_bytes=shard_bytes,
                replaced=replaced,
                batches=batches,
                keep=lambda found: self._session.found.update({self._session.place: found}),
                step=step,
                beside=writing,
            )

    def evaluate(self, base: Model, out: Path, unseen: Sequence[Sequence[int]]) -> None:
        """Measure what was written into `out`; its report says what was found."""
        try:
            with timed(self.report, "evaluate"):
                found = evaluation.evaluate(
                    out,
                    unseen,
                    base=base,
                    samples=len(unseen),
                    seq_len=max(map(len, unseen)),
                    device=self._session.device,
                    trust_remote_code=self._model.trust_remote_code,
                    progress=self._session.progress,
                )
        except BaseException as error:
            error.add_note(f"{out} is complete: measure it with fxq eval {out} --base MODEL --text FILE")
            raise
        self.report.perplexity_after = found.perplexity
        if found.against is not None:
            self.report.perplexity_before = found.against.perplexity
            self.report.kl_divergence = found.against.kl["mean"]
            self.report.top1_agreement = found.against.top1_agreement
        self.report.add_warnings(found.notes)
        files.update(self.report, out)

    def perplexity(self, text: object, *, samples: int = 64, seq_len: int = 512) -> tuple[float, float]:
        """(unquantized, simulated deployed) perplexity per token of a text given like calibration text.

        The second quantizes weights, inputs and KV cache as the checkpoint declares, by running the
        calibrated graph.
        """
        ids = samples_of(self._model, text, samples, seq_len)
        batches = predicted_batches([self.program], ids)
        self.report.add_warnings(self.program.notes)
        with timed(self.report, "evaluate"):
            source, session = self._model.source, self._session
            found = perplexities(self.program, source, session.device, batches, session.progress)
        self.report.perplexity_before, self.report.perplexity_after = found
        return found
