"""Model directory of safetensors, read lazily: the bytes of a tensor, of some of its rows or of one
of its experts, and no more.

Parameters are rows of the hub's tensors (`fxq.sources.conversion`), so that one expert is read alone.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from fxq.errors import SourceError
from fxq.graph.hub import Hub, Stored, TensorInfo, row_axis
from fxq.numbers import nvfp4
from fxq.sources.conversion import hub_of, kept_turned
from fxq.sources.files import INDEX, allow_files, check_depth, check_links, read_config, shards
from fxq.sources.fp8_blocks import ELEMENTS_AT_ONCE, Fp8Weight, Nvfp4Weight, decode_blocks, fp8_encoding
from fxq.sources.nvfp4_checkpoint import nvfp4_encoding
from fxq.sources.safetensors_file import SafetensorsFile


class Directory:
    """A model directory. Nothing is kept or mapped, and several threads may read at once.

    config: its config.json. infos: every tensor as it decodes, in natural order of names; the scales of
    quantized ones are not among them. activations: what an NVFP4 checkpoint's inputs and cache are quantized
    with. bytes_read: of tensors, as they decode, that were read so far. quantized: whether such a checkpoint
    may be read, decoded, instead of being refused. follow_links: whether files may be links out of the
    directory. SourceError says what is wrong with a file of it.
    """

    concurrent = True

    def __init__(self, path: Path, *, quantized: bool = False, follow_links: bool = False) -> None:
        check_links(path, follow=follow_links)
        self.path, self.config = path, read_config(path)
        names, listed = shards(path)
        allow_files(len(names))
        self._files = _by_tensor(path, [SafetensorsFile(path / name) for name in names], listed)
        check_depth(path, self.config, len(self._files))
        raw = {key: self._files[key].entries[key].info for key in sorted(self._files, key=dot_natural_key)}
        encoding = nvfp4_encoding(self.config, raw, path) if quantized else None
        encoding = encoding or fp8_encoding(self.config, raw, path)
        self.infos, self._fp8, self._nvfp4 = dict(encoding.infos), encoding.fp8, encoding.nvfp4
        self.activations = encoding.activations
        self._turned: set[str] = set()
        self.bytes_read, self._counting = 0, Lock()
        self.hub = Hub(tensors=self.infos)
        self._own: dict[str, TensorInfo] = {}

    def attach(self, model: PreTrainedModel) -> None:
        """Learn where each parameter of `model` lies (on fake tensors or others: no values are needed);
        SourceError if one is missing."""
        if self.activations is not None:
            self._turn(kept_turned(model, [*self._nvfp4, *self._fp8]))
        self.hub = hub_of(model, self.infos, str(self.path))
        self._own = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}

    def _turn(self, keys: Sequence[str]) -> None:
        """Quantized weights are [out, in]; these the model has as [in, out]."""
        for key in keys:
            info = self.infos[key]
            self.infos[key] = TensorInfo(info.shape[::-1], info.dtype)
        self._turned = set(keys)

    def read_stored(self, key: str) -> Tensor:
        """A tensor as the file holds it, scales included."""
        info = self._files[key].entries[key].info
        out = torch.empty(info.shape, dtype=info.dtype)
        self._files[key].read(key, out)
        return out

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
        with self._counting:
            self.bytes_read += out.numel() * self.infos[key].dtype.itemsize
        shape = self.infos[key].shape
        lead = shape[: row_axis(shape)] if expert is None else shape[1:-2]
        first = 0 if expert is None else expert * math.prod(lead)
        matrices = range(first, first + math.prod(lead))
        encoded = key in self._fp8 or key in self._nvfp4
        plain = not encoded and out.dtype == self.infos[key].dtype
        if plain and rows.step == 1 and out.is_contiguous():
            self._raw(key, matrices, rows, shape, out)
            return
        span = range(rows[0], rows[-1] + 1) if rows else rows
        values = self._span(key, matrices, span)[:, :: rows.step]
        out.copy_(values.reshape(out.shape))

    def _span(self, key: str, matrices: range, rows: range) -> Tensor:
        """Consecutive rows of some matrices [N, ...] of a tensor [..., N, ...], as [matrices, rows, ...]."""
        if key in self._turned:
            height, width = self.infos[key].shape
            return self._decoded(key, (width, height), matrices, range(width)).mT[:, rows.start : rows.stop]
        return self._decoded(key, self.infos[key].shape, matrices, rows)

    def _decoded(self, key: str, shape: tuple[int, ...], matrices: range, rows: range) -> Tensor:
        """`_span` of a tensor whose decoded shape in the file is `shape`."""
        dtype = self.infos[key].dtype
        if (weight := self._nvfp4.get(key)) is not None:
            out = torch.empty(len(matrices), len(rows), shape[-1], dtype=dtype)
            for matrix, piece in zip(matrices, out, strict=True):
                self._unpack(weight, shape, matrix, rows, piece)
            return out
        width = shape[row_axis(shape) + 1 :]
        raw = torch.empty(len(matrices), len(rows), *width, dtype=self._files[key].entries[key].info.dtype)
        self._raw(key, matrices, rows, shape, raw)
        scaled = self._fp8.get(key)
        if scaled is None:
            return raw
        scales = self._scales(key, scaled, shape, matrices, rows)
        out = torch.empty(raw.shape, dtype=dtype)
        for number in range(len(matrices)):
            decode_blocks(raw[number], scales[number], scaled.block, rows.start, out[number])
        return out

    def _unpack(
        self, weight: Nvfp4Weight, shape: tuple[int, ...], matrix: int, rows: range, out: Tensor
    ) -> None:
        """Some rows of one NVFP4 matrix into `out` [rows, K], a part at a time."""
        scale_2 = self.read_stored(weight.scale_2).flatten()
        scale_2 = scale_2[matrix] if len(scale_2) > 1 else scale_2[0]
        scale_2 = scale_2.reciprocal() if weight.is_divisor else scale_2
        if weight.along_rows:  # blocks reach over rows
            codes, scale = (self._whole(key, shape, matrix).mT for key in (weight.weight, weight.scale))
            out.copy_(_dequantized(weight, codes, scale, scale_2).mT[rows.start : rows.stop])
            return
        most = max(1, ELEMENTS_AT_ONCE // max(shape[-1], 1))
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            codes = self._columns(weight.weight, shape[-1] // 2, shape, matrix, part)
            scale = self._columns(weight.scale, shape[-1] // nvfp4.BLOCK, shape, matrix, part)
            out[start : start + most] = _dequantized(weight, codes, scale, scale_2)

    def _columns(self, key: str, width: int, shape: tuple[int, ...], matrix: int, rows: range) -> Tensor:
        """Rows of one matrix of codes or block scales [..., N, width]."""
        out = torch.empty(1, len(rows), width, dtype=self._files[key].entries[key].info.dtype)
        self._raw(key, range(matrix, matrix + 1), rows, (*shape[:-1], width), out)
        return out[0]

    def _whole(self, key: str, shape: tuple[int, ...], matrix: int) -> Tensor:
        """One whole matrix of codes or block scales [..., height, K], of fewer rows than it decodes to."""
        height, width = self._files[key].entries[key].info.shape[-2:]
        return self._columns(key, width, (*shape[:-2], height, width), matrix, range(height))

    def _scales(
        self, key: str, scaled: Fp8Weight, shape: tuple[int, ...], matrices: range, rows: range
    ) -> Tensor:
        """float32 scales of the blocks that hold these rows, as [matrices, block rows, block columns]."""
        if scaled.shared:
            one = Fp8Weight(scaled.key, scaled.block)
            return self._scales(key, one, shape[-2:], range(1), rows).expand(len(matrices), -1, -1)
        grid = scaled.grid(shape)
        blocks = range(rows.start // scaled.block[0], -(-rows.stop // scaled.block[0]))
        dtype = self._files[scaled.key].entries[scaled.key].info.dtype
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
            self._files[key].read(key, out, matrices.start * tall * size)
            return
        for matrix, block in zip(matrices, out.view(len(matrices), len(rows), -1), strict=True):
            self._files[key].read(key, block, (matrix * tall + rows.start) * size)


def _dequantized(weight: Nvfp4Weight, codes: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """float32 [rows, K]; SourceError if a scale is no number."""
    values = nvfp4.dequantize(nvfp4.Packed(codes.contiguous(), scale.contiguous(), scale_2))
    if not bool(torch.isfinite(values).all()):
        raise SourceError(f"{weight.weight}: {weight.scale} or {weight.scale_2} holds NaN or Inf")
    return values


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
