"""MXFP4 into NVFP4 without rounding: e2m1 codes under powers of two stay what they are.

A block of 32 in MXFP4 is e2m1 times 2^k (OCP Microscaling Formats v1.0). Under a scale of its tensor 2^(m -
8), m being the largest of the ks, 2^k is the block scale 2^(k - m + 8), which e4m3 holds exactly if m - k is
17 or less. The ks are found from the values: with the smallest power of two under which the largest value is
at most 6, all others are on the e2m1 grid too, as every value of at most 3 on a grid is on the grid half as
coarse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers import nvfp4

# Powers of two that e4m3 holds.
_LEAST, _MOST = -9, 8
# The smallest normal float32, which no scale of a tensor falls below.
_SMALLEST = -126


@dataclass(frozen=True)
class Cast(nvfp4.Measured):
    """A weight in NVFP4; inexact: how many of its blocks of 16 do not decode to what they were, int64
    [...]."""

    inexact: Tensor


def cast(w: Tensor, amax: Tensor) -> Cast:
    """Weights [n, rows, K] under the amax f32 [n] of each one's group; all scales are powers of two.

    A block whose scale e4m3 cannot hold gets the smallest, 2^-9, and its values are rounded to nearest.
    Raises SourceError if a weight or an amax is infinite or NaN.
    """
    if not bool(torch.isfinite(amax).all()) or not bool(torch.isfinite(w).all()):
        raise SourceError("expected finite weights and amaxes, found an infinite one or NaN")
    unit = (_exponent(amax) - _MOST).clamp_min(_SMALLEST)
    scale_2 = torch.ldexp(torch.ones_like(amax), unit)
    parts = [_cast(*one) for one in zip(w, unit, scale_2, strict=True)]
    codes, scales, errors, energies, inexact = (torch.stack(column) for column in zip(*parts, strict=True))
    return Cast(codes, scales, scale_2, errors, energies, inexact)


def _cast(w: Tensor, unit: Tensor, scale_2: Tensor) -> tuple[Tensor, ...]:
    """codes, block scales, squared error, energy and the count of inexact blocks of one weight [rows, K]."""
    largest = w.unflatten(-1, (-1, nvfp4.BLOCK)).abs().amax(-1).to(torch.float32)
    power = torch.where(largest > 0, (_exponent(largest) - unit).clamp(_LEAST, _MOST), 0)
    scales = torch.ldexp(torch.ones_like(largest), power).to(torch.float8_e4m3fn)
    codes = nvfp4.pack(w, scales, scale_2)
    lost = nvfp4.dequantize(nvfp4.Packed(codes, scales, scale_2)).to(torch.float64) - w.to(torch.float64)
    inexact = (lost != 0).unflatten(-1, (-1, nvfp4.BLOCK)).any(-1).sum()
    return codes, scales, lost.square().sum(), w.to(torch.float64).square().sum(), inexact


def _exponent(largest: Tensor) -> Tensor:
    """int32: the smallest k with 6 * 2^k >= largest, of f32 > 0."""
    mantissa, exponent = torch.frexp(largest)  # mantissa in [1/2, 1); 6 * 2^k is 3/4 * 2^(k + 3)
    return exponent - 3 + (mantissa > 0.75).to(torch.int32)
