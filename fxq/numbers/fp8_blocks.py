"""FP8 in blocks, as DeepSeek-V3 has it: e4m3 codes and a float32 scale for 128 x 128 weights, for 128 inputs
of a token; value = code * scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers.fp8 import codes as rounded
from fxq.numbers.kernels.eager import E4M3_MAX

BLOCK = 128


@dataclass(frozen=True)
class Packed:
    """A quantized weight: `weight` float8_e4m3fn [..., rows, K], `scale` f32 [..., rows / 128, K / 128],
    rounded up."""

    weight: Tensor
    scale: Tensor

    def part(self, index: int, rows: slice) -> "Packed":
        """Some rows of one of the weights, from the first of a block on."""
        start, stop, _ = rows.indices(self.weight.shape[-2])
        assert start % BLOCK == 0
        return Packed(self.weight[index, rows], self.scale[index, start // BLOCK : -(-stop // BLOCK)])


@dataclass(frozen=True)
class Measured(Packed):
    """A quantized weight and what it lost: `error` sum (w - w')**2 and `energy` sum w**2 over the last two
    dimensions, float64 [...]."""

    error: Tensor
    energy: Tensor


def quantize_weight(w: Tensor, amax: Tensor, scale: str = "max") -> Packed:
    """Quantize weights `[..., rows, K]` so that each block's largest value is 448 times its scale; a block of
    zeros has scale 1. The amax of a weight says nothing: there is no scale above those of blocks.

    Raises SourceError if a weight is infinite or NaN: the caller knows its name.
    """
    if not bool(torch.isfinite(w).all()):
        raise SourceError("expected finite weights, found an infinite one or NaN")
    rows, width = w.shape[-2:]
    padded = torch.nn.functional.pad(w.abs().float(), (0, -width % BLOCK, 0, -rows % BLOCK))
    largest = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).amax((-3, -1))
    scales = torch.where(largest > 0, largest, E4M3_MAX) / E4M3_MAX
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    return Packed(rounded(w, _spread(scales, rows, width)), scales)


def quantize_measured(w: Tensor, amax: Tensor, scale: str = "max") -> Measured:
    """`quantize_weight` with errors and energies."""
    return _measured(w, quantize_weight(w, amax, scale))


def decided(w: Tensor, amax: Tensor, codes: Tensor, scales: Tensor | None = None) -> Measured:
    """Weights [..., rows, K] as these codes float8_e4m3fn and scales f32 of 128 x 128 say."""
    if scales is None:
        raise ValueError("expected scales of blocks with FP8 codes, found none")
    return _measured(w, Packed(codes, scales))


def dequantize(packed: Packed) -> Tensor:
    """float32 [..., rows, K]: `code * scale`."""
    rows, width = packed.weight.shape[-2:]
    return packed.weight.to(torch.float32) * _spread(packed.scale, rows, width)


def fake_quantize(t: Tensor, amax: Tensor, scale: str = "max") -> Tensor:
    """What remains of `t`, its own shape and dtype: of a weight [rows, K] ("max"), of inputs [..., K] under a
    scale for 128 of each token ("dynamic"), as kernels find it: the largest magnitude / 448."""
    if scale != "dynamic":
        return dequantize(quantize_weight(t, amax)).to(t.dtype)
    groups = t.unflatten(-1, (-1, BLOCK)).to(torch.float32)
    step = (groups.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (rounded(groups, step).to(torch.float32) * step).flatten(-2).to(t.dtype)


def _spread(scales: Tensor, rows: int, width: int) -> Tensor:
    """Scales of blocks as one a weight."""
    return scales.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :width]


def _measured(w: Tensor, packed: Packed) -> Measured:
    exact = w.to(torch.float64)
    error = (dequantize(packed).to(torch.float64) - exact).square().sum((-2, -1))
    return Measured(packed.weight, packed.scale, error, exact.square().sum((-2, -1)))
