"""Per-tensor FP8: e4m3 codes and one float32 scale, `amax / 448`; value = code * scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers.kernels.eager import E4M3_MAX


@dataclass(frozen=True)
class Packed:
    """A quantized weight: `weight` float8_e4m3fn [..., rows, K], `scale` f32 [...]."""

    weight: Tensor
    scale: Tensor

    def part(self, index: int, rows: slice) -> "Packed":
        """Some rows of one of the weights."""
        return Packed(self.weight[index, rows], self.scale[index])


@dataclass(frozen=True)
class Measured(Packed):
    """A quantized weight and what it lost: `error` sum (w - w')**2 and `energy` sum w**2 over the last two
    dimensions, float64 [...]."""

    error: Tensor
    energy: Tensor


def scale_of(amax: Tensor) -> Tensor:
    """`amax / 448` as float32, never zero: a decode multiplier."""
    amax = amax.to(torch.float32)
    amax = torch.where(amax > 0, amax, torch.ones_like(amax))
    return (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def codes(t: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn: the nearest value of `t / scale`, ties to even, saturating at 448."""
    return (t.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_weight(w: Tensor, amax: Tensor, scale: str = "max") -> Packed:
    """Quantize weights `[..., rows, K]` given each one's (or its group's) amax f32 `[...]`. It alone says
    the scale: "max" is the one way to choose it.

    Raises SourceError if a weight or an amax is infinite or NaN: the caller knows its name.
    """
    step = scale_of(amax)
    if not (torch.isfinite(w).all() and torch.isfinite(step).all()):
        raise SourceError("expected finite weights and amaxes, found an infinite one or NaN")
    return Packed(codes(w, step[..., None, None]), step)


def quantize_measured(w: Tensor, amax: Tensor, scale: str = "max") -> Measured:
    """`quantize_weight` with errors and energies."""
    return _measured(w, quantize_weight(w, amax, scale))


def _measured(w: Tensor, packed: Packed) -> Measured:
    exact = w.to(torch.float64)
    error = (dequantize(packed).to(torch.float64) - exact).square().sum((-2, -1))
    return Measured(packed.weight, packed.scale, error, exact.square().sum((-2, -1)))


def decided(w: Tensor, amax: Tensor, codes: Tensor, scales: Tensor | None = None) -> Measured:
    """Weights [..., rows, K] as these codes float8_e4m3fn of the same shape say, under each one's amax f32
    [...]."""
    if scales is not None:
        raise ValueError("expected FP8 codes alone, found block scales with them")
    return _measured(w, Packed(codes, scale_of(amax)))


def dequantize(packed: Packed) -> Tensor:
    """float32 [..., rows, K]: `code * scale`."""
    return packed.weight.to(torch.float32) * packed.scale[..., None, None]


def fake_quantize(t: Tensor, amax: Tensor, scale: str = "max") -> Tensor:
    """What remains of `t` under one FP8 scale, its own shape and dtype; weights ("max") and inputs ("static")
    alike."""
    step = scale_of(amax)
    return (codes(t, step).to(torch.float32) * step).to(t.dtype)
