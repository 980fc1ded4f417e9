"""`fxq.compile`: a model and a spec in, a calibrated program out; `save` writes it."""

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fxq.arguments import check_callable, check_counts, check_flags, check_path
from fxq.checkpoint import writer as checkpoint
from fxq.checkpoint.workdir import check_output, working
from fxq.chosen import chosen_spec
from fxq.cli import tables
from fxq.compiled import Compiled
from fxq.errors import CheckpointError, SpecError
from fxq.evaluate.evaluation import EVAL_SAMPLES, EVAL_SEQ_LEN
from fxq.gc_paused import gc_paused
from fxq.model import AnyModel, device_of, directory_of, open_model, run_of, samples_of
from fxq.numbers import kernels
from fxq.passes import table
from fxq.pipeline.base import Pass, Progress, Session, bystanders
from fxq.pipeline.run import NOTHING_TO_WRITE, calibrates_first, needs_data, run_passes
from fxq.pipeline.spec import Spec, load
from fxq.preview import uncalibrated
from fxq.provenance import of_text, provenance
from fxq.report.measured import measure_memory, timed
from fxq.report.reasons import doubts_of_text
from fxq.report.summary import Report
from fxq.run.batches import batches_of, check_predicted

_LOG = logging.getLogger(__name__)
SAMPLES = 128  # of calibration, if nothing is said


def compile(
    model: AnyModel,
    spec: str | Path | Mapping[str, Any] | Spec,
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
    device: str | torch.device = "auto",
    format: str | None = None,
    allow_partial: bool = False,
    settings: Sequence[str] = (),
    passes: Sequence[str | Path | type[Pass]] = (),
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Compiled:
    """Trace, transform and calibrate a model; with `out`, also write the checkpoint.

    model: a Hugging Face directory with safetensors, the hub's name of one that is in the local cache, or a
        live model (left as it is).
    spec: a shipped spec's name, a YAML file, what such a file holds, or a Spec.
    calib: text as `fxq.sources.samples.load_samples` takes it: a file (.jsonl, .json, .txt, .parquet, or a
        directory of `datasets`), an iterable of texts, id lists or mappings with "text", "messages" or
        "input_ids", a mapping of such columns, one text, or a `fxq.Blend` of these. A str that names a file
        is the file.
    samples, seq_len: the first so many (128) samples are used, cut to so many tokens each.
    pack: samples are joined instead, and cut into `samples` rows of just `seq_len` tokens.
    resume: go on with what an interrupted run of the same arguments left beside `out`, if there is anything;
        the output is the same, byte for byte.
    shard_bytes: about how large the files of the output become.
    evaluate: text, given alike, whose first `eval_samples`, cut to `eval_seq_len` tokens, measure the model
        and, once it is written, the output, as `fxq.evaluate` does.
    device: "auto" (a GPU if there is one), "cpu" or "cuda": where calibration and packing run.
    allow_partial: weights that the spec asks for and that cannot be quantized are left as they are, with a
        warning, instead of an error.
    settings: options of the spec's passes, each `PASS.OPTION=VALUE` as for --set.
    passes: more passes that a spec may name, classes or Python files (see `fxq.passes.table`).
    follow_links: whether files of the directory may be symbolic links out of it.
    progress: shows it; by default bars, in a terminal or notebook.
    Raises SpecError, SourceError, TraceError, VerifyError or CheckpointError; on any of them nothing is
    written, unless it is the evaluation that fails.
    """
    check_counts(samples=SAMPLES if samples is None else samples, seq_len=seq_len, shard_bytes=shard_bytes)
    check_counts(eval_samples=eval_samples)
    check_counts(2, eval_seq_len=eval_seq_len)
    check_flags(resume=resume, pack=pack, allow_partial=allow_partial, follow_links=follow_links)
    check_flags(trust_remote_code=trust_remote_code)
    check_path("out", out)
    check_callable("progress", progress)
    known = table(passes)
    chosen = load(spec, known).with_settings(settings)
    chosen = chosen.with_flags(format=format, partial=allow_partial or None)
    where = device_of(device)
    wanted = SAMPLES if samples is None else samples
    to = Path(out).expanduser() if out is not None else None
    if to is not None:
        check_output(to, directory_of(model))
        if not any(step.makes_checkpoint for step in chosen.passes):
            raise CheckpointError(f"{chosen.name}: {NOTHING_TO_WRITE}")
    needing = check_data(chosen, calib)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    kernels.prepare(where)
    report = Report(chosen.name, device=str(where))
    with working(to, resume=resume) if to is not None else nullcontext() as work:
        opened = open_model(model, follow_links=follow_links, trust_remote_code=trust_remote_code)
        doubts: list[str] = []
        ids = None
        report.made = provenance(opened, chosen, allow_partial=allow_partial, follow_links=follow_links)
        if calib is not None:
            ids = samples_of(opened, calib, wanted, seq_len, pack=pack, notes=doubts)
        unseen = None
        if evaluate is not None:
            unseen = samples_of(opened, evaluate, eval_samples, eval_seq_len, name="evaluate")
            check_predicted(unseen)  # before hours of calibration
        _LOG.info("compile %s with %s on %s, %d samples", opened.name, chosen.name, where, len(ids or ()))
        report.made["calibration"] = of_text(calib, ids, seq_len=seq_len, pack=pack)
        report.made["evaluation"] = of_text(evaluate, unseen, seq_len=eval_seq_len)
        run = functools.partial(run_of, opened, chosen, ids, where)
        if work is not None:
            work.begin(run(shard_bytes))
        with timed(report, "trace"):
            program = opened.program
        base = opened.with_copied_program() if unseen is not None else opened
        batches = batches_of([program], ids) if ids is not None else None
        session = Session(opened.source, where, batches, progress or tables.shown_in_python)
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
        compiled = Compiled(opened, program, session, report, run, chosen_spec(chosen, program))
        if work is not None and to is not None:
            compiled.write(work, to, shard_bytes)
    if unseen is not None and to is not None:
        compiled.evaluate(base, to, unseen)
    elif unseen is not None:
        compiled.perplexity(unseen, samples=eval_samples, seq_len=eval_seq_len)
    return compiled


def check_data(spec: Spec, calib: object) -> str | None:
    """The pass of a spec that needs calibration data, None if none does; SpecError if there is no data."""
    needing = needs_data(spec.passes)
    if needing is not None and calib is None:
        raise SpecError(
            f"{spec.name}: {needing} needs calibration data; give --calib FILE (calib=... in python)"
        )
    return needing
