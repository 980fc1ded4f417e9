"""Fake models: a Hugging Face model's own class on fake tensors, from a directory's config or a live model.

No weight is read, and the user's model is never patched or run.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from fxq.errors import SourceError, TraceError

_LARGEST_BUFFERS = 1 << 31  # bytes of non-persistent buffers
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "tekken.json", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class FakeModel:
    """A model of the user's class and config on fake tensors: structure, names and types without weights.

    buffers: the values of the non-persistent buffers (rotary frequencies and the like), which no checkpoint
    holds. longest: the length beyond which rotary embeddings would change; None if they do not.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    mode: FakeTensorMode
    buffers: dict[str, Tensor]
    longest: int | None = None


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The directory's config; SourceError when it is missing, unknown to transformers, or wants to run
    its own code."""
    if not (directory / "config.json").is_file():
        raise SourceError(f"{directory}: expected a Hugging Face model directory, found no config.json")
    with quiet():
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises whatever a config's own code raises
            raise SourceError(f"{directory / 'config.json'}: {first_line(error)}") from error


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; SourceError when there is none that transformers can load."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise _no_tokenizer(directory, first_line(error)) from error
        if _is_empty(tokenizer):
            reason = f"{type(tokenizer).__name__} found no vocabulary there"
            raise _no_tokenizer(directory, reason)
    return tokenizer


def _no_tokenizer(directory: Path, reason: str) -> SourceError:
    """The error for text without a tokenizer; the reason counts where there are files to make one of."""
    held = any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES)
    found = (
        f"there is no tokenizer that transformers can load ({reason})" if held else "there is no tokenizer"
    )
    return SourceError(f"{directory}: {found}; text needs one, lines of input_ids do not")


def _is_empty(tokenizer: Any) -> bool:
    """Whether a tokenizer knows its special tokens alone: without files, transformers makes such a one for
    Qwen, Gemma, GPT-2 and others, and all text is empty to it, or unknown."""
    try:
        return not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    except (AttributeError, NotImplementedError):  # a tokenizer of another kind
        return False


def fake_model_of_config(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> FakeModel:
    """A checkpoint's model on fake CPU tensors: of the class that its config names if that makes text (a
    multimodal model is kept whole), else of `AutoModelForCausalLM`."""
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": "batched_mm"}
    named = _class_named_by(config)

    def build(c: PreTrainedConfig) -> PreTrainedModel:
        if named is not None:
            model = named._from_config(c, **options)
        else:
            model = AutoModelForCausalLM.from_config(c, trust_remote_code=trust_remote_code, **options)
        _keep_in_float32(model, dtype)
        return model

    return _fake_model(config, build)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen what `from_pretrained` keeps in float32 whatever the dtype asked for; `from_config` does not."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if not names:
        return
    kept = re.compile("|".join(name.replace("*", ".*") for name in sorted(names)))
    for module_name, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and kept.search(f"{module_name}.{name}".lstrip(".")):
                tensor.data = tensor.data.to(torch.float32)


def _class_named_by(config: PreTrainedConfig) -> Any:
    """The class of a checkpoint that `AutoModelForCausalLM` would not build: a multimodal one, or one that
    only `architectures` names; else None."""
    named = config.architectures or ()
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            if not causal or found.__name__ in named:
                return found
    if not causal and named and not hasattr(config, "auto_map"):
        found = getattr(transformers, named[0], None)
        if (
            inspect.isclass(found)
            and issubclass(found, PreTrainedModel)
            and issubclass(found, GenerationMixin)
        ):
            return found
    return None


def fake_model_of_live(model: PreTrainedModel) -> FakeModel:
    """A live model on fake CPU tensors: its own class, a copy of its config; non-persistent buffers are the
    model's own values."""
    fake = _fake_model(
        model.config,
        lambda c: type(model)._from_config(c, dtype=model.dtype, experts_implementation="batched_mm"),
    )
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake.mode:
        for name, tensor in [*fake.model.named_parameters(), *fake.model.named_buffers()]:
            if name in held and held[name].dtype != tensor.dtype:  # as a cast of the whole model leaves them
                tensor.data = tensor.data.to(held[name].dtype)
    return dataclasses.replace(fake, buffers={name: model.get_buffer(name).detach() for name in fake.buffers})


