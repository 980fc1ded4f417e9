"""`fxq.compile`: a model and a spec in, a calibrated program out; `save` writes it."""

import copy
import dataclasses
import functools
import json
import pickle
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from torch.fx import Graph
from transformers import PreTrainedModel

from fxq import __version__, heap, warmup
from fxq import gc_paused as collector
from fxq.checkpoint import writer as checkpoint
from fxq.checkpoint.plan import Plan
from fxq.checkpoint.workdir import Work, check_empty, working, writing
from fxq.checkpoint.writer import Written
from fxq.errors import CheckpointError, SourceError, SpecError, TraceError, choices
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.passes import PASSES
from fxq.pipeline.base import Progress, Session, bystanders, no_progress, with_flags
from fxq.pipeline.run import needs_data, run_passes
from fxq.pipeline.spec import Spec, load
from fxq.report import files as report_files
from fxq.report.files import Details
from fxq.report.reasons import excluded, groups
from fxq.report.summary import Report, fold
from fxq.run import likelihood
from fxq.run.bootstrap import Bootstrap
from fxq.run.streaming import Simulate, Streaming, Unquantized
from fxq.sources import Directory, Live
from fxq.sources import fingerprint as identity
from fxq.sources import samples as calibration
from fxq.sources.fp8_blocks import without_encoding
from fxq.sources.live import called_otherwise
from fxq.trace.export import trace
from fxq.trace.fake_model import FakeModel as Twin
from fxq.trace.fake_model import fake_model_of_config as twin_of_config
from fxq.trace.fake_model import fake_model_of_live as twin_of_model
from fxq.trace.fake_model import load_config, load_tokenizer

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as fxq sees it: structure on fake tensors, weights behind a source, and its directory."""

    twin: Twin
    source: WeightSource
    config: Mapping[str, Any]
    directory: Path | None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def program(self) -> Program:
        """The graph and where its parameters lie, traced when first asked for; no weight is read."""
        with collector.swept():
            program = trace(self.twin)
        program.hub = self.source.hub
        program.notes += self.notes
        return program


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
        run: Callable[..., Run],
    ) -> None:
        self._model, self._session, self._run = model, session, run
        self.program, self.report = program, report

    @property
    def graph(self) -> Graph:
        return self.program.calibrated or self.program.graph

    @property
    def scales(self) -> Mapping[str, Tensor]:
        self._complete_values()
        return MappingProxyType(self.program.values)

    def _complete_values(self) -> None:
        """Fill in the amaxes that were left to the writer."""
        if self.program.bootstrapped - self.program.values.keys():
            bootstrap = Bootstrap(self.program, self._model.source, self._session.device)
            self.program.values.update(bootstrap.run())

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
            self._write(work, self._plan(), out, shard_bytes)
            return self.report

    def _plan(self) -> "_Planned":
        """What is to be written and said. On a CPU the graphs rest from here on, and wake if they are asked
        for; beside a GPU their time is dearer than their memory."""
        program, model = self.program, self._model
        if program.calibrated is None:
            raise CheckpointError(
                f"{self.report.spec}: the spec has no `lower` pass, so there is nothing to write"
            )
        plan = checkpoint.plan(program)
        name = model.directory.resolve().name if model.directory is not None else None
        details = Details(
            name or str((model.config.get("architectures") or ["model"])[0]),
            tokens=program.tokens,
            groups=tuple(groups(program.graph)),
            excluded=tuple(excluded(program, plan)),
        )
        nodes = len(program.graph.nodes)
        if self._session.device.type == "cpu":
            program.rest()
        return _Planned(plan, details, nodes)

    def _set_aside(self) -> bytes:
        """`_plan` and what calibration found, in one piece while the graphs go: scattered among them it would
        keep Python from giving their memory back."""
        aside = pickle.dumps((self._plan(), self.program.found()))
        self.program.forget()
        self._session.found = {}
        return aside

    def _taken_up(self, aside: bytes) -> "_Planned":
        planned, found = pickle.loads(aside)
        self.program.restore(found)
        return cast(_Planned, planned)

    def _write(self, work: Work, planned: "_Planned", out: Path, shard_bytes: int) -> None:
        start = time.perf_counter()

        def beside(directory: Path, written: Written) -> None:
            self._complete(written, out)
            seconds = {**self.report.seconds, "write": time.perf_counter() - start}
            report = dataclasses.replace(self.report, seconds=seconds)
            report_files.write(report, _with_measured(planned.details, written), directory)

        with _timed(self.report, "write"), self._session.progress("pack and write", planned.nodes) as step:
            checkpoint.write(
                self.program,
                planned.plan,
                self._model.source,
                self._model.config,
                self._model.directory,
                work,
                device=self._session.device,
                shard_bytes=shard_bytes,
                step=step,
                beside=beside,
            )

    def _complete(self, written: Written, out: Path) -> None:
        report = self.report
        report.measure({name: (own.error, own.energy) for name, own in written.traits.items()})
        zeros = [key for own in written.traits.values() for key in own.zeros]
        found = report.losses(zeros, written.not_finite)
        report.warnings += [warning for warning in found if warning not in report.warnings]
        report.tensors_quantized, report.tensors_excluded = len(written.linears), len(written.excluded)
        report.bits_per_weight = 8 * written.quantized_bytes / written.weights
        report.source_bytes, report.output_bytes, report.out = written.source_bytes, written.bytes, str(out)
        _measure_memory(report, self._session.device)

    def perplexity(self, text: object, *, samples: int = 64, seq_len: int = 512) -> tuple[float, float]:
        """(unquantized, simulated deployed) perplexity per token of a text given like calibration text.

        The second quantizes weights, inputs and KV cache as the checkpoint declares, by running the
        calibrated graph.
        """
        ids = samples_of(self._model, text, samples, seq_len)
        batches = predicted_batches([self.program], ids)
        self._complete_values()
        self.report.warnings += [n for n in self.program.notes if n not in self.report.warnings]
        with _timed(self.report, "evaluate"):
            before = self._perplexity(Unquantized, batches, "perplexity before")
            after = self._perplexity(Simulate, batches, "perplexity after")
        self.report.perplexity_before, self.report.perplexity_after = before, after
        return before, after

    def _perplexity(self, kind: type[Streaming], batches: Sequence[Tensor], label: str) -> float:
        with self._session.progress(label, len(self.graph.nodes)) as step:
            run = kind(
                self.program,
                self._model.source,
                self._session.device,
                step=step,
                reduce=lambda logits, i: likelihood.losses(logits, batches[i]),
            )
            return likelihood.perplexity(torch.cat(run.run_batches(batches)))


class _Planned(NamedTuple):
    """plan: what will be written. details: of the report, but for what writing measures. nodes: of the
    lowered program."""

    plan: Plan
    details: Details
    nodes: int


def _with_measured(details: Details, written: Written) -> Details:
    sizes = {
        "weights": written.packed_bytes,
        "scales": written.quantized_bytes - written.packed_bytes,
        "untouched": written.bytes - written.quantized_bytes,
    }
    return dataclasses.replace(details, weights=written.traits, sizes=sizes, steps=written.steps)


@collector.off()
def compile(
    model: str | Path | PreTrainedModel,
    spec: str | Path | Spec,
    *,
    calib: object = None,
    out: str | Path | None = None,
    resume: bool = False,
    shard_bytes: int = checkpoint.SHARD_BYTES,
    evaluate: object = None,
    samples: int = 128,
    seq_len: int = 512,
    device: str | torch.device = "cpu",
    format: str | None = None,
    allow_partial: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> Compiled:
    """Trace, transform and calibrate a model; with `out`, also write the checkpoint.

    model: a Hugging Face directory with safetensors, or a live model (left as it is). spec: a shipped spec's
    name, a YAML file, or a Spec. calib: a .jsonl path or an iterable of texts, id lists or such mappings;
    the first `samples` are used, cut to `seq_len` tokens each. resume: go on with what an interrupted run of
    the same arguments left beside `out`, if there is anything; the output is the same, byte for byte.
    shard_bytes: about how large the files of the output become. evaluate: text, given alike, to measure
    perplexity on. device: "cpu" or "cuda", where calibration and packing run. allow_partial: weights that
    the spec asks for and that cannot be quantized are left as they are, with a warning, instead of an error.
    Raises SpecError, SourceError, TraceError, VerifyError or CheckpointError; on any of them nothing is
    written.
    """
    chosen = with_options(spec if isinstance(spec, Spec) else load(spec, PASSES), format, allow_partial)
    where = device_of(device)
    if samples < 1 or seq_len < 1:
        raise SpecError(f"samples and seq_len are at least 1; found {samples} and {seq_len}")
    directory = _directory_of(model)
    if out is not None:
        check_output(Path(out).expanduser(), directory)
    needing = needs_data(chosen.passes)
    if needing is not None and calib is None:
        raise SpecError(
            f"{chosen.name}: {needing} needs calibration data; give --calib FILE.jsonl (calib=... in python)"
        )
    heap.return_large_buffers()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        warmup.begin(where, "mse" if any(p.name == "calibrate-mse" for p in chosen.passes) else "max")
    report = Report(chosen.name)
    with working(Path(out).expanduser(), resume=resume) if out is not None else nullcontext() as work:
        with collector.swept():  # graphs that are at rest at the end are gone
            opened = open_model(model, trust_remote_code=trust_remote_code)
            ids = samples_of(opened, calib, samples, seq_len) if calib is not None else None
            run = functools.partial(run_of, opened, chosen, ids, where)
            if work is not None:
                work.begin(run(shard_bytes))
            with _timed(report, "trace"):
                program = opened.program
            heap.return_free_memory()
            batches = batches_of([program], ids) if ids is not None else None
            session = Session(opened.source, where, batches, progress)
            if work is not None:
                session.found = work.calibrations()
                session.writes = evaluate is None
            report.calibration_tokens = sum(batch.numel() for batch in batches or ())
            with _timed(report, "passes"):
                run_passes(chosen.passes, program, session, beside=bystanders(chosen.passes, PASSES))
            report.count(program.calibrated or program.graph, program)
            compiled = Compiled(opened, program, session, report, run)
            _measure_memory(report, where)
            if evaluate is not None:
                compiled.perplexity(evaluate)
            aside = compiled._set_aside() if work is not None else b""
        heap.return_free_memory()  # what the graphs took, before weights stream
        if work is not None and out is not None:
            planned = compiled._taken_up(aside)
            del aside
            compiled._write(work, planned, Path(out), shard_bytes)
    return compiled


def open_model(
    model: str | Path | PreTrainedModel, *, trust_remote_code: bool = False, quantized: bool = False
) -> Model:
    """A directory or live model, checked: config, twin, and where each parameter lies; no weight is read.

    quantized: whether an NVFP4 checkpoint is opened, decoded, instead of being refused.
    """
    if isinstance(model, PreTrainedModel):
        return _open_live(model, trust_remote_code)
    path = Path(model).expanduser()
    if not path.is_dir():
        raise SourceError(
            f"{path}: no such directory; expected a Hugging Face model with config.json and safetensors"
        )
    source = Directory(path, quantized=quantized)
    config = load_config(path, trust_remote_code=trust_remote_code)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(source)
    twin = twin_of_config(config, dtype, trust_remote_code=trust_remote_code)
    source.attach(twin.model)
    return Model(twin, source, without_encoding(source.config), path, trust_remote_code)


def _open_live(model: PreTrainedModel, trust_remote_code: bool) -> Model:
    twin = twin_of_model(model)
    directory = _directory_of(model)
    origin = Directory(directory) if directory is not None else None
    source = Live(model, origin, twin.model)
    config = _plain_config(model, type(twin.model).__name__)
    if directory is not None and origin is not None:
        stored = load_config(directory, trust_remote_code=trust_remote_code).to_dict()
        if without_encoding(stored) == without_encoding(_comparable(model)):
            config = origin.config
    notes = tuple(
        f"{name}: has a forward or hooks of its own, which fxq, that compiles the class, does not see"
        for name, _ in fold(called_otherwise(model))
    )
    return Model(twin, source, without_encoding(config), directory, trust_remote_code, notes)


def _plain_config(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(copy.deepcopy(model.config).to_json_string())
    config.setdefault("architectures", [architecture])
    return config


def _comparable(model: PreTrainedModel) -> dict[str, Any]:
    return copy.deepcopy(model.config).to_dict()


def _directory_of(model: str | Path | PreTrainedModel) -> Path | None:
    """The model's directory: the path itself, or where a live model was loaded from, if it is still there."""
    if not isinstance(model, PreTrainedModel):
        return Path(model).expanduser()
    name = model.config._name_or_path
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


