"""Model: a directory or a live model, opened, and what tells its runs apart."""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from fxq import __version__
from fxq.errors import SourceError, SpecError
from fxq.gc_paused import gc_paused
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.pipeline.spec import Spec
from fxq.report.summary import fold
from fxq.sources import Directory, Live, fingerprint
from fxq.sources import samples as calibration
from fxq.sources.encodings import without_encoding
from fxq.sources.live import called_otherwise
from fxq.sources.locate import model_directory
from fxq.trace.export import trace
from fxq.trace.fake_model import (
    FakeModel,
    fake_model_of_config,
    fake_model_of_live,
    load_config,
    load_tokenizer,
    quiet,
)

# A model as users give it: a Hugging Face directory, its name on the hub, or a live model.
AnyModel = str | Path | PreTrainedModel


@dataclass(frozen=True)
class Model:
    """A model as fxq sees it: structure on fake tensors, weights behind a source, and its directory."""

    fake: FakeModel
    source: WeightSource
    config: Mapping[str, Any]
    directory: Path | None
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def program(self) -> Program:
        """The graph and where its parameters lie, traced when first asked for; no weight is read."""
        with gc_paused():
            program = trace(self.fake)
        program.hub = self.source.hub
        program.notes += self.notes
        return program

    def with_copied_program(self) -> "Model":
        """The same, with a copy of its program: passes change a program in place, and a second trace takes
        seconds."""
        made, traced = dataclasses.replace(self), self.program
        vars(made)["program"] = Program(
            copy.deepcopy(traced.graph),
            traced.hub,
            constants=dict(traced.constants),
            accepts=traced.accepts,
            notes=list(traced.notes),
        )
        return made

    @property
    def name(self) -> str:
        """That of its directory, or its class's."""
        if self.directory is not None and (name := self.directory.resolve().name):
            return name
        return str((self.config.get("architectures") or ["model"])[0])

    def replaced_files(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """(name -> content of the JSON files that the output does not copy as they are, why: a sentence
        each).

        transformers refuses to save a model whose generation_config.json gives values for sampling without
        `do_sample: true`, which its older versions wrote; the output's says so.
        """
        stored = _json(self.directory / _GENERATION) if self.directory is not None else None
        if not isinstance(stored, dict) or _is_valid(stored):
            return {}, []
        sampling = {**stored, "do_sample": True}
        if not _is_valid(sampling):
            return {}, []
        note = (
            f"{_GENERATION}: gives values for sampling, but not `do_sample: true`, without which "
            "transformers saves no such file; the output's has it"
        )
        return {_GENERATION: sampling}, [note]


_GENERATION = "generation_config.json"


def _json(path: Path) -> Any:
    """What a file holds; None if it is not there or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_valid(generation: Mapping[str, Any]) -> bool:
    """Whether transformers would save this generation config."""
    try:
        with quiet():
            GenerationConfig.from_dict(copy.deepcopy(dict(generation))).validate(strict=True)
    except Exception:  # whatever odd values make its checks raise
        return False
    return True


def open_model(
    model: "AnyModel | Model",
    *,
    follow_links: bool = False,
    trust_remote_code: bool = False,
    served: bool = False,
) -> Model:
    """A directory or live model, checked: config, fake, and where each parameter lies; no weight is read.

    follow_links: whether its files may be symbolic links out of it. served: whether what a quantized
    checkpoint says of its activations is read too, so that it can be run as engines do.
    """
    if isinstance(model, Model):
        return model
    given = located(model)
    if isinstance(given, PreTrainedModel):
        return _open_live(given, follow_links, trust_remote_code)
    path = given
    source = Directory(path, served=served, follow_links=follow_links)
    config = load_config(path, trust_remote_code=trust_remote_code)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(source)
    fake = fake_model_of_config(config, dtype, trust_remote_code=trust_remote_code)
    source.attach(fake.model)
    return Model(fake, source, without_encoding(source.config), path, trust_remote_code)


def located(model: object) -> Path | PreTrainedModel:
    """The directory or live model that a user means; SourceError for what is neither, with what to do."""
    if isinstance(model, (str, Path)):
        return model_directory(model)
    live: Any = getattr(model, "_orig_mod", model)  # of torch.compile, which changes no weight
    if callable(getattr(live, "merge_and_unload", None)) or getattr(live, "_hf_peft_config_loaded", False):
        raise SourceError(
            f"{type(live).__name__}: a model with adapters beside its weights; expected them merged: "
            "merge_and_unload() of peft gives the model to compile"
        )
    if isinstance(live, PreTrainedModel):
        return live
    inner = getattr(live, "module", None)
    hint = "; give its .module" if isinstance(inner, PreTrainedModel) else ""
    raise SourceError(
        "expected a Hugging Face directory, a name on the hub or a transformers PreTrainedModel, found "
        f"{type(live).__name__}{hint}"
    )


def _open_live(model: PreTrainedModel, follow_links: bool, trust_remote_code: bool) -> Model:
    fake = fake_model_of_live(model)
    directory = directory_of(model)
    origin = Directory(directory, follow_links=follow_links) if directory is not None else None
    source = Live(model, origin, fake.model)
    config = _plain_config(model, type(fake.model).__name__)
    if directory is not None and origin is not None:
        stored = load_config(directory, trust_remote_code=trust_remote_code).to_dict()
        if without_encoding(stored) == without_encoding(_comparable(model)):
            config = origin.config
    notes = tuple(
        f"{name}: has a forward or hooks of its own, which fxq, that compiles the class, does not see"
        for name, _ in fold(called_otherwise(model))
    )
    return Model(fake, source, without_encoding(config), directory, trust_remote_code, notes)


def _plain_config(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(copy.deepcopy(model.config).to_json_string())
    config.setdefault("architectures", [architecture])
    return config


def _comparable(model: PreTrainedModel) -> dict[str, Any]:
    return copy.deepcopy(model.config).to_dict()


def directory_of(model: AnyModel) -> Path | None:
    """The model's directory: the path itself, or where a live model was loaded from, if it is still there."""
    given = located(model)
    if isinstance(given, Path):
        return given
    name = given.config._name_or_path
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


def _stored_dtype(source: Directory) -> torch.dtype:
    return next(
        (i.dtype for i in source.infos.values() if i.dtype.is_floating_point and i.dtype.itemsize > 1),
        torch.bfloat16,
    )


def samples_of(
    model: Model,
    text: object,
    samples: int,
    seq_len: int,
    *,
    pack: bool = False,
    notes: list[str] | None = None,
    name: str = "calib",
) -> list[list[int]]:
    """The first samples of a text, as token ids of the model, cut to what it can hold; see `load_samples`."""
    text_config = model.fake.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or seq_len
    reader = _Reader(model)
    found = calibration.load_samples(
        text,
        reader.encode,
        vocabulary=text_config.vocab_size,
        samples=samples,
        length=min(seq_len, limit),
        chat=reader.chat,
        pack=pack,
        notes=notes,
        name=name,
    )
    if notes is not None and reader.has_unused_template:
        notes.append(
            'the model has a chat template and the text is plain; {"messages": [...]} would show it what it '
            "is asked when it is served"
        )
    return found


class _Reader:
    """The tokenizer of a model's directory, loaded when it is first needed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.read_text = self.read_messages = False

    @functools.cached_property
    def tokenizer(self) -> Any:
        if self.model.directory is None:
            raise SourceError("text needs a tokenizer; a model without a directory takes input_ids")
        return load_tokenizer(self.model.directory, trust_remote_code=self.model.trust_remote_code)

    def encode(self, text: str) -> Sequence[int]:
        self.read_text = True
        return self.tokenizer(text)["input_ids"]

    def chat(self, messages: Any) -> Sequence[int]:
        """A conversation as the model's template puts it."""
        self.read_messages = True
        if not self._has_template():
            raise SourceError("the tokenizer has no chat template for messages; give text or input_ids")
        return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]

    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def has_unused_template(self) -> bool:
        return self.read_text and not self.read_messages and self._has_template()


def versions() -> dict[str, str]:
    """Of fxq and of what it computes with."""
    return {"fxq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def run_of(
    model: Model, spec: Spec, ids: Sequence[Sequence[int]] | None, device: torch.device, shard_bytes: int
) -> dict[str, Any]:
    """Everything that decides what a run writes, in JSON: two runs of equal values write equal bytes."""
    files = fingerprint.of_directory(model.directory) if model.directory is not None else {}
    return {
        "versions": versions(),
        "passes": "; ".join(map(repr, spec.passes)),
        "code": fingerprint.of_code(type(step) for step in spec.passes),
        "model": files,
        "parameters": fingerprint.of_live(model.source) if isinstance(model.source, Live) else "of the files",
        "config": fingerprint.of_config(model.config),
        "calibration": fingerprint.of_samples(ids),
        "device": fingerprint.of_device(device),
        "shard_bytes": shard_bytes,
    }


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name, for "auto" a GPU if there is one; SpecError if it is none of this
    machine's."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SpecError(f"no device is called {device!r}; there are auto, cpu, cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise SpecError(f"fxq runs on cpu or cuda; found {device!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return found
