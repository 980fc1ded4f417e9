"""Triton kernels for losses in which the errors of a block's columns count together: one lane owns one block,
and the lanes of a program share its matrix, which stays in the L1 cache.

The operations are those of `cpu_jit` in their order, without fused multiply-adds: the results are the same
bits. Both search in one loop, so that what is unrolled there is compiled once.
"""

import triton
import triton.language as tl

from fxq.numbers.kernels.gpu_jit import _ceil_code, _nearest_code, _value


@triton.jit(do_not_specialize=["rows", "begin", "end"])
def round_rows(
    t, u, scale_2, near, q, e, codes, losses, rows, begin, end,
    NEAR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """t, q, e f32 [n, rows, 16]; u f32 [n, 16, 16]; codes, near uint8 and losses f32 [n, rows]."""
    slice_ = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = row < rows
    column = tl.arange(0, 16)
    at = slice_ * rows + row
    block = at[:, None] * 16 + column[None, :]
    u += slice_ * 256
    unit = tl.load(scale_2 + slice_)
    values = tl.load(t + block, mask=live[:, None], other=0.0)
    if NEAR:
        middle = tl.load(near + at, mask=live, other=1).to(tl.int32)
    else:
        amax = tl.max(tl.abs(values), 1)
        ratio = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32) * unit)
        ratio = tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)
        middle = tl.where(amax > 0.0, _nearest_code(ratio), 0x38)
    low = tl.maximum(middle + begin, 1)
    high = tl.minimum(middle + end, 126)
    best = low
    least = tl.full((LANES,), float("inf"), tl.float32)
    last = end - begin + 1
    j = 0
    while j <= last:  # all scales of the window, and then the best of them once more
        code = tl.where(j == last, best, tl.minimum(low + j, high))
        step = _value(code) * unit
        inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
        left = values
        rounded = values
        errors = values
        loss = tl.zeros((LANES,), tl.float32)
        k = 0
        while k < 16:
            is_own = column[None, :] == k
            v = tl.sum(tl.where(is_own, left, 0.0), 1)
            x = tl.minimum(tl.abs(v) * inverse, 6.0)
            c = tl.where(x < 2.0, 4194304.0, tl.where(x < 4.0, 8388608.0, 16777216.0))  # 2**22, 2**23, 2**24
            r = ((c + x) - c) * step
            r = tl.where(v < 0.0, -r, r)
            error = tl.div_rn(v - r, tl.load(u + 17 * k) + tl.zeros_like(step))
            loss += error * error
            moved = left - error[:, None] * tl.load(u + 16 * k + column)[None, :]
            left = tl.where(column[None, :] > k, moved, left)
            rounded = tl.where(is_own, r[:, None], rounded)
            errors = tl.where(is_own, error[:, None], errors)
            k += 1
        if j == last:
            tl.store(q + block, rounded, mask=live[:, None])
            tl.store(e + block, errors, mask=live[:, None])
        is_better = loss < least
        best = tl.where(is_better, code, best)
        least = tl.where(is_better, loss, least)
        j += 1
    tl.store(codes + at, best.to(tl.uint8), mask=live)
    tl.store(losses + at, least, mask=live)


@triton.jit
def _weighted_loss(w, gram, step):
    """d G d^T of rounding w, 16 float64 values of each lane, with a step."""
    d = ()
    for i in tl.static_range(16):
        m = tl.abs(w[i])
        x = tl.minimum(m / step, 6.0)
        # 2**51, 2**52, 2**53
        c = tl.where(x < 2.0, 2251799813685248.0, tl.where(x < 4.0, 4503599627370496.0, 9007199254740992.0))
        c = c.to(tl.float64)
        lost = m - ((c + x) - c) * step
        d += (tl.where(w[i] < 0.0, -lost, lost),)
    loss = tl.zeros_like(step)
    for i in tl.static_range(16):
        row = tl.zeros_like(step)
        for j in tl.static_range(16):
            row += tl.load(gram + (16 * i + j)) * d[j]
        loss += row * d[i]
    return loss


@triton.jit(do_not_specialize=["rows", "blocks", "ss", "sr", "sk"])
def weighted_rows(w, scale_2, gram, least, codes, rows, blocks, ss, sr, sk, LANES: tl.constexpr):
    """w [n, rows, 16 blocks]; gram float64 [n, blocks, 16, 16]; least float64 [n, blocks]; codes uint8
    [n, rows, blocks]. A program has one column of blocks."""
    slice_, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    live = row < rows
    gram += (slice_ * blocks + block) * 256
    bound = tl.load(least + slice_ * blocks + block)
    unit = tl.load(scale_2 + slice_).to(tl.float64)
    values = ()
    for k in tl.static_range(16):
        at = w + slice_ * ss + row * sr + (16 * block + k) * sk
        values += (tl.load(at, mask=live, other=0.0).to(tl.float64),)
    amax = tl.abs(values[0])
    for k in tl.static_range(1, 16):
        amax = tl.maximum(amax, tl.abs(values[k]))
    # Where the search begins changes nothing but how long it takes.
    start = _ceil_code((amax / (6.0 * unit)).to(tl.float32))
    best = start
    lowest = tl.full(amax.shape, float("inf"), tl.float64)
    code = start
    is_up = live
    going = live & (amax > 0.0)
    while tl.max(going.to(tl.int32), 0) > 0:  # from `start` upwards, then downwards from below it
        loss = _weighted_loss(values, gram, _value(code).to(tl.float64) * unit)
        is_better = going & ((loss < lowest) | ((loss == lowest) & (code < best)))
        best = tl.where(is_better, code, best)
        lowest = tl.where(is_better, loss, lowest)
        # under a step of 4 amax all is zero already
        is_up &= (code < 126) & (_value(code).to(tl.float64) * unit < 4.0 * amax)
        code = tl.where(is_up, code + 1, tl.minimum(code, start) - 1)
        clipped = amax - 6.0 * _value(tl.maximum(code, 1)).to(tl.float64) * unit
        going &= is_up | ((code >= 1) & ((clipped <= 0.0) | (bound * clipped * clipped <= lowest)))
        code = tl.maximum(code, 1)
    best = tl.where(amax > 0.0, best, 0x38)
    tl.store(codes + (slice_ * rows + row) * blocks + block, best.to(tl.uint8), mask=live)
