"""References for NVFP4 numbers in numpy, written from docs/checkpoint_contract.md (section 1) alone.

Everything is evaluated in float64 unless a function takes `dtype`: the contract pins `weight_scale_2`, the
max recipe's block scales and the codes to fp32 arithmetic (that is what reproduces ModelOpt byte for byte),
so byte comparisons need fp32 and optimality proofs need float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

BLOCK = 16
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SIGNED_E2M1 = np.concatenate([E2M1, -E2M1])
# Midpoints of neighbours: at an odd index the upper neighbour has the even mantissa, so a tie goes up.
MIDPOINTS = (E2M1[1:] + E2M1[:-1]) / 2
MAX_FINITE_CODE = 0x7E
NAN_CODE = 0x7F


def e4m3_decode(codes: Array) -> Array:
    """uint8 e4m3fn bit patterns to float64, any shape.

    s eeee mmm, bias 7: (1 + m/8) * 2**(e - 7); e = 0 is m/8 * 2**-6; no infinities; s1111111 is NaN (OCP
    OFP8).
    """
    bits = np.asarray(codes, dtype=np.uint8).astype(np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    magnitude = np.where((exponent == 15) & (mantissa == 7), np.nan, magnitude)
    return np.where(bits & 128, -magnitude, magnitude)


E4M3 = e4m3_decode(np.arange(256, dtype=np.uint8))
POSITIVE_E4M3 = E4M3[
    1 : MAX_FINITE_CODE + 1
]  # the 126 candidates, ascending; the value of code c is at c - 1


def e4m3_codes(x: Array) -> Array:
    """uint8 codes of `e4m3_round(x)`, the shape of x: 1..126 only.

    x is clamped to [2**-9, 448], then rounded to nearest, ties to the even code (even mantissa). NaN is
    refused.
    """
    values = np.asarray(x, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("expected block scales that are numbers, found NaN")
    values = np.clip(values, POSITIVE_E4M3[0], POSITIVE_E4M3[-1])
    below = np.searchsorted(POSITIVE_E4M3, values, side="right")  # the largest code whose value is <= x
    above = np.minimum(below + 1, MAX_FINITE_CODE)
    down, up = values - POSITIVE_E4M3[below - 1], POSITIVE_E4M3[above - 1] - values
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return np.where(take_up, above, below).astype(np.uint8)


def e4m3_round(x: Array) -> Array:
    """float64: the nearest positive e4m3fn value to x clamped to [2**-9, 448], ties to even mantissa."""
    return e4m3_decode(e4m3_codes(x))


def weight_scale_2(amax: float, fp8_max: int = 448) -> np.float32:
    """float32(amax) * float32(1 / (6 * fp8_max)) in fp32; fp8_max is 448, or 256 for four-over-six."""
    scale = np.float32(amax) * np.float32(1.0 / (6 * fp8_max))
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"expected an amax whose scale is finite and positive, found amax {amax!r}")
    return np.float32(scale)


def pack(codes: Array) -> Array:
    """uint8 codes 0..15 [N, K] to bytes [N, K/2]: low nibble = even k, high nibble = odd k (section 1)."""
    nibbles = np.asarray(codes, dtype=np.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)


def unpack(packed: Array) -> Array:
    """Bytes [N, K/2] to uint8 codes 0..15 [N, K]; the inverse of `pack`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def dequantize(packed: Array, scale: Array, scale_2: float) -> Array:
    """float64 [N, K] of packed uint8 [N, K/2], e4m3 bytes uint8 [N, K/16] and the fp32 multiplier `scale_2`.

    W[n, k] = e2m1(code) * float(scale[n, k // 16]) * scale_2 (section 1); the product of the three is exact
    in float64.
    """
    n, half = packed.shape
    if (
        packed.dtype != np.uint8
        or scale.dtype.itemsize != 1
        or scale.shape != (n, half * 2 // BLOCK)
        or half % 8
    ):
        raise ValueError(f"expected u8 [N, K/2] and bytes [N, K/16], found {packed.shape} and {scale.shape}")
    values = SIGNED_E2M1[unpack(packed)].reshape(n, -1, BLOCK)
    return (values * e4m3_decode(scale.view(np.uint8))[:, :, None]).reshape(n, -1) * np.float64(scale_2)


def quantize_codes(w: Array, scale: Array, dtype: DTypeLike = np.float64) -> Array:
    """uint8 codes 0..15 (sign << 3 | index), the shape of w: nearest e2m1 of w / scale, ties to even.

    w [..., K]; scale [..., K/16] holds one positive multiplier a block (block scale * weight_scale_2), or is
    broadcast against w. Ties .25, 1.25, 2.5, 5 go down and .75, 1.75, 3.5 up; above 6 saturates; the sign bit
    is w < 0, so -0.0 gives 0 and a small negative value gives 8 (section 1). In float64 w is compared with
    the exact midpoint * scale (no division); in float32 the scale and the quotient are rounded first, as
    ModelOpt does.
    """
    w, scale = np.asarray(w, dtype=dtype), np.asarray(scale, dtype=dtype)
    if scale.ndim == w.ndim and scale.shape == (*w.shape[:-1], w.shape[-1] // BLOCK):
        scale = np.repeat(scale, BLOCK, axis=-1)
    if np.isnan(w).any() or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError("expected weights that are numbers and finite positive scales")
    magnitude, unit = np.abs(w), scale
    if np.dtype(dtype) != np.float64:
        magnitude, unit = magnitude / scale, np.ones((), dtype=dtype)
    index = np.zeros(w.shape, dtype=np.uint8)
    for i, midpoint in enumerate(MIDPOINTS.astype(dtype)):
        index += magnitude >= midpoint * unit if i % 2 else magnitude > midpoint * unit
    return index | (w < 0).astype(np.uint8) << 3


def max_block_scales(w: Array, amax: float, fp8_max: int = 448, dtype: DTypeLike = np.float32) -> Array:
    """uint8 e4m3 codes [N, K/16] of the max recipe for w [N, K] and the amax of its fusion group.

    fp8(clamp(amax_block / (6 * weight_scale_2), 2**-9, 448)); a block of zeros gets 1.0 (section 1). The
    product and the quotient are rounded to `dtype`; fp32 decides exact ties such as amax_block / amax =
    27/28.
    """
    block_amax = np.abs(_blocks(w)).max(axis=-1).astype(dtype)
    six = np.asarray(6, dtype=dtype) * np.asarray(weight_scale_2(amax, fp8_max), dtype=dtype)
    return e4m3_codes(np.where(block_amax == 0, np.asarray(1, dtype=dtype), block_amax / six))


def block_loss(w: Array, scale_codes: Array, amax: float, fp8_max: int = 448) -> Array:
    """float64 [N, K/16]: squared error of w [N, K] at the block scale codes uint8 [N, K/16]."""
    blocks = np.abs(_blocks(w))
    scale = e4m3_decode(scale_codes) * np.float64(weight_scale_2(amax, fp8_max))
    return _squared_error(blocks.reshape(-1, BLOCK), scale.reshape(-1, 1)).reshape(scale.shape)


@dataclass(frozen=True)
class Search:
    """The e4m3 code (uint8) and squared error (float64) of each block, [N, K/16]; `total` sums `loss`."""

    codes: Array
    loss: Array
    total: float


def search_all(w: Array, amax: float, fp8_max: int = 448, chunk: int = 4096) -> Search:
    """Brute force over all 126 positive e4m3 values for every block of 16 of w [N, K], in float64.

    scale = value * float32(amax * float32(1/2688)); the least squared error wins, ties to the smaller value,
    so a block of zeros gets 2**-9 (section 1). Works on `chunk` blocks at a time, so memory is that of w and
    the result.
    """
    blocks = _blocks(w)
    n, per_row = blocks.shape[:2]
    blocks = blocks.reshape(-1, BLOCK)
    unit = np.float64(weight_scale_2(amax, fp8_max))
    codes, loss = np.empty(len(blocks), dtype=np.uint8), np.empty(len(blocks))
    for start in range(0, len(blocks), chunk):
        part = np.abs(blocks[start : start + chunk].astype(np.float64))
        best_code, best = np.zeros(len(part), dtype=np.uint8), np.full(len(part), np.inf)
        for i, value in enumerate(POSITIVE_E4M3):
            error = _squared_error(part, value * unit)
            better = error < best
            best = np.where(better, error, best)
            best_code[better] = i + 1
        codes[start : start + chunk], loss[start : start + chunk] = best_code, best
    return Search(codes.reshape(n, per_row), loss.reshape(n, per_row), float(loss.sum()))


def _blocks(w: Array) -> Array:
    """[N, K] to [N, K/16, 16] in w's own dtype; K % 16 == 0 and finite values are required."""
    w = np.asarray(w)
    if w.ndim != 2 or w.shape[1] % BLOCK or not np.isfinite(w).all():
        raise ValueError(f"expected finite weights [N, K] with K a multiple of 16, found {w.shape}")
    return w.reshape(w.shape[0], -1, BLOCK)


def _squared_error(magnitudes: Array, scale: Array | np.float64) -> Array:
    """float64 [B] of magnitudes [B, 16], scale scalar or [B, 1]: sum of squared distances to the grid."""
    magnitudes = magnitudes.astype(np.float64, copy=False)
    nearest = magnitudes.copy()  # the distance to grid point 0
    for point in E2M1[1:]:
        np.minimum(nearest, np.abs(magnitudes - point * scale), out=nearest)
    loss: Array = np.square(nearest).sum(axis=-1)
    return loss
