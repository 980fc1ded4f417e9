"""The CPU kernel, compiled by numba on first use and kept on disk.

Sixteen neighbouring candidates are evaluated side by side in float64, so their losses need no sum across a
vector. The operations and their order are those of `eager`: the results are the same bits.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

_VALUES = np.zeros(127)
_VALUES[1:] = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()
_WINDOW = 16
_LAST = 126
_ALWAYS = 15  # half of a candidate up to this code may be none


def _jit(function: Callable[..., Any], signatures: list[str] | None = None) -> Any:
    try:
        return numba.njit(signatures, nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this directory nor the user's cache can be written
        return numba.njit(signatures, nogil=True, error_model="numpy")(function)


@_jit
def _square(w, inverse, scale):
    x = w * inverse
    c = max(x * 2.0**51, 1.5 * 2.0**51)
    e = w - min(c - (c - x), 6.0) * scale
    return e * e


@_jit
def _losses(w, inverse, scale, begin, loss):
    """Squared errors of the magnitudes w [16] at the candidates from `begin`, as many as `loss` holds."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    w8, w9, wa, wb, wc, wd, we, wf = w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15]
    for j in range(loss.shape[0]):
        i, s = inverse[begin + j], scale[begin + j]
        t0 = _square(w0, i, s) + _square(w8, i, s)
        t1 = _square(w1, i, s) + _square(w9, i, s)
        t2 = _square(w2, i, s) + _square(wa, i, s)
        t3 = _square(w3, i, s) + _square(wb, i, s)
        t4 = _square(w4, i, s) + _square(wc, i, s)
        t5 = _square(w5, i, s) + _square(wd, i, s)
        t6 = _square(w6, i, s) + _square(we, i, s)
        t7 = _square(w7, i, s) + _square(wf, i, s)
        loss[j] = ((t0 + t4) + (t2 + t6)) + ((t1 + t5) + (t3 + t7))


@_jit
def _floor_code(y):
    """The largest code whose value is <= y, 0 if none is."""
    if y >= 448.0:
        return _LAST
    if y < 2.0**-6:
        return int(y * 512)
    return (np.float64(y).view(np.int64) >> 49) - (1016 << 3)


@_jit
def _search(w, a, unit, scale, inverse, loss):
    """The code of least loss for magnitudes w [16] of maximum a; `loss` is scratch."""
    low = min(max(_floor_code(a / (6 * unit)) - 2, 1), _LAST + 1 - _WINDOW)
    high = low + _WINDOW - 1
    begin = low
    best, best_loss = _LAST, np.inf
    while True:
        _losses(w, inverse, scale, begin, loss)
        least = loss[0]
        for j in range(1, _WINDOW):
            least = min(least, loss[j])
        index = 0
        for j in range(_WINDOW):  # downwards and without branches: the smallest that reaches `least` remains
            index = index if loss[_WINDOW - 1 - j] != least else _WINDOW - 1 - j
        if least < best_loss or (least == best_loss and begin + index < best):
            best, best_loss = begin + index, least
        # From a / 3.5 on a candidate is no better than its half; below (a - sqrt U) / 6 clipping loses more
        if high < _LAST and (high < _ALWAYS or scale[high + 1] <= a * (1 / 3.5 * (1 + 1e-12))):
            begin = min(high + 1, _LAST + 1 - _WINDOW)
            high = begin + _WINDOW - 1
        elif low > 1 and scale[low - 1] >= (a - math.sqrt(best_loss)) * (1 / 6 * (1 - 1e-12)):
            begin = max(low - _WINDOW, 1)
            low = begin
        else:
            return best


@_jit
def _reaching(a, unit):
    """The code nearest to a / (6 * unit) in float32, ties to even; that of 1.0 for a = 0."""
    if a == 0:
        return 0x38
    ratio = min(max(a / (np.float32(6) * unit), np.float32(2.0**-9)), np.float32(448))
    if ratio < np.float32(2.0**-6):
        return int(np.rint(ratio * np.float32(512)))
    bits = np.float32(ratio).view(np.int32)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)


