"""Encoded weight: codes, scales of their blocks, and how rows of it are decoded as they are read.

Whatever the format, a weight is a matrix of codes times the scales of its blocks, times one more number in
NVFP4; formats differ in what a code stands for, how a scale is written and how large a block is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers import nibbles

# So many numbers are held in float32 at a time.
_AT_ONCE = 1 << 22


class Elements(NamedTuple):
    """What codes stand for: `per` of them lie in one stored element, of one of `dtypes`; decode: stored
    [rows, n] -> float32 [rows, per * n], a tensor of its own."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    per: int
    decode: Callable[[Tensor], Tensor]


E4M3 = Elements("float8_e4m3fn", (torch.float8_e4m3fn,), 1, lambda codes: codes.to(torch.float32))
E2M1 = Elements("uint8", (torch.uint8, torch.int8), 2, nibbles.e2m1)
INT4 = Elements("int32", (torch.int32,), 8, nibbles.int4)


class ReadRows(Protocol):
    """What is stored: rows of one matrix of a tensor that is seen as matrices [height, width]."""

    def __call__(self, key: str, height: int, width: int, matrix: int, rows: range) -> Tensor: ...


@dataclass(frozen=True)
class TensorScale:
    """The tensor of a scale that a whole matrix has; each: one a matrix, not one for all; is_divisor: values
    are divided by it."""

    key: str
    each: bool = False
    is_divisor: bool = False


@dataclass(frozen=True)
class EncodedWeight:
    """A weight of shape [..., N, K].

    title: its format. codes: the tensor [..., N, K / per] that `elements` decodes. scales: the
    tensor [..., ceil(N / block[0]), ceil(K / block[1])], in any shape of as many numbers; bytes are powers of
    two, 2**(byte - 127). shared: all matrices have the scales of one. tensor_scale: one more factor.
    transposed: the weight is [..., K, N] to the model. stored_transposed: so lie codes and scales.
    """

    title: str
    codes: str
    elements: Elements
    shape: tuple[int, ...]
    scales: str
    block: tuple[int, int]
    shared: bool = False
    tensor_scale: TensorScale | None = None
    transposed: bool = False
    stored_transposed: bool = False

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape that the model knows."""
        *lead, height, width = self.shape
        return (*lead, width, height) if self.transposed else self.shape

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that it is made of."""
        one = () if self.tensor_scale is None else (self.tensor_scale.key,)
        return (self.codes, self.scales, *one)

    def parts(self, read: ReadRows) -> tuple[Tensor, Tensor]:
        """Codes [N, K] as they are stored, and float32 scales of their blocks, of a single matrix."""
        height, width = self.shape[-2:]
        grid = -(-height // self.block[0]), -(-width // self.block[1])
        codes = read(self.codes, height, width // self.elements.per, 0, range(height))
        return codes, as_numbers(read(self.scales, *grid, 0, range(grid[0])))

    def decode(self, read: ReadRows, matrix: int, rows: range, out: Tensor) -> None:
        """Fill `out` [rows, columns] with consecutive rows of one matrix, as the model has it. Products are
        taken in float32 and rounded once to the dtype of `out`; SourceError if a scale is NaN or Inf."""
        factor = self._factor(read, matrix)
        if not self.transposed:
            for part, lines in self._parts(rows):
                out[part] = self._values(read, matrix, lines, factor)
            return
        for part, lines in self._parts(range(self.shape[-2])):
            out[:, part] = self._values(read, matrix, lines, factor).mT[rows.start : rows.stop]

    def _parts(self, rows: range) -> Iterator[tuple[slice, range]]:
        """(where among these rows, which rows) of about so many numbers as may be held."""
        most = max(1, _AT_ONCE // max(self.shape[-1], 1))
        most = max(most, len(rows)) if self.stored_transposed else most
        for start in range(0, len(rows), most):
            lines = rows[start : start + most]
            yield slice(start, start + len(lines)), lines

    def _values(self, read: ReadRows, matrix: int, rows: range, factor: float | None) -> Tensor:
        """float32 [rows, K] of one matrix [N, K]."""
        height, width = self.shape[-2:]
        tall, wide = self.block
        values = self.elements.decode(
            self._stored(read, self.codes, height, width // self.elements.per, matrix, rows)
        )
        lines = range(rows.start // tall, -(-rows.stop // tall))
        scales = self._stored(
            read, self.scales, -(-height // tall), -(-width // wide), 0 if self.shared else matrix, lines
        )
        scales = as_numbers(scales) * (1.0 if factor is None else factor)
        if not bool(torch.isfinite(scales).all()):
            raise SourceError(f"{self.scales} holds NaN or Inf, so that {self.codes} cannot be decoded")
        if tall > 1:
            first = lines.start * tall
            scales = scales.repeat_interleave(tall, 0)[rows.start - first : rows.stop - first]
        if width % wide:
            return values.mul_(scales.repeat_interleave(wide, 1)[:, :width])
        values.unflatten(1, (-1, wide)).mul_(scales[..., None])
        return values

    def _stored(self, read: ReadRows, key: str, height: int, width: int, matrix: int, rows: range) -> Tensor:
        if self.stored_transposed:
            return read(key, width, height, matrix, range(width)).mT[rows.start : rows.stop]
        return read(key, height, width, matrix, rows)

    def _factor(self, read: ReadRows, matrix: int) -> float | None:
        if (scale := self.tensor_scale) is None:
            return None
        value = read(scale.key, 1, 1, matrix if scale.each else 0, range(1)).to(torch.float32)
        value = value.reciprocal() if scale.is_divisor else value
        if not bool(torch.isfinite(value).all()):
            raise SourceError(f"{scale.key} holds NaN or Inf, so that {self.codes} cannot be decoded")
        return float(value)


def as_numbers(scales: Tensor) -> Tensor:
    """float32: scales as they are stored, bytes being powers of two (e8m0)."""
    if scales.dtype in (torch.uint8, torch.int8):
        scales = scales.contiguous().view(torch.float8_e8m0fnu)
    return scales.to(torch.float32)
