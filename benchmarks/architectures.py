"""Coverage: tiny random models of every family that transformers can build, compiled and read back.

    python benchmarks/architectures.py [--only GLOB ...] [--timeout SECONDS] [--json FILE] [--markdown]

A family is `ok` when the interpreted graph equals the eager model, the checkpoints of two specs are read back
without a finding by tests/reader.py, every routed expert is quantized and the source is as it was; `refused`
when fxq ends in one of its own errors; `wrong` in any other case, a crash included. Families whose eager
forward needs more than token ids, or fails, are counted apart. Each family runs in a child process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fxq.model
from fxq.errors import FxqError
from fxq.graph import dialect
from fxq.graph.program import Program
from fxq.model import Model, open_model
from fxq.run.simulate import simulation
from tests import reader, tiny

DEFAULT, EXPERTS_ONLY = "nvfp4_default-fp8_cast_kv", "nvfp4_experts_only-fp8_cast_kv"
SIZES = ((1, 24), (2, 24), (3, 17), (1, 7), (2, 40), (1, 100))
CALIBRATION = (4, 24)
STATES = ("ok", "refused", "wrong", "eager")


@dataclass
class Row:
    """What became of one family. `stage` is the step that was last begun; `where` the innermost line of a
    model's own code, or of fxq, in the traceback."""

    family: str
    architecture: str
    state: str = "wrong"
    stage: str = "start"
    reason: str = ""
    where: str = ""
    dtype: str = ""
    trace_seconds: float | None = None
    nodes: int | None = None
    expert_weights: int = 0
    experts: int = 0
    groups: int | None = None
    sizes: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    max_diff: float | None = None
    read_back: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mib: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    quiet()
    console = Console(stderr=options.markdown, width=None if sys.stdout.isatty() else 200)
    rows: list[Row] = []
    warm_up()
    for family in tiny.families():
        if any(fnmatchcase(family.name, glob) for glob in options.only):
            rows.append(run_apart(family, options.timeout, examine))
            console.print(_progress(rows[-1]), highlight=False, markup=False)
            if options.json:
                options.json.write_text(
                    json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
                )
    if options.markdown:
        print("\n".join(markdown(rows)))
    else:
        console.print(table(rows))
    console.print(summary(rows), highlight=False, markup=False)
    return int(any(row.state == "wrong" for row in rows))