def _quantize_rows(rows, shift, scales, packed, sums, unit, search, pack):
    """Whether the rows [n, K] were finite. Writes e4m3 codes to scales uint8 [n, K/16] and, if `pack`, e2m1
    codes to packed uint8 [n, K/2] and (squared error, energy) to sums [2].

    rows: the bits of bfloat16 as int16, shift 16, or of float32 as int32, shift 0. unit: scale_2.
    """
    bits = np.empty(16, np.int32)
    values = bits.view(np.float32)
    w, loss = np.empty(16), np.empty(_WINDOW)
    scale = _VALUES * unit
    inverse = 1 / scale
    unit32 = np.float32(unit)
    codes = np.empty(16, np.uint8)
    error, energy = np.zeros(16), np.zeros(16)
    finite = True
    for r in range(rows.shape[0]):
        for b in range(rows.shape[1] // 16):
            largest = np.int32(0)  # magnitudes are in the order of their bits
            for i in range(16):
                bits[i] = np.int32(rows[r, 16 * b + i]) << shift
                largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
            finite &= largest < 0x7F800000
            a = np.int32(largest).view(np.float32)
            if search:
                for i in range(16):
                    w[i] = abs(values[i])
                code = _search(w, np.float64(a), unit, scale, inverse, loss)
            else:
                code = _reaching(a, unit32)
            scales[r, b] = code
            if pack:
                step = np.float32(_VALUES[code]) * unit32
                square = np.float64(step) * np.float64(step)
                for i in range(16):
                    v = values[i]
                    exact = abs(v) / step
                    x = min(exact, np.float32(6))
                    c = np.float32(2.0**22 if x < 2 else 2.0**23 if x < 4 else 2.0**24)
                    q = (c + x) - c
                    magnitude = min(min(2 * q, q + 2), np.float32(0.5) * q + 4)
                    codes[i] = np.uint8(magnitude) | (8 if v < 0 else 0)
                    error[i] += np.float64((exact - q) * (exact - q)) * square
                    energy[i] += np.float64(exact * exact) * square
                for i in range(8):
                    packed[r, 8 * b + i] = codes[2 * i] | (codes[2 * i + 1] << 4)
    sums[0], sums[1] = error.sum(), energy.sum()
    return finite


# Compiled for these alone; results may be columns of a larger tensor.
_REST = "i4, u1[:, :], u1[:, :], f8[::1], f8, b1, b1"
quantize_rows = _jit(_quantize_rows, [f"b1({rows}[:, ::1], {_REST})" for rows in ("i2", "i4")])


@_jit
def _round_row(t, u, unit, low, middle, high, best_q, best_e, q, e, left):
    """(code, loss) of the best of the scales low..high for one row, those from `middle` on tried first: see
    `kernels.round_block`. What it rounds to goes to best_q, the errors to best_e; q, e, left are scratch."""
    best, best_loss = low, np.float32(np.inf)
    for number in range(high - low + 1):
        code = middle + number if middle + number <= high else high - number  # one that is good comes first
        step = np.float32(_VALUES[code]) * unit
        inverse = np.float32(1) / step
        loss = np.float32(0)
        for k in range(16):
            left[k] = t[k]
        for k in range(16):
            x = min(abs(left[k]) * inverse, np.float32(6))
            c = np.float32(2.0**22 if x < 2 else 2.0**23 if x < 4 else 2.0**24)
            r = ((c + x) - c) * step
            if left[k] < 0:
                r = -r
            error = (left[k] - r) / u[k, k]
            q[k], e[k] = r, error
            loss += error * error
            if loss > best_loss:
                break
            for j in range(k + 1, 16):
                left[j] -= error * u[k, j]
        if loss < best_loss or (loss == best_loss and code < best):
            best, best_loss = code, loss
            for k in range(16):
                best_q[k], best_e[k] = q[k], e[k]
    return best, best_loss


def _round_block(t, u, unit, near, begin, end, q, e, codes, losses):
    """The rows of one weight's block t [R, 16]: see `kernels.round_block`. near: codes [R], or [0] if the
    window lies about the one that reaches the maximum."""
    row_q, row_e, left = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    for r in range(t.shape[0]):
        if len(near):
            middle = np.int64(near[r])
        else:
            largest = np.float32(0)
            for k in range(16):
                largest = max(largest, abs(t[r, k]))
            middle = np.int64(_reaching(largest, unit))
        low, high = max(middle + begin, 1), min(middle + end, _LAST)
        start = min(max(middle, low), high)
        codes[r], losses[r] = _round_row(t[r], u, unit, low, start, high, q[r], e[r], row_q, row_e, left)


round_rows = _jit(
    _round_block,
    ["void(f4[:, ::1], f4[:, ::1], f4, u1[::1], i8, i8, f4[:, ::1], f4[:, ::1], u1[::1], f4[::1])"],
)


@_jit
def _weighted_loss(w, a, gram, step):
    """d G d^T of rounding w [16] of maximum a with a step, in float64."""
    d = np.empty(16)
    for i in range(16):
        x = min(abs(w[i]) / step, 6.0)
        c = 2.0**51 if x < 2 else 2.0**52 if x < 4 else 2.0**53
        d[i] = abs(w[i]) - ((c + x) - c) * step
        if w[i] < 0:
            d[i] = -d[i]
    loss = 0.0
    for i in range(16):
        t = 0.0
        for j in range(16):
            t += gram[i, j] * d[j]
        loss += t * d[i]
    return loss


def _weighted_rows(rows, gram, least, unit, scales):
    """Codes, to scales uint8 [R, K/16], of least d G d^T for rows f4 [R, K]; gram f8 [K/16, 16, 16]; least:
    a lower bound of each G's eigenvalues, f8 [K/16]."""
    w = np.empty(16)
    for r in range(rows.shape[0]):
        for b in range(rows.shape[1] // 16):
            a = 0.0
            for i in range(16):
                w[i] = np.float64(rows[r, 16 * b + i])
                a = max(a, abs(w[i]))
            if a == 0:
                scales[r, b] = 0x38
                continue
            start = min(max(_floor_code(a / (6 * unit)), 1), _LAST)
            best, best_loss = start, _weighted_loss(w, a, gram[b], _VALUES[start] * unit)
            for code in range(start + 1, _LAST + 1):
                if _VALUES[code - 1] * unit >= 4 * a:  # all is zero under that one already
                    break
                loss = _weighted_loss(w, a, gram[b], _VALUES[code] * unit)
                if loss < best_loss:
                    best, best_loss = code, loss
            for code in range(start - 1, 0, -1):
                clipped = a - 6 * _VALUES[code] * unit
                if clipped > 0 and least[b] * clipped * clipped > best_loss:
                    break
                loss = _weighted_loss(w, a, gram[b], _VALUES[code] * unit)
                if loss <= best_loss:
                    best, best_loss = code, loss
            scales[r, b] = best


weighted_rows = _jit(_weighted_rows, ["void(f4[:, ::1], f8[:, :, ::1], f8[::1], f8, u1[:, ::1])"])
