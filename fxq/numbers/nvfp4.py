"""The NVFP4 number format: e2m1 codes, FP8 block scales, one FP32 scale a tensor; rounding, packing and the
scale search.

A weight row is cut into blocks of 16. Element k of block b decodes to `e2m1(code) * scale[b] * scale_2`,
where `scale` is a positive float8_e4m3fn and `scale_2 = amax / (6 * 448)` is shared by a whole tensor or
fusion group. Every function takes weights `[..., rows, K]` with amax `[...]`: a whole fused weight is one
call.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxq.numbers import kernels, nibbles
from fxq.numbers.kernels.eager import BLOCK, E2M1_MAX, E4M3_MAX, e4m3_values, pack_rows, round_e2m1

__all__ = [
    "BLOCK",
    "E2M1_MAX",
    "E4M3_MAX",
    "Measured",
    "Packed",
    "dequantize",
    "e4m3_values",
    "fake_quantize",
    "fake_quantize_activation",
    "global_scale",
    "max_scales",
    "mse_scales",
    "pack",
    "quantize_measured",
    "quantize_weight",
    "reaching_scales",
    "round_e2m1",
]

_RECIPROCAL = torch.tensor(1 / (E2M1_MAX * E4M3_MAX), dtype=torch.float32)
# The smallest positive e4m3 value.
_LEAST_SCALE = 2.0**-9
# An all-zero tensor decodes to zeros under any scale; engines want a positive one.
_ZERO_AMAX = 1.0


@dataclass(frozen=True)
class Packed:
    """A quantized weight: `weight` uint8 [..., rows, K/2], `scale` float8_e4m3fn [..., rows, K/16],
    `scale_2` f32 [...]."""

    weight: Tensor
    scale: Tensor
    scale_2: Tensor

    def part(self, index: int, rows: slice) -> "Packed":
        """Some rows of one of the weights."""
        return Packed(self.weight[index, rows], self.scale[index, rows], self.scale_2[index])


@dataclass(frozen=True)
class Measured(Packed):
    """A quantized weight and what it lost: `error` sum (w - w')**2 and `energy` sum w**2 over the last two
    dimensions, float64 [...]; neither depends on the weights beside it."""

    error: Tensor
    energy: Tensor


def global_scale(amax: Tensor) -> Tensor:
    """`amax / 2688` as float32, never zero: weight_scale_2 and input_scale of the checkpoint contract.

    It is a product with the float32 reciprocal, not a division: that is what the deployed tools compute, to
    the bit.
    """
    amax = amax.to(torch.float32)
    amax = torch.where(amax == 0, torch.full_like(amax, _ZERO_AMAX), amax)
    return (amax * _RECIPROCAL.to(amax.device)).clamp_min(torch.finfo(torch.float32).tiny)


def max_scales(w: Tensor, scale_2: Tensor) -> Tensor:
    """Block scales that reach each block's maximum: `e4m3(clamp(block_amax / (6 * scale_2), 2**-9, 448))`.

    `w` [..., rows, K], `scale_2` f32 [...]; returns float8_e4m3fn [..., rows, K/16]. A zero block gets 1.0.
    Raises SourceError if a weight is infinite or NaN.
    """
    return _quantize(w, scale_2, "max", pack=False)[0]


def mse_scales(w: Tensor, scale_2: Tensor) -> Tensor:
    """Block scales of least squared error: the best of all 126 FP8 candidates, ties to the smaller.

    `w` [..., rows, K], `scale_2` f32 [...]; returns float8_e4m3fn [..., rows, K/16]. Losses are compared in
    float64 and summed in a fixed order, so that every device chooses alike; `kernels` says which candidates
    need no trying. Raises SourceError if a weight is infinite or NaN.
    """
    return _quantize(w, scale_2, "mse", pack=False)[0]


def reaching_scales(block_amax: Tensor, scale_2: Tensor) -> Tensor:
    """The block scales of `max_scales` for blocks of these maxima: float8_e4m3fn [n, blocks] of f32
    [n, blocks] and f32 [n]."""
    reach = block_amax / (E2M1_MAX * scale_2[:, None])
    return reach.clamp(_LEAST_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)


def pack(w: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """e2m1 codes of `w / (scale * scale_2)`, two a byte along K (even k in the low nibble): uint8 [...,
    rows, K/2].

    The sign bit is `w < 0`: -0.0 gives code 0, a small negative value that rounds to zero gives code 8.
    """
    if w.dim() > 2:  # what it takes in float32 is there for one at a time
        return torch.stack([pack(*each) for each in zip(w, scale, scale_2, strict=True)])
    return pack_rows(w, scale, scale_2)


def quantize_weight(w: Tensor, amax: Tensor, scale: str) -> Packed:
    """Quantize weights `[..., rows, K]` given each one's (or its group's) amax f32 `[...]`.

    `scale` says how block scales are chosen: "max" reaches each block's maximum, "mse" searches for least
    error. One launch, whatever the number of slices. Raises SourceError if a weight or an amax is infinite or
    NaN: the caller knows its name.
    """
    scale_2 = global_scale(amax)
    block_scale, packed, _ = _quantize(w, scale_2, scale, pack=True)
    assert packed is not None
    return Packed(packed, block_scale, scale_2)


def quantize_measured(w: Tensor, amax: Tensor, scale: str) -> Measured:
    """`quantize_weight` with errors and energies, summed in the same launch."""
    scale_2 = global_scale(amax)
    block_scale, packed, sums = _quantize(w, scale_2, scale, pack=True, measure=True)
    assert packed is not None
    assert sums is not None
    return Measured(packed, block_scale, scale_2, *sums.reshape(2, *w.shape[:-2]))


def decided(w: Tensor, amax: Tensor, codes: Tensor, scales: Tensor | None) -> Measured:
    """Weights [..., rows, K] as these codes uint8 [..., rows, K/2] and block scales float8_e4m3fn
    [..., rows, K/16] say, under each one's amax f32 [...]."""
    if scales is None:
        raise ValueError("expected block scales with NVFP4 codes, found none")
    packed = Packed(codes, scales, global_scale(amax))
    sums = torch.zeros(2, *w.shape[:-2], dtype=torch.float64, device=w.device)
    for index in itertools.product(*map(range, w.shape[:-2])):  # in float64 one at a time
        exact = w[index].to(torch.float64)
        lost = (
            dequantize(Packed(codes[index], scales[index], packed.scale_2[index])).to(torch.float64) - exact
        )
        sums[(0, *index)], sums[(1, *index)] = lost.square().sum(), exact.square().sum()
    return Measured(codes, scales, packed.scale_2, sums[0], sums[1])


