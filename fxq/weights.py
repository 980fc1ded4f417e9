"""Weight sources: a safetensors directory or a live model, both seen under the hub's names and under the
model's own.

transformers converts hub tensors as it loads them (experts stacked, gate and up concatenated). Here that
conversion is read as a map from parameters to tensors, so that one expert can be read alone and written
under its hub name.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fxq.errors import SourceError
from fxq.program import Hub, Stored, TensorInfo

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEX = "model.safetensors.index.json"


class Directory:
    """A Hugging Face directory of safetensors; a tensor's bytes are read when asked for and not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _shards(path)
        self._open = {name: _open(path / name) for name in dict.fromkeys(self.files.values())}
        self.infos = {key: self._info(key) for key in self.files}
        self.hub = Hub(tensors=self.infos)
        self._dtypes: dict[str, torch.dtype] = {}

    def attach(self, model: PreTrainedModel) -> None:
        """Learn where each parameter of `model` (its twin; no values needed) lies; SourceError if one is
        missing."""
        self.hub = hub_of(model, self.infos, str(self.path))
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        stored = self.hub.stored[name]
        if stored.fused:
            return self.read_hub(stored.keys[0][0]).to(self._dtypes[name])
        if not stored.stacked:
            return torch.cat([self.read_hub(keys[0]) for keys in stored.keys]).to(self._dtypes[name])
        first = self.read_expert(name, 0)
        out = first.new_empty(len(stored.keys[0]), *first.shape)
        for expert in range(len(out)):
            self._read_expert_into(stored, expert, out[expert])
        return out

    def read_expert(self, name: str, expert: int) -> Tensor:
        stored = self.hub.stored[name]
        if stored.fused:
            return self._slice(stored.keys[0][0], expert).to(self._dtypes[name])
        parts = [self.read_hub(keys[expert]).to(self._dtypes[name]) for keys in stored.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_expert_into(self, stored: Stored, expert: int, out: Tensor) -> None:
        for part, keys in zip(out.split(list(stored.rows)), stored.keys, strict=True):
            part.copy_(self.read_hub(keys[expert]))

    def read_hub(self, key: str) -> Tensor:
        try:
            return self._open[self.files[key]].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.path / self.files[key]}: cannot read {key}: {error}") from error

    def _slice(self, key: str, expert: int) -> Tensor:
        return self._open[self.files[key]].get_slice(key)[expert]

    def _info(self, key: str) -> TensorInfo:
        try:
            view = self._open[self.files[key]].get_slice(key)
        except SafetensorError as error:
            raise SourceError(f"{self.path / self.files[key]}: {_INDEX} puts {key} there: {error}") from error
        name = view.get_dtype()
        if name not in _DTYPES:
            raise SourceError(
                f"{self.path / self.files[key]}: {key} has dtype {name}; fxq reads {', '.join(_DTYPES)}"
            )
        return TensorInfo(tuple(view.get_shape()), _DTYPES[name])


class Live:
    """A model in memory, read through its state dict; `origin`, the directory it came from, supplies what
    it ignores."""

    def __init__(self, model: PreTrainedModel, origin: Directory | None = None) -> None:
        self.state = {name: t.detach() for name, t in model.state_dict().items()}
        for name, tensor in self.state.items():
            if tensor.device.type == "meta":
                raise SourceError(
                    f"{name}: its values are not in memory (device meta); load the model without offloading"
                )
        self.origin = origin
        first: dict[int, str] = {}
        aliases = {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
        own = {n: t.to("meta") for n, t in self.state.items() if aliases.get(n, n) == n}
        reverted = revert_weight_conversion(model, own)
        infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in reverted.items()}
        self.hub = hub_of(model, infos, type(model).__name__)
        self._where = {
            key: (name, part, expert)
            for name, stored in self.hub.stored.items()
            for part, keys in enumerate(stored.keys)
            for expert, key in enumerate(keys)
        }
        if origin is not None:
            origin.attach(model)
            extra = {key: origin.infos[key] for key in origin.hub.extra}
            self.hub = Hub(
                self.hub.stored, self.hub.names, {**infos, **extra}, tuple(extra), self.hub.modules
            )

    def read(self, name: str) -> Tensor:
        if name not in self.state:
            raise SourceError(f"{name}: the model's state dict has no such tensor")
        return self.state[name].cpu()

    def read_expert(self, name: str, expert: int) -> Tensor:
        return self.state[name][expert].cpu()

    def read_hub(self, key: str) -> Tensor:
        if key not in self._where and self.origin is not None:
            return self.origin.read_hub(key)
        name, part, expert = self._where[key]
        stored = self.hub.stored[name]
        if stored.fused:
            return self.state[name].cpu()
        whole = self.state[name][expert] if stored.stacked else self.state[name]
        return whole.split(list(stored.rows))[part].cpu()