def _stored_dtype(source: Directory) -> torch.dtype:
    return next(
        (i.dtype for i in source.infos.values() if i.dtype.is_floating_point and i.dtype.itemsize > 1),
        torch.bfloat16,
    )


def samples_of(model: Model, text: object, samples: int, seq_len: int) -> list[list[int]]:
    """The first samples of a text, as token ids of the model, cut to what it can hold."""
    text_config = model.twin.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or seq_len
    tokenizer: list[Any] = []

    def encode(line: str) -> Sequence[int]:
        if not tokenizer:
            if model.directory is None:
                raise SourceError("text needs a tokenizer; a model without a directory takes input_ids")
            tokenizer.append(load_tokenizer(model.directory, trust_remote_code=model.trust_remote_code))
        return tokenizer[0](line)["input_ids"]

    return calibration.load_samples(
        text, encode, vocabulary=text_config.vocab_size, samples=samples, length=min(seq_len, limit)
    )


def batches_of(programs: Sequence[Program], samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """Batches of sizes that the traces of all programs hold for; what is too long is cut, and notes of the
    first say so."""
    notes = programs[0].notes

    def refused(batch: int, length: int) -> str | None:
        return next((why for p in programs if (why := p.accepts(batch, length)) is not None), None)

    fitting: dict[int, int] = {}
    for length in {len(ids) for ids in samples}:
        reason = refused(1, length)
        fitting[length] = next((n for n in range(length, 0, -1) if refused(1, n) is None), 0)
        note = f"the trace holds up to {fitting[length]} tokens ({reason}); longer samples were cut"
        if fitting[length] == 0:
            note = f"the trace holds for no sample of {length} tokens ({reason}); such samples were left out"
        if reason is not None and note not in notes:
            notes.append(note)
    if not any(fitting.values()):
        raise TraceError(f"the trace holds for no sample of up to {max(fitting)} tokens: {reason}")
    samples = [ids for ids in samples if fitting[len(ids)]]
    made = calibration.batches([ids[: fitting[len(ids)]] for ids in samples])
    if all(refused(*batch.shape) is None for batch in made):
        return made
    return [row[None] for batch in made for row in batch]


def predicted_batches(programs: Sequence[Program], samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """`batches_of` samples that have a token to predict; SourceError if none has."""
    longer = [ids for ids in samples if len(ids) > 1]
    batches = [b for b in batches_of(programs, longer) if b.shape[1] > 1] if longer else []
    if not batches:
        raise SourceError("perplexity needs samples of two tokens or more")
    return batches


def check_output(out: Path, model: Path | None) -> None:
    """CheckpointError if `out` holds something already, can be no directory, or lies inside the model's."""
    if "\0" in str(out):
        raise CheckpointError(f"{str(out)!r}: a path cannot hold a NUL character")
    with writing(out):
        check_empty(out)
    if model is not None and model.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out}: lies inside the model's directory {model}, which fxq does not touch")


def run_of(
    model: Model, spec: Spec, ids: Sequence[Sequence[int]] | None, device: torch.device, shard_bytes: int
) -> Run:
    """Everything that decides what a run writes, in JSON: two runs of equal values write equal bytes."""
    versions = {"fxq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    files = identity.of_directory(model.directory) if model.directory is not None else {}
    return {
        "versions": versions,
        "passes": "; ".join(map(repr, spec.passes)),
        "model": files,
        "parameters": identity.of_live(model.source) if isinstance(model.source, Live) else "of the files",
        "config": identity.of_config(model.config),
        "calibration": identity.of_samples(ids),
        "device": identity.of_device(device),
        "shard_bytes": shard_bytes,
    }


def with_options(spec: Spec, format: str | None, allow_partial: bool) -> Spec:
    """The spec with what the command line says about its passes."""
    if format is not None and format not in checkpoint.FORMATS:
        raise SpecError(f"no output format is called {format!r}; there are {choices(checkpoint.FORMATS)}")
    flags: dict[str, object] = {"format": format} if format is not None else {}
    flags |= {"partial": True} if allow_partial else {}
    return dataclasses.replace(spec, passes=tuple(with_flags(step, flags) for step in spec.passes))


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name; SpecError if it is none of this machine's."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"no device is called {device!r}; there are cpu, cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise SpecError(f"fxq runs on cpu or cuda; found {device!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return found


@contextmanager
def _timed(report: Report, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[name] = report.seconds.get(name, 0.0) + time.perf_counter() - start


def _measure_memory(report: Report, device: torch.device) -> None:
    report.peak_host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        report.peak_device_bytes = torch.cuda.max_memory_allocated(device)