def _quantize(
    w: Tensor, scale_2: Tensor, scale: str, *, pack: bool, measure: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    slices = w.reshape(w.shape[:-2].numel(), *w.shape[-2:])
    search = {"max": False, "mse": True}[scale]
    codes, packed, sums = kernels.quantize(
        slices, scale_2.reshape(-1), search=search, pack=pack, measure=measure
    )
    codes = codes.view(torch.float8_e4m3fn).reshape(*w.shape[:-1], w.shape[-1] // BLOCK)
    return codes, None if packed is None else packed.reshape(*w.shape[:-1], w.shape[-1] // 2), sums


def dequantize(packed: Packed) -> Tensor:
    """float32 [..., rows, K]: `e2m1(code) * (scale * scale_2)`."""
    step = packed.scale.to(torch.float32) * packed.scale_2[..., None, None]
    return (_blocks(nibbles.e2m1(packed.weight)) * step[..., None]).flatten(-2)


def fake_quantize(t: Tensor, amax: Tensor, scale: str) -> Tensor:
    """What remains of `t`, its own shape and dtype, given amax f32 []: of a weight [rows, K] whose block
    scales are chosen by "max" or "mse", of activations [..., K] whose are "dynamic"."""
    if scale == "dynamic":
        return fake_quantize_activation(t, amax)
    return dequantize(quantize_weight(t, amax, scale)).to(t.dtype)


def fake_quantize_activation(x: Tensor, amax: Tensor) -> Tensor:
    """What an NVFP4 kernel sees of activations [..., K]: block scale e4m3(block_amax / 6 / input_scale),
    then e2m1."""
    input_scale = global_scale(amax)
    blocks = _blocks(x).to(torch.float32)
    scale = (blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / input_scale).clamp_max(E4M3_MAX)
    step = scale.to(torch.float8_e4m3fn).to(torch.float32) * input_scale
    q = round_e2m1(blocks.abs() / torch.where(step > 0, step, 1.0)) * step
    return torch.copysign(q, blocks).flatten(-2).to(x.dtype)


def _blocks(w: Tensor) -> Tensor:
    return w.unflatten(-1, (w.shape[-1] // BLOCK, BLOCK))
