"""Decoding of every number format that a checkpoint may hold, with numpy, from the formats' definitions.

e2m1 and e4m3fn: OCP Microscaling Formats v1.0 and OCP 8-bit Floating Point v1.0.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if code & 128 else value


def _e2m1(code: int) -> float:
    return -_MAGNITUDES[code & 7] if code & 8 else _MAGNITUDES[code]


E4M3 = np.array([_e4m3(code) for code in range(256)], dtype=np.float32)
# A byte holds an even element in its low nibble and the next one in its high nibble.
_PAIRS = np.array([(_e2m1(byte & 15), _e2m1(byte >> 4)) for byte in range(256)], dtype=np.float32)


def decode(raw: Array, dtype: str) -> Array:
    """Stored elements of a safetensors dtype as float32; float64 and integers as they are."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.astype(np.float32)
    return E4M3[raw] if dtype == "F8_E4M3" else raw


def scales(raw: Array, dtype: str) -> Array:
    """Stored scales as float32; bytes are powers of two, 2**(byte - 127), and NaN for 255 (e8m0)."""
    if dtype not in ("U8", "F8_E8M0"):
        return decode(raw, dtype)
    return np.where(raw == 255, np.nan, np.exp2(raw.astype(np.float32) - 127)).astype(np.float32)


def nvfp4(packed: Array, scales: Array, multiplier: float) -> Array:
    """float32 [..., K] of packed codes uint8 [..., K/2] and e4m3 codes uint8 [..., K/16]."""
    codes = _PAIRS[packed].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):  # broken scales are what the caller looks for
        values = codes * (E4M3[scales] * np.float32(multiplier))[..., None]
    return values.reshape(*packed.shape[:-1], -1)


def saturated(packed: Array) -> int:
    """How many of the codes are 6 or -6."""
    low, high = np.count_nonzero(packed & 0x07 == 0x07), np.count_nonzero(packed & 0x70 == 0x70)
    return int(low + high)


def squares(reference: Array, found: Array) -> tuple[float, float]:
    """(sum w**2, sum (w - w')**2) in float64; the second may be inf or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = reference.astype(np.float64) - found
        return float(np.square(reference, dtype=np.float64).sum()), float(np.square(error).sum())


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, NaN or -inf where the noise is."""
    if not math.isfinite(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
