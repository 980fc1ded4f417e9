"""Learned rounding: e2m1 codes and FP8 block scales that follow gradients.

A weight that was rounded to the code q, under the step s (block scale times scale_2), is held as a point z in
units of s, as near w / s as the interval that rounds to q has. Rounding z + v d, d the width of that interval
and v from 0 within [-1/2, 1/2], begins at q and reaches its neighbours (SignRound, arXiv 2309.05516). The
block scale is s exp(r) in FP8, r from 0, and z keeps its place when it moves. To gradients a rounding is the
identity (arXiv 1308.3432).
"""

import torch
from torch import Tensor

from fxq.numbers.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, Packed, dequantize, pack, round_e2m1

# How near a point may begin to the ends of its interval, as a share of the width.
_MARGIN = 0.05
_LEAST_SCALE = 2.0**-9


class LearnedWeights:
    """Weights [n, R, K] that begin as `packed` has them.

    w: [n, R, K], before they were rounded. codes, scales: which of the two may move. v, r: float32 [n, R, K]
    and [n, R, K/16], the tensors that gradients are wanted for; None for what may not move.
    """

    def __init__(self, w: Tensor, packed: Packed, *, codes: bool, scales: bool) -> None:
        self.scale_2 = packed.scale_2
        self.scale = packed.scale.to(torch.float32)
        units = Packed(packed.weight, torch.ones_like(packed.scale), torch.ones_like(packed.scale_2))
        self.z, self.width = dequantize(units), torch.zeros(())
        if codes:
            low, high = _interval(self.z)
            self.width = high - low
            wanted = w.to(torch.float32) / self._spread(self.scale * self.scale_2[:, None, None])
            inner = _MARGIN * self.width
            self.z = torch.minimum(torch.maximum(wanted, low + inner), high - inner)
        self.v = torch.zeros_like(self.z, requires_grad=True) if codes else None
        self.r = torch.zeros_like(self.scale, requires_grad=True) if scales else None

    def values(self) -> Tensor:
        """The weights as rounded now, float32 [n, R, K]; gradients flow to v and r."""
        q, scale = self._now()
        return q * self._spread(scale * self.scale_2[:, None, None])

    @torch.no_grad()
    def packed(self) -> tuple[Tensor, Tensor]:
        """The same, as codes uint8 [n, R, K/2] and block scales float8_e4m3fn [n, R, K/16]."""
        scale = self._now()[1].to(torch.float8_e4m3fn)
        return pack(self.values(), scale, self.scale_2), scale

    @torch.no_grad()
    def limit(self) -> None:
        """Bring what was moved too far back to where a neighbour is reached."""
        if self.v is not None:
            self.v.clamp_(-0.5, 0.5)

    def _now(self) -> tuple[Tensor, Tensor]:
        """(points on the e2m1 grid [n, R, K], block scales [n, R, K/16])."""
        z, scale = self.z, self.scale
        if self.v is not None:
            z = z + self.v * self.width
        if self.r is not None:
            scale = (scale * self.r.exp()).clamp(_LEAST_SCALE, E4M3_MAX)
            scale = _through(scale, scale.to(torch.float8_e4m3fn).to(torch.float32))
            z = z if self.v is None else z * self._spread(self.scale / scale)
        if self.v is None:
            return z, scale
        z = z.clamp(-E2M1_MAX, E2M1_MAX)
        return _through(z, torch.copysign(round_e2m1(z.abs()), z)), scale

    def _spread(self, blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(BLOCK, -1)


def _interval(q: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of what rounds to points q of the e2m1 grid."""
    size = q.abs()
    below = torch.where(size <= 2, 0.5, torch.where(size <= 4, 1.0, 2.0)) / 2  # half of the gap toward zero
    above = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)) / 2
    above = torch.where(size < E2M1_MAX, above, 0.0)
    inner, outer = size - below, size + above
    is_negative = q < 0
    return torch.where(is_negative, -outer, inner), torch.where(is_negative, -inner, outer)


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over rows [..., K] of |found - wanted|^2 / |wanted|^2, f32 []: a row of large values counts as
    any other, and one without any as one of a millionth of the mean energy."""
    wanted = wanted.flatten(0, -2).to(torch.float32)
    energy = wanted.square().sum(-1)
    least = 1e-6 * energy.mean() + torch.finfo(torch.float32).tiny
    lost = (found.flatten(0, -2).to(torch.float32) - wanted).square().sum(-1)
    return (lost / energy.clamp_min(least)).mean()
