"""Model directory of safetensors, read lazily: the bytes of a tensor, of some of its rows or of one
of its experts, and no more.

Parameters are rows of the hub's tensors (`fxq.sources.conversion`), so that one expert is read alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from fxq.errors import SourceError
from fxq.graph.hub import Hub, Stored, TensorInfo, row_axis
from fxq.sources.activations import activations_of
from fxq.sources.conversion import hub_of, kept_turned
from fxq.sources.encodings import encoding_of
from fxq.sources.files import INDEX, allow_files, check_depth, check_links, read_config, shards
from fxq.sources.safetensors_file import SafetensorsFile


class Directory:
    """A model directory. Nothing is kept or mapped, and several threads may read at once.

    config: its config.json. infos: every tensor as it decodes, in natural order of names; the scales of
    quantized ones are not among them. weights: those that are encoded. activations: what a quantized
    checkpoint's inputs and cache are quantized with, if asked for (`served`) and said. bytes_read: of
    tensors, as they decode, that were read so far. follow_links: whether files may be links out of the
    directory. SourceError says what is wrong with a file of it.
    """

    concurrent = True

    def __init__(self, path: Path, *, served: bool = False, follow_links: bool = False) -> None:
        check_links(path, follow=follow_links)
        self.path, self.config = path, read_config(path)
        names, listed = shards(path)
        allow_files(len(names))
        self._files = _by_tensor(path, [SafetensorsFile(path / name) for name in names], listed)
        check_depth(path, self.config, len(self._files))
        raw = {key: self._files[key].entries[key].info for key in sorted(self._files, key=dot_natural_key)}
        encoding = encoding_of(self.config, raw, path)
        self.infos, self.weights = dict(encoding.infos), dict(encoding.weights)
        self.activations = activations_of(encoding, raw, path) if served else None
        self.bytes_read, self._counting = 0, Lock()
        self.hub = Hub(tensors=self.infos)
        self._own: dict[str, TensorInfo] = {}

    def attach(self, model: PreTrainedModel) -> None:
        """Learn where each parameter of `model` lies (on fake tensors or others: no values are needed);
        SourceError if one is missing."""
        for key in kept_turned(model, list(self.weights)):  # they are stored as [out, in]
            weight = self.weights[key] = replace(self.weights[key], transposed=True)
            self.infos[key] = TensorInfo(weight.decoded_shape, self.infos[key].dtype)
        encodings = {key: weight.title for key, weight in self.weights.items()}
        self.hub = replace(hub_of(model, self.infos, str(self.path)), encodings=encodings)
        self._own = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}

    def read_stored(self, key: str) -> Tensor:
        """A tensor as the file holds it, scales included."""
        info = self._files[key].entries[key].info
        out = torch.empty(info.shape, dtype=info.dtype)
        self._files[key].read(key, out)
        return out

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        if name not in self.hub.stored:
            found = self._part(name)
            return found if out is None else out.copy_(found)
        stored, own = self.hub.stored[name], self._own[name]
        out = torch.empty(own.shape, dtype=own.dtype) if out is None else out
        if stored.convert is not None:
            return out.copy_(stored.convert(self.read_hub))
        if stored.stacked:
            for expert in range(len(out)):
                self._fill(stored, expert, out[expert])
        else:
            self._fill(stored, None, out)
        return out

    def _part(self, name: str) -> Tensor:
        """The codes or scales of a matrix in FP8 blocks, `<parameter>.codes`, `<parameter>.scales`."""
        parameter, _, part = name.rpartition(".")
        ((key,),) = self.hub.stored[parameter].keys
        codes, scales = self.weights[key].parts(self._stored_rows)
        return {"codes": codes, "scales": scales}[part]

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        stored, own = self.hub.stored[name], self._own[name]
        out = torch.empty(own.shape[1:], dtype=own.dtype) if out is None else out
        if stored.convert is not None:
            return out.copy_(self.read(name)[expert])
        self._fill(stored, expert, out)
        return out

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        info = self.infos[key]
        part = range(info.shape[0] if info.shape else 1) if part is None else part
        out = torch.empty((len(part), *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        if len(info.shape) < 3:
            self._rows(key, part, None, out)
        else:
            for index, one in zip(part, out, strict=True):
                self._rows(key, range(info.shape[-2]), index, one)
        return out

    def _fill(self, stored: Stored, expert: int | None, out: Tensor) -> None:
        """All parts of a parameter, or of one expert of it, into `out`, shaped as the model has it."""
        held = out.mT if stored.transposed else out
        lengths = [len(part.rows) for part in stored.parts]
        pieces = held.split(lengths, row_axis(held.shape)) if held.dim() else (held,)
        for part, piece in zip(stored.parts, pieces, strict=True):
            if stored.stacked and expert is not None:
                self._rows(part.keys[expert], part.rows, None, piece)
            else:
                self._rows(part.keys[0], part.rows, expert, piece)

    def _rows(self, key: str, rows: range, expert: int | None, out: Tensor) -> None:
        """Some rows of one tensor, or of one expert of it, into `out`, decoded and cast to its dtype."""
        with self._counting:
            self.bytes_read += out.numel() * self.infos[key].dtype.itemsize
        shape = self.infos[key].shape
        lead = shape[: row_axis(shape)] if expert is None else shape[1:-2]
        first = 0 if expert is None else expert * math.prod(lead)
        matrices = range(first, first + math.prod(lead))
        plain = key not in self.weights and out.dtype == self.infos[key].dtype
        if plain and rows.step == 1 and out.is_contiguous():
            self._raw(key, matrices, rows, shape, out)
            return
        span = range(rows[0], rows[-1] + 1) if rows else rows
        values = self._span(key, matrices, span)[:, :: rows.step]
        out.copy_(values.reshape(out.shape))

    def _span(self, key: str, matrices: range, rows: range) -> Tensor:
        """Consecutive rows of some matrices [N, ...] of a tensor [..., N, ...], as [matrices, rows, ...]."""
        shape, dtype = self.infos[key].shape, self.infos[key].dtype
        out = torch.empty(len(matrices), len(rows), *shape[row_axis(shape) + 1 :], dtype=dtype)
        if (weight := self.weights.get(key)) is None:
            self._raw(key, matrices, rows, shape, out)
            return out
        for matrix, piece in zip(matrices, out, strict=True):
            weight.decode(self._stored_rows, matrix, rows, piece)
        return out

    def _stored_rows(self, key: str, height: int, width: int, matrix: int, rows: range) -> Tensor:
        """A `ReadRows`."""
        out = torch.empty(len(rows), width, dtype=self._files[key].entries[key].info.dtype)
        if out.numel():
            self._files[key].read(key, out, (matrix * height + rows.start) * width * out.dtype.itemsize)
        return out

    def _raw(self, key: str, matrices: range, rows: range, shape: tuple[int, ...], out: Tensor) -> None:
        """The bytes of `_span` into `out`, contiguous, of a tensor of which `shape` is the shape."""
        if not out.numel():
            return
        axis = row_axis(shape)
        tall = shape[axis] if shape else 1
        size = math.prod(shape[axis + 1 :]) * out.dtype.itemsize
        if len(rows) == tall:
            self._files[key].read(key, out, matrices.start * tall * size)
            return
        for matrix, block in zip(matrices, out.view(len(matrices), len(rows), -1), strict=True):
            self._files[key].read(key, block, (matrix * tall + rows.start) * size)


def _by_tensor(
    path: Path, opened: Sequence[SafetensorsFile], listed: Mapping[str, str] | None
) -> dict[str, SafetensorsFile]:
    """Tensor -> its file; SourceError where the files and the index, or two files, contradict each other."""
    found: dict[str, SafetensorsFile] = {}
    for file in opened:
        for key in file.entries:
            if key in found:
                raise SourceError(f"{path}: {key} is in both {found[key].path.name} and {file.path.name}")
            found[key] = file
    if listed is None:
        return found
    for key, name in listed.items():
        if key not in found or found[key].path.name != name:
            raise SourceError(f"{path / name}: {INDEX} says that it holds {key}, and it does not")
    for key, file in found.items():
        if key not in listed:
            raise SourceError(f"{file.path}: holds {key}, which {INDEX} does not list")
    return found
