"""`fxq.compile`: a model and a spec in, a calibrated program out; `save` writes it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fxq.checkpoint import writer as checkpoint
from fxq.checkpoint.workdir import Work, check_output, working
from fxq.chosen import chosen_spec
from fxq.errors import CheckpointError, SpecError
from fxq.evaluate.perplexity import perplexities
from fxq.gc_paused import gc_paused
from fxq.graph.program import Program
from fxq.model import AnyModel, Model, device_of, directory_of, open_model, run_of, samples_of
from fxq.numbers import kernels
from fxq.passes import table
from fxq.pipeline.base import Pass, Progress, Session, bystanders, no_progress
from fxq.pipeline.run import NOTHING_TO_WRITE, needs_data, run_passes
from fxq.pipeline.spec import Spec, dump, load
from fxq.report.measured import WritingReport, measure_memory, timed
from fxq.report.reasons import doubts_of_text
from fxq.report.summary import Report
from fxq.run.batches import batches_of, predicted_batches
from fxq.run.weights import amaxes

SAMPLES = 128  # of calibration, if nothing is said


def compile(
    model: AnyModel,
    spec: str | Path | Spec,
    *,
    calib: object = None,
    out: str | Path | None = None,
    resume: bool = False,
    shard_bytes: int = checkpoint.SHARD_BYTES,
    evaluate: object = None,
    samples: int | None = None,
    seq_len: int = 512,
    device: str | torch.device = "cpu",
    format: str | None = None,
    allow_partial: bool = False,
    settings: Sequence[str] = (),
    passes: Sequence[str | Path | type[Pass]] = (),
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> "Compiled":
    """Trace, transform and calibrate a model; with `out`, also write the checkpoint.

    model: a Hugging Face directory with safetensors, or a live model (left as it is). spec: a shipped spec's
    name, a YAML file, or a Spec. calib: a .jsonl path, an iterable of texts, id lists or such mappings, or a
    mapping of columns; the first `samples` (128) are used, cut to `seq_len` tokens each. resume: go on with
    what an interrupted run of the same arguments left beside `out`, if there is anything; the output is the
    same, byte for byte.
    shard_bytes: about how large the files of the output become. evaluate: text, given alike, to measure
    perplexity on. device: "cpu" or "cuda", where calibration and packing run. allow_partial: weights that
    the spec asks for and that cannot be quantized are left as they are, with a warning, instead of an error.
    settings: options of the spec's passes, each `PASS.OPTION=VALUE` as for --set.
    passes: more passes that a spec may name, classes or Python files (see `fxq.passes.table`). follow_links:
    whether files of the directory may be symbolic links out of it.
    Raises SpecError, SourceError, TraceError, VerifyError or CheckpointError; on any of them nothing is
    written.
    """
    known = table(passes)
    chosen = spec if isinstance(spec, Spec) else load(spec, known)
    chosen = chosen.with_settings(settings).with_flags(format=format, partial=allow_partial or None)
    where = device_of(device)
    wanted = SAMPLES if samples is None else samples
    if wanted < 1 or seq_len < 1:
        raise SpecError(f"samples and seq_len are at least 1; found {wanted} and {seq_len}")
    to = Path(out).expanduser() if out is not None else None
    if to is not None:
        check_output(to, directory_of(model))
        if not any(step.makes_checkpoint for step in chosen.passes):
            raise CheckpointError(f"{chosen.name}: {NOTHING_TO_WRITE}")
    needing = needs_data(chosen.passes)
    if needing is not None and calib is None:
        raise SpecError(
            f"{chosen.name}: {needing} needs calibration data; give --calib FILE.jsonl (calib=... in python)"
        )
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    kernels.prepare(where)
    report = Report(chosen.name)
    with working(to, resume=resume) if to is not None else nullcontext() as work:
        opened = open_model(model, follow_links=follow_links, trust_remote_code=trust_remote_code)
        ids = samples_of(opened, calib, wanted, seq_len) if calib is not None else None
        run = functools.partial(run_of, opened, chosen, ids, where)
        if work is not None:
            work.begin(run(shard_bytes))
        with timed(report, "trace"):
            program = opened.program
        batches = batches_of([program], ids) if ids is not None else None
        session = Session(opened.source, where, batches, progress)
        if work is not None:
            session.found = work.calibrations()
            session.writes = evaluate is None
        report.calibration_tokens = sum(batch.numel() for batch in batches or ())
        if needing is not None and ids is not None:
            report.add_warnings(doubts_of_text(len(ids), samples, report.calibration_tokens))
        with timed(report, "passes"), gc_paused():
            run_passes(chosen.passes, program, session, beside=bystanders(chosen.passes, known))
        measure_memory(report, where)
        if program.pending is None:
            report.count(program)
        compiled = Compiled(opened, program, session, report, run, chosen_spec(chosen, program))
        if evaluate is not None:
            compiled.perplexity(evaluate)
        if work is not None and to is not None:
            compiled._write(work, to, shard_bytes)
    return compiled


class Compiled:
    """A calibrated model.

    graph: the torch.fx graph that simulates the deployed model. program: the lowered checkpoint program and
    its values. scales: amax node name -> calibrated float32 []. report: counts and measurements; `save`
    completes it. chosen: the spec that says which formats a pass chose, if one did.
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

    @property
    def graph(self) -> Graph:
        return self.program.calibrated or self.program.graph

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
            self._write(work, out, shard_bytes)
        return self.report

    def _write(self, work: Work, out: Path, shard_bytes: int) -> None:
        program, model, device = self.program, self._model, self._session.device
        if program.calibrated is None:
            raise CheckpointError(f"{self.report.spec}: {NOTHING_TO_WRITE}")
        plan = checkpoint.plan(program)
        replaced, warnings = model.replaced_files()
        self.report.add_warnings(warnings)
        text = dump(self.chosen) if self.chosen is not None else ""
        writing = WritingReport(self.report, model.name, program, plan, model.source, out, device, text)
        nodes = len(program.graph.nodes)
        with timed(self.report, "write"), self._session.progress("pack and write", nodes) as step:
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
                batches=self._session.batches or (),
                keep=lambda found: self._session.found.update({self._session.place: found}),
                step=step,
                beside=writing,
            )

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