def quiet() -> None:
    """One thread, and nothing from libraries."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def warm_up() -> None:
    """Import here, once, what every child would import."""
    with tempfile.TemporaryDirectory() as directory:
        model = tiny.tiny_model(next(f for f in tiny.families() if f.name == "llama"))
        model.save_pretrained(directory)
        _ = open_model(directory).program


class Subject(Protocol):
    """What is examined: a family, say."""

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> str: ...


S = TypeVar("S", bound=Subject)
Begin = Callable[[str], None]
Examine = Callable[[S, Row, Path, Begin], None]


def run_apart(subject: S, timeout: float, examine: Examine[S]) -> Row:
    """`examine` in a forked child, which a crash or a hang ends alone."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(subject, theirs, examine))
    start = time.perf_counter()
    child.start()
    theirs.close()
    row = Row(subject.name, subject.architecture)
    while True:
        left = timeout - (time.perf_counter() - start)
        if left <= 0 or not ours.poll(left):
            row.state, row.reason = "wrong", f"{row.stage}: not done after {timeout:.0f} s"
            break
        try:
            row, done = ours.recv()
        except EOFError:
            child.join()
            row.state, row.reason = "wrong", f"{row.stage}: the process died ({_exit(child.exitcode)})"
            break
        if done:
            break
    if child.is_alive():
        child.join(0.5)
        child.kill()
    child.join()
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _exit(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def _child(subject: S, pipe: Connection, examine: Examine[S]) -> None:
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    row = Row(subject.name, subject.architecture)

    def begin(stage: str) -> None:
        row.stage = stage
        pipe.send((row, False))

    directory = ""
    try:
        with tempfile.TemporaryDirectory() as directory:
            examine(subject, row, Path(directory), begin)
    except FxqError as error:
        row.state, row.reason, row.where = "refused", str(error).replace(directory, "MODEL"), _where(error)
    except Exception as error:
        row.state = "eager" if row.stage == "eager" else "wrong"
        row.reason, row.where = f"{type(error).__name__}: {error}", _where(error)
    row.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send((row, True))


def _where(error: BaseException) -> str:
    """The innermost lines of a model's own code and of fxq that led to an error or its causes."""
    places: dict[str, str] = {}
    cause: BaseException | None = error
    while cause is not None:
        for frame in traceback.extract_tb(cause.__traceback__):
            for kind in ("transformers/models", "transformers", "fxq"):
                if f"/{kind}/" in frame.filename:
                    tail = frame.filename.rpartition(f"/{kind.split('/')[0]}/")[2]
                    places[kind] = f"{tail}:{frame.lineno} {frame.name}"
                    break
        cause = cause.__cause__
    return "; ".join(places.values())


def examine(family: tiny.Family, row: Row, work: Path, begin: Begin) -> None:
    """Every check of one family, in order; fills `row`."""
    begin("eager")
    model, eager, source = eager_model(family, row, work)
    weights = expert_weights(model)
    row.expert_weights, row.experts = len(weights), sum(len(w) for w in weights.values())
    rows_of_experts, head = fingerprints(weights), tied_head(model)
    del model
    before = _digests(source)
    begin("trace")
    start = time.perf_counter()
    opened = open_model(source)
    row.nodes = len(opened.program.graph.nodes)
    row.trace_seconds = round(time.perf_counter() - start, 2)
    begin("interpret")
    interpret(row, opened, eager)
    if row.max_diff:
        exact = in_float32(family, work / "again")
        if exact < ROUNDING:
            row.notes.append(f"eager calls another kernel: {row.max_diff:.2g} apart, {exact:.1g} in float32")
        else:
            row.findings.append(f"interpretation differs from eager by {row.max_diff:.3g}")
    keep_trace(opened.program)
    calib = tiny.text_ids(*CALIBRATION, seed=1).tolist()
    specs = [DEFAULT, EXPERTS_ONLY] if weights else [DEFAULT]
    refusals: list[FxqError] = []
    for spec in specs:
        begin(spec)
        out = work / spec
        try:
            out = compile_to(row, source, spec, calib, out)
        except FxqError as error:
            refusals.append(error)
            continue
        begin(f"read {spec}")
        row.findings += [f"{spec}: {finding}" for finding in read_back(source, out, rows_of_experts, head)]
        row.read_back.append(out.name)
    if _digests(source) != before:
        row.findings.append("the source directory changed")
    if row.findings:
        row.state, row.reason = "wrong", row.findings[0]
    elif refusals:
        raise refusals[0]
    else:
        row.state = "ok"


def keep_trace(program: Program) -> None:
    """Let compilations in this process take a copy of this trace, which would take most of their time."""
    fresh: dict[str, Any] = {"values": {}, "tokens": {}, "packs": {}, "left": {}, "misses": []}

    def copied(fake: Any) -> Program:
        return dataclasses.replace(program, graph=copy.deepcopy(program.graph), notes=[], **fresh)

    setattr(fxq.model, "trace", copied)  # noqa: B010


def eager_model(family: tiny.Family, row: Row, work: Path) -> tuple[PreTrainedModel, PreTrainedModel, Path]:
    """The tiny model, the same as users load it, and its directory; in the first of bf16 and float32 in which
    it runs on token ids alone."""
    ids = tiny.text_ids(2, 24)
    first: Exception | None = None
    for dtype in (torch.bfloat16, torch.float32):
        row.dtype = str(dtype).removeprefix("torch.")
        source = work / row.dtype
        try:
            model = tiny.tiny_model(family, dtype)
            model.save_pretrained(source)
            eager = load(type(model), source)
            logits = _logits(eager, ids)
        except Exception as error:
            first = first or error
            continue
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"logits of shape {list(logits.shape)} for ids {list(ids.shape)}")
        if not bool(logits.isfinite().all()):
            raise ValueError("logits are not finite")
        if dtype is torch.float32:
            row.notes.append(f"in float32: {_line(str(first), 80)}")
        return model, eager, source
    assert first is not None
    raise first


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, *, masked: bool = False) -> Tensor:
    options = {}
    if masked:
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        options["attention_mask"] = seen.expand(len(ids), 1, -1, -1)
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits


def interpret(row: Row, opened: Model, eager: PreTrainedModel) -> None:
    """Compare the traced graph with the eager model at all sizes that it accepts."""
    program = opened.program
    for batch, length in SIZES:
        refusal = program.accepts(batch, length)
        if refusal is not None:
            row.declined.append(f"{batch}x{length}: {refusal}")
            continue
        ids = tiny.text_ids(batch, length, seed=length)
        (found,) = simulation(program, opened.source, torch.device("cpu")).run_batches([ids])
        diff = _difference(found, _logits(eager, ids))
        if diff and not _is_causal(eager) and _is_causal(eager, masked=True):
            diff = _difference(found, _logits(eager, ids, masked=True))
            row.notes += [UNMASKED] if UNMASKED not in row.notes else []
        row.max_diff = max(row.max_diff or 0.0, diff)
        row.sizes.append(f"{batch}x{length}: {diff:.3g}")
    if row.max_diff is None:
        row.findings.append(f"the trace holds for none of {SIZES}: {row.declined[0]}")


UNMASKED = "the eager model sees the future unless it is given a mask, as here; the trace does not"
# Sums of float32 in another order stay below this; another mask, window or weight does not.
ROUNDING = 1e-5


def in_float32(family: tiny.Family, source: Path) -> float:
    """How far graph and eager model are apart in float32, where rounding hides nothing."""
    model = tiny.tiny_model(family, torch.float32)
    model.save_pretrained(source)
    row = Row(family.name, family.architecture)
    interpret(row, open_model(source), load(type(model), source))
    return float("inf") if row.max_diff is None else row.max_diff


def _difference(found: Tensor, expected: Tensor) -> float:
    diff = float((found.float() - expected.float()).abs().max())
    return diff if diff == diff else float("inf")


def load(kind: type[PreTrainedModel], source: Path) -> PreTrainedModel:
    """The model as users load it, with the experts that the trace shows."""
    model: PreTrainedModel = kind.from_pretrained(source).eval()
    model.set_experts_implementation("batched_mm")
    return model


def _is_causal(model: PreTrainedModel, *, masked: bool = False) -> bool:
    """Whether the last token leaves the first token's logits as they are."""
    ids = tiny.text_ids(1, 24)
    other = ids.clone()
    other[0, -1] += 1
    try:
        first, second = (_logits(model, i, masked=masked)[0, 0] for i in (ids, other))
    except Exception:  # a model's own, about a mask that it does not take
        return False
    return torch.equal(first, second)


def compile_to(row: Row, source: Path, spec: str, calib: list[list[int]], out: Path) -> Path:
    """Compile as users do."""
    compiled = fxq.compile(source, spec, calib=calib, out=out)
    if row.groups is None:
        row.groups = sum(node.target is dialect.SYNC for node in compiled.graph.nodes)
    said = [note for note in compiled.report.warnings if not note.startswith("calibration: ")]
    row.notes += [note for note in said if note not in row.notes]
    return out


TIED_HEAD = "exclude list: lm_head (tied, no tensor) is not listed"

# What is looked for in a model, by the meaning of its config: independent of fxq.
EXPERT_COUNT = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")


def expert_weights(model: PreTrainedModel) -> dict[str, list[Tensor]]:
    """Name -> one matrix per routed expert: 3-D parameters over experts, 2-D ones that stack them, and lists
    of modules."""
    counts = set(_expert_counts(model.config.to_dict()))
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        matrices = parameter.detach()
        if matrices.dim() == 3 and len(matrices) in counts and min(matrices.shape[1:]) >= 16:
            found[name] = list(matrices)
        elif matrices.dim() == 2 and "experts.mlp." in name:
            found[name] = list(matrices.view(min(counts), -1, matrices.shape[1]))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts and "expert" in name:
            for leaf, parameter in module[0].named_parameters():
                if parameter.dim() == 2:
                    found[f"{name}.*.{leaf}"] = [m.get_parameter(leaf).detach() for m in module]
    return found


