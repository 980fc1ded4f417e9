"""A Hugging Face directory of safetensors, read lazily: the bytes of a tensor, of some of its rows or of one
of its experts, and no more.

Parameters are rows of the hub's tensors (`fxq.sources.conversion`), so that one expert is read alone.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from fxq.errors import SourceError
from fxq.program import Hub, Stored, TensorInfo, row_axis
from fxq.sources.conversion import hub_of
from fxq.sources.encoding import Scaled, decode, encoding_of
from fxq.sources.files import INDEX, check_depth, check_links, read_config, shards
from fxq.sources.shard import Shard


class Directory:
    """A model directory. Nothing is kept or mapped, and several threads may read at once.

    config: its config.json. infos: every tensor as it decodes, in natural order of names; the scales of
    quantized ones are not among them.
    """

    concurrent = True

    def __init__(self, path: Path) -> None:
        check_links(path)
        self.path, self.config = path, read_config(path)
        names, listed = shards(path)
        self._shards = _by_tensor(path, [Shard(path / name) for name in names], listed)
        check_depth(path, self.config, len(self._shards))
        raw = {key: self._shards[key].entries[key].info for key in sorted(self._shards, key=dot_natural_key)}
        encoding = encoding_of(self.config, raw, path)
        self.infos, self._scaled = encoding.infos, encoding.scaled
        self.hub = Hub(tensors=self.infos)
        self._own: dict[str, TensorInfo] = {}

    def attach(self, model: PreTrainedModel) -> None:
        """Learn where each parameter of `model` (its twin; no values needed) lies; SourceError if one is
        missing."""
        self.hub = hub_of(model, self.infos, str(self.path))
        self._own = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
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
        shape = self.infos[key].shape
        lead = shape[: row_axis(shape)] if expert is None else shape[1:-2]
        first = 0 if expert is None else expert * math.prod(lead)
        matrices = range(first, first + math.prod(lead))
        plain = key not in self._scaled and out.dtype == self.infos[key].dtype
        if plain and rows.step == 1 and out.is_contiguous():
            self._raw(key, matrices, rows, shape, out)
            return
        span = range(rows[0], rows[-1] + 1) if rows else rows
        values = self._span(key, matrices, span)[:, :: rows.step]
        out.copy_(values.reshape(out.shape))

    def _span(self, key: str, matrices: range, rows: range) -> Tensor:
        """Consecutive rows of some matrices [N, ...] of a tensor [..., N, ...], as [matrices, rows, ...]."""
        info = self.infos[key]
        width = info.shape[row_axis(info.shape) + 1 :]
        raw = torch.empty(len(matrices), len(rows), *width, dtype=self._shards[key].entries[key].info.dtype)
        self._raw(key, matrices, rows, info.shape, raw)
        scaled = self._scaled.get(key)
        if scaled is None:
            return raw
        scales = self._scales(key, scaled, matrices, rows)
        out = torch.empty(raw.shape, dtype=info.dtype)
        for number in range(len(matrices)):
            decode(raw[number], scales[number], scaled.block, rows.start, out[number])
        return out

    def _scales(self, key: str, scaled: Scaled, matrices: range, rows: range) -> Tensor:
        """float32 scales of the blocks that hold these rows, as [matrices, block rows, block columns]."""
        grid = scaled.grid(self.infos[key].shape)
        blocks = range(rows.start // scaled.block[0], -(-rows.stop // scaled.block[0]))
        dtype = self._shards[scaled.key].entries[scaled.key].info.dtype
        scales = torch.empty(len(matrices), len(blocks), grid[-1], dtype=dtype)
        self._raw(scaled.key, matrices, blocks, grid, scales)
        scales = scales.to(torch.float32)
        if not bool(torch.isfinite(scales).all()):
            raise SourceError(f"{self.path}: {scaled.key} holds NaN or Inf, so that {key} cannot be decoded")
        return scales

    def _raw(self, key: str, matrices: range, rows: range, shape: tuple[int, ...], out: Tensor) -> None:
        """The bytes of `_span` into `out`, contiguous, of a tensor of which `shape` is the shape."""
        if not out.numel():
            return
        axis = row_axis(shape)
        tall = shape[axis] if shape else 1
        size = math.prod(shape[axis + 1 :]) * out.dtype.itemsize
        if len(rows) == tall:
            self._shards[key].read(key, out, matrices.start * tall * size)
            return
        for matrix, block in zip(matrices, out.view(len(matrices), len(rows), -1), strict=True):
            self._shards[key].read(key, block, (matrix * tall + rows.start) * size)


def _by_tensor(path: Path, opened: Sequence[Shard], listed: Mapping[str, str] | None) -> dict[str, Shard]:
    """Tensor -> its file; SourceError where the files and the index, or two files, contradict each other."""
    found: dict[str, Shard] = {}
    for shard in opened:
        for key in shard.entries:
            if key in found:
                raise SourceError(f"{path}: {key} is in both {found[key].path.name} and {shard.path.name}")
            found[key] = shard
    if listed is None:
        return found
    for key, name in listed.items():
        if key not in found or found[key].path.name != name:
            raise SourceError(f"{path / name}: {INDEX} puts {key} there, but there it is not")
    for key, shard in found.items():
        if key not in listed:
            raise SourceError(f"{shard.path}: holds {key}, which {INDEX} does not list")
    return found