def _shards(path: Path) -> dict[str, str]:
    """Tensor -> file, from the index if there is one; SourceError when a shard or every shard is missing."""
    index = path / _INDEX
    if index.is_file():
        try:
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(
                f"{index}: expected JSON with a weight_map: {type(error).__name__} {error}"
            ) from error
        if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
            raise SourceError(f"{index}: expected a weight_map from tensor names to file names")
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise SourceError(f"{index}: {name!r} leads out of the model directory")
            if not (path / name).is_file():
                held = sum(1 for file in files.values() if file == name)
                raise SourceError(
                    f"{path / name}: listed in {_INDEX} for {held} tensors, but there is no such file"
                )
        return {key: files[key] for key in sorted(files, key=dot_natural_key)}
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(f.name for f in path.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = (
            f"; {', '.join(others[:3])} is not read (pickle can run code): convert it to safetensors"
            if others
            else ""
        )
        raise SourceError(f"{path}: expected *.safetensors, found none{hint}")
    files = {}
    for file in found:
        for key in _open(file).keys():  # noqa: SIM118 (safe_open is no mapping)
            if key in files:
                raise SourceError(
                    f"{path}: {key} is in both {files[key]} and {file.name}, and there is no {_INDEX}"
                )
            files[key] = file.name
    return {key: files[key] for key in sorted(files, key=dot_natural_key)}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{file}: not a readable safetensors file: {error}") from error


def hub_of(model: PreTrainedModel, infos: Mapping[str, TensorInfo], where: str) -> Hub:
    """How the tensors of a checkpoint make up the parameters of `model`, by transformers' own conversion
    of that family."""
    own = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    stored, extra = _stored(model, infos, own)
    first: dict[int, str] = {}
    aliases = {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
    tied = set(model.all_tied_weights_keys)
    for alias, name in aliases.items():
        if alias in stored and name not in stored:
            stored[name] = stored[alias]
    missing = [
        name for name in own if name not in stored and aliases.get(name, name) == name and name not in tied
    ]
    if missing:
        raise SourceError(
            f"{where}: no tensor for {missing[0]}"
            + (f" and {len(missing) - 1} more parameters" if missing[1:] else "")
        )
    names = dict(stored)
    fused = [name for name, s in stored.items() if s.fused and len(own[name].shape) == 3]
    if fused:
        meta = {
            n: torch.empty(i.shape, dtype=i.dtype, device="meta")
            for n, i in own.items()
            if aliases.get(n, n) == n
        }
        reverted = revert_weight_conversion(model, meta)
        theirs, _ = _stored(model, {k: TensorInfo(tuple(t.shape), t.dtype) for k, t in reverted.items()}, own)
        names.update({name: theirs[name] for name in fused if name in theirs})
    modules = tuple(
        sorted(
            alias.removesuffix(".weight")
            for alias in aliases
            if alias.endswith(".weight") and alias not in stored
        )
    )
    return Hub(stored, names, dict(infos), tuple(extra), modules)


def _stored(
    model: PreTrainedModel, infos: Mapping[str, TensorInfo], own: Mapping[str, TensorInfo]
) -> tuple[dict[str, Stored], list[str]]:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    extra = []
    for key in sorted(infos, key=dot_natural_key):
        # The base-model prefix is tried against a plain dict of names: only membership is asked for.
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(own))
        if name not in own and key in own:
            name, pattern = key, None
        if name in own:
            found[name][pattern].append(key)
        else:
            extra.append(key)
    stored = {}
    for name, sources in found.items():
        stored[name] = _one_stored(name, sources, by_pattern, infos)
        _check_shape(name, stored[name], infos, own[name].shape)
    return stored, extra


def _one_stored(
    name: str,
    sources: Mapping[str | None, list[str]],
    by_pattern: Mapping[str, WeightConverter],
    infos: Mapping[str, TensorInfo],
) -> Stored:
    if None in sources:
        return Stored(((sources[None][0],),))
    converter = by_pattern[str(next(iter(sources)))]
    keys = tuple(tuple(sources.get(pattern, ())) for pattern in converter.source_patterns)
    keys = tuple(part for part in keys if part)
    kinds = [type(operation) for operation in converter.operations]
    rows = tuple(infos[part[0]].shape[0] for part in keys)
    if kinds in ([MergeModulelist], [MergeModulelist, Concatenate]):
        if len({len(part) for part in keys}) != 1 or len(keys) != len(converter.source_patterns):
            counts = ", ".join(f"{len(part)} like {part[0]}" for part in keys)
            raise SourceError(f"{name}: expected as many tensors of each projection, found {counts}")
        for part in keys:
            _check_numbering(part)
        return Stored(keys, rows, fused=False, stacked=True)
    if kinds == [Concatenate] and getattr(converter.operations[0], "dim", None) == 0:
        return Stored(keys, rows, fused=False)
    names = ", ".join(kind.__name__ for kind in kinds)
    raise SourceError(
        f"{name}: its checkpoint tensors go through {names} on load, which fxq cannot read lazily yet"
    )


def _check_numbering(keys: Sequence[str]) -> None:
    """Experts are stacked in order of their numbers, so a gap would shift all that follow."""
    columns = list(zip(*(key.split(".") for key in keys), strict=True))
    numbers = next((column for column in columns if len(set(column)) > 1), ("0",))
    for expected, (number, key) in enumerate(zip(numbers, keys, strict=False)):
        if number != str(expected):
            raise SourceError(f"{key}: expected expert {expected} here, found {number}; is a tensor missing?")


def _check_shape(
    name: str, stored: Stored, infos: Mapping[str, TensorInfo], expected: tuple[int, ...]
) -> None:
    first = infos[stored.keys[0][0]].shape
    if stored.fused:
        shape = first
    else:
        shape = (sum(stored.rows), *first[1:])
        if stored.stacked:
            shape = (len(stored.keys[0]), *shape)
    odd = [
        k
        for part, rows in zip(stored.keys, stored.rows, strict=False)
        for k in part
        if infos[k].shape != (rows, *first[1:])
    ]
    if odd and not stored.fused:
        raise SourceError(f"{odd[0]}: shape {list(infos[odd[0]].shape)} differs from its fellow experts'")
    if tuple(shape) != tuple(expected):
        raise SourceError(
            f"{stored.keys[0][0]}: config.json makes {name} {list(expected)}, the checkpoint {list(shape)}"
        )