def _expert_counts(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif EXPERT_COUNT.fullmatch(str(name)) and isinstance(value, int) and value > 1:
            yield value


def fingerprints(weights: dict[str, list[Tensor]]) -> set[bytes]:
    """The bytes of every row and column of every expert: what names cannot hide."""
    return {_bytes(row) for experts in weights.values() for w in experts for m in (w, w.T) for row in m}


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()


def tied_head(model: PreTrainedModel) -> str | None:
    """The name of the output projection if it has the embedding's weight and no tensor of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not getattr(embedding, "weight", None):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def read_back(source: Path, out: Path, experts: set[bytes], head: str | None) -> list[str]:
    """Findings of the independent reader, and every routed expert of the source that is not quantized."""
    findings = reader.check(out, source)
    theirs, ours = reader.read_checkpoint(source), reader.read_checkpoint(out)
    if TIED_HEAD in findings and (head is None or head.rpartition(".")[2] != "lm_head"):
        # The reader knows a head only by the name that most families give it.
        nothing = f"exclude list: {head} names nothing in the checkpoint"
        findings = [f for f in findings if f not in (TIED_HEAD, nothing)]
        listed = (ours.quant or {}).get("quantization", {}).get("exclude_modules", ())
        if head is not None and head not in listed:
            findings.append(f"exclude list: {head} (tied, no tensor) is not listed")
    quantized = set(ours.quantized_linears())
    missed = [name for name in theirs.tensors if _is_expert(theirs, name, experts)]
    missed = [name for name in missed if name.removesuffix(".weight") not in quantized]
    if missed:
        findings.append(f"{missed[0]} and {len(missed) - 1} more tensors of routed experts are not quantized")
    return findings


def _is_expert(checkpoint: reader.Checkpoint, name: str, experts: set[bytes]) -> bool:
    raw = checkpoint.raw(name)
    if raw.ndim < 2 or raw.size == 0:
        return False
    return raw.reshape(-1, raw.shape[-1])[0].tobytes() in experts


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _progress(row: Row) -> str:
    return f"{row.state:8} {row.family:45} {row.seconds:5.1f} s  {_line(row.reason, 120)}"


def _line(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


HEADER = (
    "family",
    "traced s",
    "nodes",
    "experts",
    "groups",
    "max diff",
    "emitted, read back",
    "state",
    "note",
)


def _cells(row: Row) -> tuple[str, ...]:
    note = row.reason or "; ".join(row.notes)
    if row.declined and not row.reason:
        note = f"holds for {len(row.sizes)} of {len(SIZES)} sizes; {note}"
    return (
        row.family,
        "-" if row.trace_seconds is None else f"{row.trace_seconds:.1f}",
        "-" if row.nodes is None else str(row.nodes),
        f"{row.experts}" if row.experts else "-",
        "-" if row.groups is None else str(row.groups),
        "-" if row.max_diff is None else f"{row.max_diff:.3g}",
        str(len(row.read_back)) if row.read_back else "-",
        row.state,
        _line(note, 100),
    )


def table(rows: list[Row]) -> Table:
    """For a terminal."""
    made = Table(*HEADER)
    for row in rows:
        made.add_row(*_cells(row))
    return made


PAGE = """# Coverage of architectures

Tiny random models of every causal language model of transformers {version}, then of every multimodal class
around one (`type/Class`). Made by `python benchmarks/architectures.py --markdown > docs/coverage.md`, torch
{torch}, CPU.

{summary}.

- experts: routed expert matrices of the model; groups: sets of linears that share their global scales.
- max diff: largest absolute difference between the logits of the interpreted graph and of the eager model,
  over six batch sizes and lengths.
- emitted, read back: checkpoints (all linears; experts only) in which an independent reader found no fault.
- eager: the model's own forward does not run on token ids alone, or its configuration could not be built.
"""


def markdown(rows: list[Row]) -> Iterator[str]:
    """A page: what was done, the counts, a row for each family."""
    yield PAGE.format(version=transformers.__version__, torch=torch.__version__, summary=summary(rows))
    yield "| " + " | ".join(HEADER) + " |"
    yield "|---" * len(HEADER) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |"
    yield ""


def summary(rows: list[Row]) -> str:
    """Counts of states, and the share of ok among the families whose eager forward works."""
    counts = Counter(row.state for row in rows)
    works = len(rows) - counts["eager"]
    share = f" ({counts['ok'] / works:.1%} of {works})" if works else ""
    return (
        f"ok {counts['ok']}{share}, refused {counts['refused']}, wrong {counts['wrong']}, "
        f"eager forward broken or not of token ids alone {counts['eager']}; "
        f"{sum(row.seconds for row in rows):.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
