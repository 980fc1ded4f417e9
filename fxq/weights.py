"""Weight sources: a safetensors directory or a live model, both seen under the hub's names and under the
model's own.

Parameters are rows of the hub's tensors (`fxq.conversion`), so that one expert is read alone.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from fxq.conversion import hub_of, own_names, revert
from fxq.errors import SourceError
from fxq.program import Hub, Stored, TensorInfo, row_axis

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
        if stored.convert is not None:
            return stored.convert(self.read_hub).to(self._dtypes[name])
        if not stored.stacked:
            return self._joined(name, [self._rows(part.keys[0], part.rows) for part in stored.parts])
        first = self.read_expert(name, 0)
        out = first.new_empty(len(stored.keys[0]), *first.shape)
        for expert in range(len(out)):
            self._read_expert_into(stored, expert, out[expert])
        return out

    def read_expert(self, name: str, expert: int) -> Tensor:
        stored = self.hub.stored[name]
        if stored.convert is not None:
            return self.read(name)[expert]
        if stored.stacked:
            pieces = [self._rows(part.keys[expert], part.rows) for part in stored.parts]
        else:
            pieces = [self._rows(part.keys[0], part.rows, expert) for part in stored.parts]
        return self._joined(name, pieces)

    def _joined(self, name: str, pieces: list[Tensor]) -> Tensor:
        """The parts of a parameter (or of one expert of it) as the model has them."""
        pieces = [piece.to(self._dtypes[name]) for piece in pieces]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, row_axis(pieces[0].shape))
        return joined.mT.contiguous() if self.hub.stored[name].transposed else joined

    def _read_expert_into(self, stored: Stored, expert: int, out: Tensor) -> None:
        out = out.mT if stored.transposed else out
        lengths = [len(part.rows) for part in stored.parts]
        for piece, part in zip(out.split(lengths, row_axis(out.shape)), stored.parts, strict=True):
            piece.copy_(self._rows(part.keys[expert], part.rows))

    def read_hub(self, key: str) -> Tensor:
        return self._read(key, lambda file: file.get_tensor(key))

    def _rows(self, key: str, rows: range, expert: int | None = None) -> Tensor:
        """Some rows of one tensor, or of one expert of it; nothing else is read."""
        shape = self.infos[key].shape
        axis = row_axis(shape)
        whole = not shape or rows == range(shape[axis])
        if whole and expert is None:
            return self.read_hub(key)
        index: list[int | slice] = [slice(None)] * axis
        if expert is not None:
            index[0] = expert
        if not whole:
            index.append(slice(rows.start, rows.stop, rows.step))
        return self._read(key, lambda file: file.get_slice(key)[tuple(index)])

    def _read(self, key: str, get: Callable[[Any], Tensor]) -> Tensor:
        try:
            return get(self._open[self.files[key]])
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.path / self.files[key]}: cannot read {key}: {error}") from error

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
    """A model in memory, read through its state dict; `origin`, the directory it came from, supplies the
    hub's names and what the model ignores."""

    def __init__(self, model: PreTrainedModel, origin: Directory | None = None) -> None:
        self.model, self.origin = model, origin
        self.state = {name: t.detach() for name, t in model.state_dict().items()}
        for name, tensor in self.state.items():
            if tensor.device.type == "meta":
                raise SourceError(
                    f"{name}: its values are not in memory (device meta); load the model without offloading"
                )
        if origin is None:
            reverted = revert(model, {name: self.state[name].to("meta") for name in own_names(model)})
            infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in reverted.items()}
            self.hub = hub_of(model, infos, type(model).__name__)
        else:
            origin.attach(model)
            self.hub = self._in_own_dtypes(origin.hub)
        self._where = _places(self.hub)

    def _in_own_dtypes(self, hub: Hub) -> Hub:
        """The directory's tensors, in the dtypes that the parameters have in memory."""
        tensors = dict(hub.tensors)
        for name, stored in hub.stored.items():
            for key in (key for keys in stored.keys for key in keys):
                tensors[key] = TensorInfo(tensors[key].shape, self.state[name].dtype)
        return dataclasses.replace(hub, tensors=tensors)

    def read(self, name: str) -> Tensor:
        if name not in self.state:
            raise SourceError(f"{name}: the model's state dict has no such tensor")
        return self.state[name].cpu()

    def read_expert(self, name: str, expert: int) -> Tensor:
        return self.state[name][expert].cpu()

    def read_hub(self, key: str) -> Tensor:
        places = self._where.get(key, ())
        if not places:
            if self.origin is None:
                raise SourceError(f"{key}: no parameter of the model makes this tensor")
            return self.origin.read_hub(key)
        if any(self.hub.stored[name].convert is not None for name, _, _ in places):
            names = dict.fromkeys(name for name, _, _ in places)
            return revert(self.model, {name: self.state[name] for name in names})[key].cpu()
        info = self.hub.tensors[key]
        axis = row_axis(info.shape)
        out = torch.empty(info.shape, dtype=info.dtype)
        for name, part, expert in places:
            rows = self.hub.stored[name].parts[part].rows
            piece = self._piece(name, part, expert).to(info.dtype)
            if piece.shape == info.shape:
                return piece.cpu()
            out[(slice(None),) * axis + (slice(rows.start, rows.stop, rows.step),)] = piece.cpu()
        return out

    def _piece(self, name: str, part: int, expert: int | None) -> Tensor:
        """The rows of a parameter (or of one expert of it) that a part of it holds."""
        stored = self.hub.stored[name]
        held = self.state[name] if expert is None else self.state[name][expert]
        held = held.mT if stored.transposed else held
        if len(stored.parts) == 1:
            return held
        lengths = [len(p.rows) for p in stored.parts]
        return held.split(lengths, row_axis(held.shape))[part]


def _places(hub: Hub) -> dict[str, list[tuple[str, int, int | None]]]:
    """Tensor of the checkpoint -> (parameter, part of it, expert) of all that lies there."""
    places: dict[str, list[tuple[str, int, int | None]]] = defaultdict(list)
    for name, stored in hub.stored.items():
        for number, part in enumerate(stored.parts):
            for expert, key in enumerate(part.keys):
                places[key].append((name, number, expert if stored.stacked else None))
    return places


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
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError where memory cannot be mapped
        raise SourceError(f"{file}: not a readable safetensors file: {error}") from error
