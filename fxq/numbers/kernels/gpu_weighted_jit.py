"""Triton kernels for losses in which the errors of a block's columns count together: one lane owns one block of
16, and all lanes of a program share the block's matrix, which stays in the L1 cache.

The operations are those of `cpu_jit` in their order, without fused multiply-adds: the results are the same bits.
"""

import triton
import triton.language as tl

from fxq.numbers.kernels.gpu_jit import _ceil_code, _nearest_code, _value


@triton.jit
def _feedback(t, u, step, inverse):
    """(q, errors, loss) of a block t, 16 values of each lane, under a step: see `kernels.round_block`."""
    left = t
    q = ()
    e = ()
    loss = tl.zeros_like(step)
    for k in tl.static_range(16):
        x = tl.minimum(tl.abs(left[k]) * inverse, 6.0)
        c = tl.where(x < 2.0, 4194304.0, tl.where(x < 4.0, 8388608.0, 16777216.0))  # 2**22, 2**23, 2**24
        r = ((c + x) - c) * step
        r = tl.where(left[k] < 0.0, -r, r)
        error = tl.div_rn(left[k] - r, tl.load(u + 17 * k) + tl.zeros_like(step))
        loss += error * error
        moved = ()
        for j in tl.static_range(16):
            if j > k:
                moved += (left[j] - error * tl.load(u + (16 * k + j)),)
            else:
                moved += (left[j],)
        left = moved
        q += (r,)
        e += (error,)
    return q, e, loss


@triton.jit
def _step(code, unit):
    step = _value(code) * unit
    return step, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)


@triton.jit(do_not_specialize=["rows", "begin", "end"])
def round_rows(
    t, u, scale_2, near, q, e, codes, losses, rows, begin, end,
    NEAR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """t, q, e f32 [n, rows, 16]; u f32 [n, 16, 16]; codes, near uint8 and losses f32 [n, rows]."""
    slice_ = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = row < rows
    at = slice_ * rows + row
    u += slice_ * 256
    unit = tl.load(scale_2 + slice_)
    values = ()
    for k in tl.static_range(16):
        values += (tl.load(t + at * 16 + k, mask=live, other=0.0),)
    if NEAR:
        middle = tl.load(near + at, mask=live, other=1).to(tl.int32)
    else:
        amax = tl.abs(values[0])
        for k in tl.static_range(1, 16):
            amax = tl.maximum(amax, tl.abs(values[k]))
        ratio = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32) * unit)
        ratio = tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)
        middle = tl.where(amax > 0.0, _nearest_code(ratio), 0x38)
    low = tl.maximum(middle + begin, 1)
    high = tl.minimum(middle + end, 126)
    best = low
    least = tl.full((LANES,), float("inf"), tl.float32)
    j = 0
    while j <= end - begin:
        code = tl.minimum(low + j, high)
        step, inverse = _step(code, unit)
        _, _, loss = _feedback(values, u, step, inverse)
        is_better = loss < least
        best = tl.where(is_better, code, best)
        least = tl.where(is_better, loss, least)
        j += 1
    step, inverse = _step(best, unit)
    rounded, errors, loss = _feedback(values, u, step, inverse)
    for k in tl.static_range(16):
        tl.store(q + at * 16 + k, rounded[k], mask=live)
        tl.store(e + at * 16 + k, errors[k], mask=live)
    tl.store(codes + at, best.to(tl.uint8), mask=live)
    tl.store(losses + at, loss, mask=live)


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
    lowest = _weighted_loss(values, gram, _value(start).to(tl.float64) * unit)
    code = start + 1
    open_ = live & (amax > 0.0)
    going = open_ & (code <= 126) & (_value(code - 1).to(tl.float64) * unit < 4.0 * amax)
    while tl.max(going.to(tl.int32), 0) > 0:  # under a step of 4 amax all is zero already
        loss = _weighted_loss(values, gram, _value(code).to(tl.float64) * unit)
        is_better = going & (loss < lowest)
        best = tl.where(is_better, code, best)
        lowest = tl.where(is_better, loss, lowest)
        code = tl.minimum(code + 1, 127)
        going &= (code <= 126) & (_value(code - 1).to(tl.float64) * unit < 4.0 * amax)
    code = start - 1
    going = open_ & (code >= 1)
    while tl.max(going.to(tl.int32), 0) > 0:
        step = _value(tl.maximum(code, 1)).to(tl.float64) * unit
        clipped = amax - 6.0 * step
        going &= (clipped <= 0.0) | (bound * clipped * clipped <= lowest)
        loss = _weighted_loss(values, gram, step)
        is_better = going & (loss <= lowest)
        best = tl.where(is_better, code, best)
        lowest = tl.where(is_better, loss, lowest)
        code -= 1
        going &= code >= 1
    best = tl.where(amax > 0.0, best, 0x38)
    tl.store(codes + (slice_ * rows + row) * blocks + block, best.to(tl.uint8), mask=live)
