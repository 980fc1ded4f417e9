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
from fxq.errors import CheckpointError, SpecError
from fxq.evaluate import evaluation
from fxq.evaluate.evaluation import EVAL_SAMPLES, EVAL_SEQ_LEN
from fxq.evaluate.perplexity import perplexities
from fxq.gc_paused import gc_paused
from fxq.graph.program import Program
from fxq.model import AnyModel, Model, device_of, directory_of, open_model, run_of, samples_of
from fxq.numbers import kernels
from fxq.passes import table
from fxq.pipeline.base import Pass, Progress, Session, bystanders, no_progress
from fxq.pipeline.run import NOTHING_TO_WRITE, calibrates_first, needs_data, run_passes
from fxq.pipeline.spec import Spec, load
from fxq.preview import uncalibrated
from fxq.report import files
from fxq.report.measured import WritingReport, measure_memory, timed
from fxq.report.reasons import doubts_of_text
from fxq.report.summary import Report
from fxq.run.batches import batches_of, check_predicted, predicted_batches
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
    eval_samples: int = EVAL_SAMPLES,
    eval_seq_len: int = EVAL_SEQ_LEN,
    samples: int | None = None,
    seq_len: int = 512,
    pack: bool = False,
    device: str | torch.device = "cpu",
    format: str | None = None,
    allow_partial: bool = False,
    passes: Sequence[str | Path | type[Pass]] = (),
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> "Compiled":
    """Trace, transform and calibrate a model; with `out`, also write the checkpoint.

    model: a Hugging Face directory with safetensors, the hub's name of one that is in the local cache, or a
    live model (left as it is). spec: a shipped spec's
    name, a YAML file, or a Spec. calib: text as `fxq.sources.samples.load_samples` takes it: a file (.jsonl,
    .json, .txt, .parquet, or a directory of `datasets`), an iterable of texts, id lists or mappings with
    "text", "messages" or "input_ids", a mapping of such columns, one text, or a `fxq.Blend` of these. A str
    that names a file is the file. The first `samples` (128) are used, cut to `seq_len` tokens each; with
    `pack` they are joined and cut into so many rows of just that length. resume: go on with
    what an interrupted run of the same arguments left beside `out`, if there is anything; the output is the
    same, byte for byte.
    shard_bytes: about how large the files of the output become. evaluate: text, given alike, whose first
    `eval_samples`, cut to `eval_seq_len` tokens, measure the model and, once it is written, the output, as
    `fxq.evaluate` does. device: "cpu" or "cuda", where calibration and packing run. allow_partial: weights
    that the spec asks for and that cannot be quantized are left as they are, with a warning, instead of an
    error. passes: more passes that a spec may name, classes or Python files (see `fxq.passes.table`).
    follow_links: whether files of the directory may be symbolic links out of it.
    Raises SpecError, SourceError, TraceError, VerifyError or CheckpointError; on any of them nothing is
    written.
    """
    known = table(passes)
    chosen = spec if isinstance(spec, Spec) else load(spec, known)
    chosen = chosen.with_flags(format=format, partial=allow_partial or None)
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
            f"{chosen.name}: {needing} needs calibration data; give --calib FILE (calib=... in python)"
        )
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    kernels.prepare(where)
    report = Report(chosen.name)
    with working(to, resume=resume) if to is not None else nullcontext() as work:
        opened = open_model(model, follow_links=follow_links, trust_remote_code=trust_remote_code)
        doubts: list[str] = []
        ids = None
        if calib is not None:
            ids = samples_of(opened, calib, wanted, seq_len, pack=pack, notes=doubts)
        unseen = samples_of(opened, evaluate, eval_samples, eval_seq_len) if evaluate is not None else None
        if unseen is not None:
            check_predicted(unseen)  # before hours of calibration
        run = functools.partial(run_of, opened, chosen, ids, where)
        if work is not None:
            work.begin(run(shard_bytes))
        with timed(report, "trace"):
            program = opened.program
        batches = batches_of([program], ids) if ids is not None else None
        session = Session(opened.source, where, batches, progress)
        if work is not None:
            session.found = work.calibrations()
            session.writes = True
        report.calibration_tokens = sum(batch.numel() for batch in batches or ())
        if needing is not None and ids is not None:
            doubts += doubts_of_text(len(ids), samples, report.calibration_tokens)
            report.add_warnings(f"calibration: {doubt}" for doubt in doubts)
        with timed(report, "passes"), gc_paused():
            if calibrates_first(chosen.passes, writes=session.writes):
                rehearsed = uncalibrated(program, chosen, known)  # what cannot be written fails before it
                if rehearsed.calibrated is not None:
                    checkpoint.plan(rehearsed)
            run_passes(chosen.passes, program, session, beside=bystanders(chosen.passes, known))
        measure_memory(report, where)
        if program.pending is None:
            report.count(program)
        compiled = Compiled(opened, program, session, report, run)
        if work is not None and to is not None:
            compiled._write(work, to, shard_bytes)
    if unseen is not None and to is not None:
        compiled._evaluate(model, to, unseen, follow_links=follow_links)
    elif unseen is not None:
        compiled.perplexity(unseen, samples=eval_samples, seq_len=eval_seq_len)
    return compiled


class Compiled:
    """A calibrated model.

    graph: the torch.fx graph that simulates the deployed model. program: the lowered checkpoint program and
    its values. scales: amax node name -> calibrated float32 []. report: counts and measurements; `save`
    completes it.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        session: Session,
        report: Report,
        run: Callable[[int], Mapping[str, Any]],
    ) -> None:
        self._model, self._session, self._run = model, session, run
        self.program, self.report = program, report

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
        writing = WritingReport(self.report, model.name, program, plan, model.source, out, device)
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

    def _evaluate(
        self, base: AnyModel, out: Path, unseen: Sequence[Sequence[int]], *, follow_links: bool
    ) -> None:
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
                    follow_links=follow_links,
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
