"""`fxq.choose`: which format each group of weights should have, measured; nothing is compiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxq.arguments import check_counts
from fxq.chosen import CHOOSING, RESOLVING, chosen_spec
from fxq.cli import tables
from fxq.compile import SAMPLES, check_data
from fxq.errors import SpecError
from fxq.gc_paused import gc_paused
from fxq.model import AnyModel, device_of, open_model, samples_of
from fxq.numbers import kernels
from fxq.passes import table
from fxq.pipeline.base import Pass, Progress, Session
from fxq.pipeline.run import run_passes
from fxq.pipeline.spec import Spec, load
from fxq.report import choices
from fxq.run.batches import batches_of


@dataclass(frozen=True)
class Chosen:
    """spec: does by name what was chosen. content: what was measured, as `fxq.report.choices` describes it.
    notes: what the user should know."""

    spec: Spec
    content: dict[str, Any]
    notes: tuple[str, ...]


def choose(
    model: AnyModel,
    spec: str | Path | Spec = "nvfp4_auto-fp8_cast_kv",
    *,
    calib: object = None,
    samples: int | None = None,
    seq_len: int = 512,
    pack: bool = False,
    device: str | torch.device = "auto",
    settings: Sequence[str] = (),
    passes: Sequence[str | Path | type[Pass]] = (),
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Chosen:
    """Run a spec with `choose-formats` up to where formats are chosen.

    All arguments are as for `fxq.compile`. Raises SpecError for
    a spec without choices and for budgets that nothing fits; SourceError, TraceError and VerifyError as
    `fxq.compile` does.
    """
    given = spec if isinstance(spec, Spec) else load(spec, table(passes))
    given = given.with_settings(settings)
    names = [step.name for step in given.passes]
    if CHOOSING not in names:
        raise SpecError(f"{given.name}: expected a spec with {CHOOSING}; it has {', '.join(names)}")
    steps = given.passes[: 1 + max(i for i, name in enumerate(names) if name in (CHOOSING, RESOLVING))]
    where, wanted = device_of(device), SAMPLES if samples is None else samples
    check_counts(samples=wanted, seq_len=seq_len)
    check_data(replace(given, passes=steps), calib)
    kernels.prepare(where)
    opened = open_model(model, follow_links=follow_links, trust_remote_code=trust_remote_code)
    ids = samples_of(opened, calib, wanted, seq_len, pack=pack) if calib is not None else None
    program = opened.program
    batches = batches_of([program], ids) if ids is not None else None
    with gc_paused():
        run_passes(steps, program, Session(opened.source, where, batches, progress or tables.shown_in_python))
    made, content = chosen_spec(given, program), choices.content(program)
    assert made is not None, "chosen"
    assert content is not None, "chosen"
    return Chosen(made, content, tuple(program.notes))
