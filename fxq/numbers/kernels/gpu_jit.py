"""The Triton kernel: one lane owns one block of 16 and holds it in registers; a program is one warp, so lanes
wait only for the 31 beside them.

Losses are compared in float32 with a bound on their error. Where the bound leaves more than one candidate,
the block is decided in float64, by the operations of `eager` in their order: the results are the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _load(w, at, sk, live, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The 16 weights of each lane's block as float32; `at` is the offset of the first."""
    v = ()
    if WIDE:
        words = (w + at).to(tl.pointer_type(tl.int64))
        for i in tl.static_range(8 if DTYPE.is_fp32() else 4):
            word = tl.load(words + i, mask=live, other=0)
            for half in tl.static_range(2):
                pair = (word >> (32 * half)).to(tl.int32)
                if DTYPE.is_fp32():
                    v += (pair.to(tl.float32, bitcast=True),)
                elif DTYPE.is_bf16():
                    v += ((pair << 16).to(tl.float32, bitcast=True),)
                    v += ((pair & -65536).to(tl.float32, bitcast=True),)
                else:
                    v += ((pair & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
                    v += (((pair >> 16) & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    else:
        for i in tl.static_range(16):
            v += (tl.load(w + at + i * sk, mask=live, other=0).to(tl.float32),)
    return v


@triton.jit
def _value(code):
    """The positive e4m3 code int32 [n] as float32; exact, subnormals included."""
    return (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def _ceil_code(y):
    """The smallest code in 1..126 whose value is >= y, float32 [n] >= 0."""
    normal = (y.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20
    subnormal = tl.ceil(y * 512.0).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(y < 0.015625, subnormal, normal - 960), 1), 126)


@triton.jit
def _nearest_code(y):
    """The code of e4m3 nearest to y, float32 [n] in [2**-9, 448]; ties to even."""
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = (y + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(y < 0.015625, subnormal, normal)


@triton.jit
def _reciprocal(x, NATIVE: tl.constexpr):
    """1 / x to 2**-22, for normal x."""
    if NATIVE:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _near_losses(u, unit, code, CLIPPED: tl.constexpr, NATIVE: tl.constexpr):
    """Losses (in unit**2, float32 [n], nearly exact) of the codes before, at and after `code`, all >= 8.

    c - (c - x) is x on the e2m1 grid if c - x has the exponent of max(x, 1) * 2**22. Which of two
    neighbouring exponents makes no difference for x in [1.75, 2.25] and [3.5, 4.5], so neighbouring codes, a
    factor of 1.125 apart at most, share their c. It has a factor of 1 + 2**-7: else, for x just above 4.5 and
    the middle x just above 4, c - x would lie below the power of two that c reaches. Only the first CLIPPED
    codes may have x > 7.
    """
    value = ()
    r = ()
    minus_r = ()
    loss = ()
    for j in tl.static_range(3):
        value += (_value(code + (j - 1)),)
        r += (_reciprocal(value[j] * unit, NATIVE),)
        minus_r += (-r[j],)
        loss += (tl.zeros_like(unit + value[j]),)
    big = r[1] * 4227072.0  # (1 + 2**-7) * 2**22
    for i in tl.static_range(16):
        m = tl.abs(u[i])
        c = tl.maximum(m * big, 6291456.0)
        new = ()
        for j in tl.static_range(3):
            q = tl.fma(m, minus_r[j], c) - c  # minus the grid point
            if j < CLIPPED:
                q = tl.maximum(q, -6.0)
            e = tl.fma(m, r[j], q)
            new += (tl.fma(e, e, loss[j]),)
        loss = new
    return loss[0] * (value[0] * value[0]), loss[1] * (value[1] * value[1]), loss[2] * (value[2] * value[2])


@triton.jit
def _exact_square(magnitude, inverse, step):
    x = magnitude * inverse
    c = tl.maximum(x * 2251799813685248.0, 3377699720527872.0)  # 2**51, 1.5 * 2**51
    e = magnitude - tl.minimum(c - (c - x), 6.0) * step
    return e * e


@triton.jit
def _exact_loss(v, unit, code):
    """Squared error in float64 [n], the additions in the order of `nvfp4._loss`."""
    step = _value(code).to(tl.float64) * unit
    inverse = 1.0 / step
    level = ()
    for i in tl.static_range(8):
        level += (
            _exact_square(tl.abs(v[i]).to(tl.float64), inverse, step)
            + _exact_square(tl.abs(v[i + 8]).to(tl.float64), inverse, step),
        )
    return ((level[0] + level[4]) + (level[2] + level[6])) + ((level[1] + level[5]) + (level[3] + level[7]))


@triton.jit
def _keep(loss, code, best, least, second):
    """The two least losses, and the code of the least."""
    best = tl.where(loss < least, code, best)
    return best, tl.minimum(least, loss), tl.minimum(second, tl.maximum(loss, least))


@triton.jit
def _search(u, amax, unit, live, NATIVE: tl.constexpr):
    """(code, its loss in unit**2, lowest and highest code tried, whether float64 must decide between them) of
    each block.
    """
    a = amax / unit
    first = _ceil_code(a * 0.16666667)
    regular = first >= 10
    start = tl.maximum(first, 10)
    high = (a * 0.28571457).to(tl.int32, bitcast=True) >> 20  # a / 3.5 * (1 + 1e-6), rounded down
    high = tl.minimum(tl.maximum(tl.maximum(high - 960, first), 15), 126)
    inf = tl.full(a.shape, float("inf"), tl.float32)
    l0, l1, l2 = _near_losses(u, unit, start - 1, 1, NATIVE)
    best, least, second = _keep(l0, start - 2, start, inf, inf)
    best, least, second = _keep(l1, start - 1, best, least, second)
    best, least, second = _keep(l2, start, best, least, second)
    for group in tl.static_range(2):
        mid = start + (2 + 3 * group)
        l0, l1, l2 = _near_losses(u, unit, mid, 0, NATIVE)
        best, least, second = _keep(tl.where(mid - 1 <= high, l0, inf), mid - 1, best, least, second)
        best, least, second = _keep(tl.where(mid <= high, l1, inf), mid, best, least, second)
        best, least, second = _keep(tl.where(mid + 1 <= high, l2, inf), mid + 1, best, least, second)
    low = start - 2
    needed = live & regular & (a < float("inf"))
    floor = a * 0.999999 - tl.sqrt(least) * 1.00001  # below floor / 6, clipping alone loses more
    needed = needed & (_value(low - 1) * 6.0 >= floor) & (low > 8)
    while tl.max(needed.to(tl.int32), 0) > 0:
        l0, l1, l2 = _near_losses(u, unit, tl.maximum(low - 1, 9), 2, NATIVE)
        best, least, second = _keep(tl.where(needed, l1, inf), low - 1, best, least, second)
        low = tl.where(needed, low - 1, low)
        floor = a * 0.999999 - tl.sqrt(least) * 1.00001
        needed = needed & (_value(low - 1) * 6.0 >= floor) & (low > 8)
    # x is off by 2**-22 x, so a loss by 2**-21 |x| sqrt(loss) + 2**-19 loss + 2**-44 |x|**2, and |x| <= 4 a.
    error = 4.0 * a * tl.sqrt(second) * 4.76837158203125e-07 + second * 1.9073486328125e-06 + a * a * 1e-12
    irregular = (
        ~regular | (a > 2700.0) | (_value(low - 1) * 6.0 >= floor)
    )  # scales too small, or too far apart, for the above
    unsure = live & ((second - least <= 2.0 * error) | irregular) & (a > 0) & (a < float("inf"))
    return tl.where(a > 0, best, 1), least, tl.where(irregular, 1, low), high, unsure


@triton.jit
def _decide(v, unit, best, loss, low, high, unsure):
    """The code of least float64 loss from low to high where unsure, the smaller in ties, and its loss in
    unit**2.
    """
    unit = unit.to(tl.float64)
    code = low
    least = tl.full(best.shape, float("inf"), tl.float64)
    count = tl.max(tl.where(unsure, high - low, 0), 0)
    found = low
    j = 0
    while j <= count:
        exact = _exact_loss(v, unit, tl.minimum(code, 126))
        better = (exact < least) & (code <= high)
        found = tl.where(better, code, found)
        least = tl.where(better, exact, least)
        code += 1
        j += 1
    return tl.where(unsure, found, best), tl.where(unsure, (least / (unit * unit)).to(tl.float32), loss)


@triton.jit
def _packed(u, step, ERROR: tl.constexpr, ENERGY: tl.constexpr, NATIVE: tl.constexpr):
    """The 16 e2m1 codes of u / step (float32, rounded once) as int64 [n], element 0 in the lowest bits; if
    ERROR their squared error and if ENERGY the sum of u**2, float32 [n] in (step / 8)**2, else zeros.

    u holds no -0.0: a code's sign is u's. A code is the lowest bits of d's mantissa plus two an octave of d's
    exponent, which starts at 127 + 22 + 3, a multiple of 4, since x is 8 times the quotient.
    """
    eighth = step * 0.125
    r = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), eighth)
    lower = tl.zeros(step.shape, tl.int32)
    upper = tl.zeros(step.shape, tl.int32)
    error = tl.zeros(step.shape, tl.float32)
    energy = tl.zeros(step.shape, tl.float32)
    for i in tl.static_range(16):
        m = tl.abs(u[i])
        if NATIVE:
            # Markstein: with a correctly rounded reciprocal, one correction rounds the quotient correctly
            x = m * r
            x = tl.fma(tl.fma(x, -eighth, m), r, x)
        else:
            x = tl.div_rn(m, eighth)
        if ENERGY:
            energy = tl.fma(x, x, energy)
        clipped = tl.minimum(x, 48.0)
        octave = tl.maximum(clipped, 8.0).to(tl.int32, bitcast=True) & 0x7F800000
        octave = octave.to(tl.float32, bitcast=True)
        rounded = tl.fma(octave, 4194304.0, clipped)  # 2**22
        if ERROR:
            e = x - tl.fma(octave, -4194304.0, rounded)
            error = tl.fma(e, e, error)
        d = rounded.to(tl.int32, bitcast=True)
        sign = (u[i].to(tl.int32, bitcast=True) >> 28) & 8
        code = ((d + (d >> 22)) & 7) | sign
        if i < 8:
            lower |= code << (4 * i)
        else:
            upper |= code << (4 * i - 32)
    return (upper.to(tl.int64) << 32) | (lower.to(tl.int64) & 0xFFFFFFFF), error, energy


@triton.jit(
    do_not_specialize=["rows", "blocks", "ss", "sr", "sk"],
    do_not_specialize_on_alignment=["w", "scale_2", "scales", "packed", "sums", "bad"],
)
def quantize_blocks(
    w, scale_2, scales, packed, sums, bad, rows, blocks, ss, sr, sk,
    SEARCH: tl.constexpr, PACK: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    NATIVE: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """sums float64 [n, 2, programs], if SUMS: squared error and energy of what each program packs."""
    slice_ = tl.program_id(1).to(tl.int64)
    w += slice_ * ss
    unit = tl.load(scale_2 + slice_)
    # Powers of two move tiny tensors to where reciprocals are finite and nothing is subnormal; ratios stay.
    up = tl.where(unit < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2**-60, 2**64
    scaled = unit * up
    total = rows * blocks
    lane = tl.arange(0, LANES)
    error = tl.zeros((LANES,), tl.float32)
    energy = tl.zeros((LANES,), tl.float32)
    tile = 0
    while tile < TILES:
        if ROWS > 1:  # a tile of ROWS rows by LANES / ROWS blocks
            across = tl.cdiv(blocks, LANES // ROWS)
            part = tl.program_id(0) * TILES + tile
            row = part // across * ROWS + lane % ROWS
            block = part % across * (LANES // ROWS) + lane // ROWS
            live = (row < rows) & (block < blocks)
        else:
            n = (tl.program_id(0) * TILES + tile) * LANES + lane
            row, block = n // blocks, n % blocks
            live = n < total
        at = row.to(tl.int64) * sr + block.to(tl.int64) * (16 * sk)
        v = _load(w, at, sk, live, w.dtype.element_ty, WIDE)
        u = ()
        for i in tl.static_range(16):
            u += (tl.fma(v[i], up, 0.0),)  # -0.0 becomes 0.0
        amax = tl.abs(u[0])
        for i in tl.static_range(1, 16):
            amax = tl.maximum(amax, tl.abs(u[i]), propagate_nan=tl.PropagateNan.ALL)
        if tl.max((live & (amax * 0.0 + scaled * 0.0 != 0.0)).to(tl.int32), 0) > 0:  # infinite or NaN
            tl.store(bad, 1)
        if SEARCH:
            code, loss, low, high, unsure = _search(u, amax, scaled, live, NATIVE)
            if tl.max(unsure.to(tl.int32), 0) > 0:
                again = _load(w, at, sk, live, w.dtype.element_ty, WIDE)
                code, loss = _decide(again, unit, code, loss, low, high, unsure)
        else:
            ratio = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32) * scaled)
            ratio = tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)
            code = tl.where(amax > 0, _nearest_code(ratio), 0x38)
        out = slice_ * total + row.to(tl.int64) * blocks + block
        tl.store(scales + out, code.to(tl.uint8), mask=live)
        if PACK:
            value = _value(code)
            codes, lost, held = _packed(u, value * scaled, SUMS and not SEARCH, SUMS, NATIVE)
            tl.store(packed + out, codes, mask=live)
            if SUMS:
                eighths = value * value * 0.015625
                error += loss if SEARCH else lost * eighths
                energy += held * eighths
        tile += 1
    if SUMS:
        programs = tl.num_programs(0)
        sums += slice_ * 2 * programs + tl.program_id(0)
        square = unit.to(tl.float64) * unit.to(tl.float64)
        tl.store(sums, tl.sum(error, 0).to(tl.float64) * square)
        tl.store(sums + programs, tl.sum(energy, 0).to(tl.float64) * square)


@triton.jit(do_not_specialize=["width"])
def add_rows(sums, totals, width, WIDTH: tl.constexpr):
    """totals float64 [rows, width / WIDTH]: sums of WIDTH neighbours of sums [rows, width]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * WIDTH + tl.arange(0, WIDTH)
    values = tl.load(sums + row * width + column, mask=column < width, other=0.0)
    tl.store(totals + row * tl.num_programs(1) + part, tl.sum(values, 0))