def _fake_model(config: PreTrainedConfig, build: Any) -> FakeModel:
    config = copy.deepcopy(config)
    config._attn_implementation = (
        None  # the one transformers prefers for this class, not what a user once set
    )
    with quiet():
        try:
            with torch.device("meta"), no_init_weights():
                model = build(config).eval()
        except Exception as error:
            raise TraceError(
                f"{config.model_type}: transformers cannot build a causal language model: {first_line(error)}"
            ) from error
        buffers = _buffer_values(model)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        to_fake(model, mode)
        with mode:
            model.tie_weights()
        return FakeModel(model, config, mode, buffers, _freeze_rotary_updates(model))


def _buffer_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """Non-persistent buffers as `from_pretrained` fills them: by the model's own `_init_weights`, on real
    memory; NaN where it does not say.

    They are filled in place; everything else of `model` stays on meta.
    """
    _check_buffers(model)
    values: dict[str, Tensor] = {}
    around: set[str] = set()
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, last = name.rpartition(".")
        value = buffer
        if buffer.device.type == "meta":
            unknown = torch.nan if buffer.is_floating_point() else 0
            value = torch.full(buffer.shape, unknown, dtype=buffer.dtype, device="cpu")
        values[name] = model.get_submodule(owner)._buffers[last] = value
        around.update(owner[:end] for end in range(len(owner) + 1) if owner[end : end + 1] in ("", "."))
    for name in sorted(around | {""}, key=len, reverse=True) if values else ():
        with contextlib.suppress(Exception):  # whatever an initializer raises for weights that are on meta
            _owner_model(model, name)._init_weights(model.get_submodule(name))
    return values


def _check_buffers(model: PreTrainedModel) -> None:
    """A slip in a config can ask for more memory than there is."""
    sizes = {name: buffer.nbytes for name, buffer in model.named_non_persistent_buffers()}
    total = sum(sizes.values())
    if total > _LARGEST_BUFFERS:
        name = max(sizes, key=lambda name: sizes[name])
        raise SourceError(
            f"{model.config.model_type}: the config makes buffers of {total:,} bytes ({name} has shape "
            f"{list(model.get_buffer(name).shape)}); expected at most {_LARGEST_BUFFERS:,}"
        )


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Parameters and buffers on meta (or real) become fake CPU tensors; ties stay ties."""
    fakes: dict[Tensor, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if tensor not in fakes:
            with mode:
                made = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[tensor] = nn.Parameter(made, requires_grad=False) if is_parameter else made
        return fakes[tensor]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})


def _freeze_rotary_updates(model: PreTrainedModel) -> int | None:
    """Keep rotary embeddings that change with the length (longrope, dynamic) as they are for short inputs.

    The switch depends on data, which cannot be traced. Returns the length up to which nothing switches; None
    if no module of this model does.
    """
    limits: list[int] = []
    for module in cast(Iterator[Any], model.modules()):
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind != "longrope" and "dynamic" not in str(kind):
                continue
            parameters = module.config.rope_parameters
            parameters = parameters if layer is None else parameters[layer]
            original = parameters.get("original_max_position_embeddings")
            limits.append(original or module.config.max_position_embeddings)
            module.rope_type = "default" if layer is None else {**module.rope_type, layer: "default"}
    return min(limits, default=None)


def _owner_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost PreTrainedModel that is, or is around, a submodule: the one whose `_init_weights` knows
    it."""
    while True:
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel) or not name:
            return module if isinstance(module, PreTrainedModel) else model
        name = name.rpartition(".")[0]


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Library chatter is not the user's business; failures come as exceptions."""
    level, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    try:
        # A failed export prints its whole graph, past the loggers.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        logging.disable(disabled)
