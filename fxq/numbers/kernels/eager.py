"""Block scales and e2m1 codes by torch operators, on any device: what serves where no kernel does, and the
plainest statement of what the kernels compute.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
_SEARCH_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def e4m3_values(device: torch.device | str = "cpu") -> Tensor:
    """The 126 positive finite float8_e4m3fn values in ascending order, float64; value `i` has the code `i
    + 1`."""
    codes = torch.arange(1, 127, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).to(torch.float64)


def round_e2m1(magnitude: Tensor) -> Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 (ties to the even mantissa, saturating) for magnitudes >=
    0."""
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(magnitude.dtype)
    return ((magnitude / step).round() * step).clamp_max(E2M1_MAX)


def quantize(
    w: Tensor, scale_2: Tensor, search: bool, pack: bool, measure: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(scales, packed or None, sums or None, whether everything was finite): see `kernels.quantize`.

    w [n, rows, K], any dtype and strides; scale_2 f32 [n].
    """
    n, rows, width = w.shape
    scales = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8, device=w.device)
    packed = torch.empty(n, rows, width // 2 if pack else 0, dtype=torch.uint8, device=w.device)
    sums = torch.zeros(2, n, dtype=torch.float64, device=w.device)
    finite = torch.isfinite(scale_2).all()
    for index in range(n):
        for part in _row_chunks(w[index]):
            values, unit = w[index, part], scale_2[index]
            scale = _searched(values, unit) if search else _reaching(values, unit)
            scales[index, part] = scale.view(torch.uint8)
            if pack:
                magnitudes = _magnitudes(values, scale, unit)
                packed[index, part] = _joined(magnitudes, values)
                if measure:
                    sums[:, index] += _sums(values, magnitudes, scale.to(torch.float64) * unit)
            finite = finite & torch.isfinite(values).all()
    return scales, packed if pack else None, sums if measure else None, bool(finite)


def round_block(
    t: Tensor, u: Tensor, scale_2: Tensor, near: Tensor | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.round_block`: all scales of the window side by side."""
    if near is None:
        reach = t.abs().amax(-1) / (E2M1_MAX * scale_2[:, None])
        reach = torch.where(reach > 0, reach.clamp(E4M3_TINY, E4M3_MAX), torch.ones_like(reach))
        near = reach.to(torch.float8_e4m3fn).view(torch.uint8)
    offsets = torch.arange(window[0], window[1] + 1, device=t.device)[:, None, None]
    codes = (near.int() + offsets).clamp(1, 126)  # [candidates, n, R]
    values = e4m3_values(t.device).to(torch.float32)
    step = values[codes - 1] * scale_2[:, None]
    left = t.expand(len(codes), *t.shape).clone()
    q, errors = torch.empty_like(left), torch.empty_like(left)
    for k in range(BLOCK):
        x = left[..., k]
        q[..., k] = torch.copysign(round_e2m1(x.abs() / step) * step, x)
        errors[..., k] = (x - q[..., k]) / u[:, k, k, None]
        left[..., k + 1 :] -= errors[..., k, None] * u[:, None, k, k + 1 :]
    losses = errors.square().sum(-1)
    best = losses.argmin(0, keepdim=True)
    rows = best[..., None].expand(-1, -1, -1, BLOCK)
    chosen = codes.gather(0, best)[0].to(torch.uint8)
    return q.gather(0, rows)[0], errors.gather(0, rows)[0], chosen, losses.gather(0, best)[0]


def weighted_scales(w: Tensor, scale_2: Tensor, gram: Tensor, least: Tensor) -> Tensor:
    """See `kernels.weighted_scales`: every scale is tried, whatever `least` is."""
    n, rows, width = w.shape
    codes = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8, device=w.device)
    candidates = e4m3_values(w.device)
    for index in range(n):
        for part in _row_chunks(w[index]):
            blocks = w[index, part].to(torch.float64).unflatten(-1, (-1, BLOCK))
            best = torch.full(blocks.shape[:-1], torch.inf, dtype=torch.float64, device=w.device)
            found = torch.full(best.shape, 0x38, dtype=torch.uint8, device=w.device)
            for code, value in enumerate(candidates, 1):
                step = value * scale_2[index].to(torch.float64)
                d = blocks - torch.copysign(round_e2m1(blocks.abs() / step) * step, blocks)
                loss = ((d.transpose(0, 1) @ gram[index]) * d.transpose(0, 1)).sum(-1).T
                is_better = loss < best
                best, found[is_better] = torch.where(is_better, loss, best), code
            found[blocks.abs().amax(-1) == 0] = 0x38
            codes[index, part] = found
    return codes


def pack_rows(rows: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """e2m1 codes of `rows / (scale * scale_2)` [rows, K], two a byte: uint8 [rows, K/2]."""
    return _joined(_magnitudes(rows, scale, scale_2), rows)


def _magnitudes(rows: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """|rows| on the e2m1 grid, in units of `scale * scale_2`: float32 [rows, K/16, 16]."""
    blocks = rows.unflatten(-1, (-1, BLOCK)).to(torch.float32)
    step = scale.to(torch.float32) * scale_2
    return round_e2m1(blocks.abs() / step[..., None])


def _joined(q: Tensor, rows: Tensor) -> Tensor:
    """The codes of magnitudes q on the e2m1 grid with the signs of `rows`, two a byte."""
    code = torch.where(q < 2, 2 * q, torch.where(q < 4, q + 2, q / 2 + 4)).to(torch.uint8).flatten(-2)
    code |= (rows < 0).to(torch.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4)


def _sums(rows: Tensor, q: Tensor, step: Tensor) -> Tensor:
    """float64 [2]: squared error of the magnitudes q in steps of each block, and sum rows**2."""
    exact = rows.unflatten(-1, (-1, BLOCK)).to(torch.float64).abs()
    error = (q * step[..., None] - exact).square_().sum()
    return torch.stack([error, exact.square_().sum()])


def _reaching(rows: Tensor, scale_2: Tensor) -> Tensor:
    block_amax = rows.unflatten(-1, (-1, BLOCK)).abs().amax(-1).to(torch.float32)
    scale = block_amax / (E2M1_MAX * scale_2)
    scale = torch.where(block_amax > 0, scale.clamp(E4M3_TINY, E4M3_MAX), torch.ones_like(scale))
    return scale.to(torch.float8_e4m3fn)


def _searched(rows: Tensor, scale_2: Tensor) -> Tensor:
    """Codes of least loss, each block's found in a bracket of candidates.

    With `a` a block's maximum and U the loss of the smallest candidate >= a/6, a candidate s below
    (a - sqrt U)/6 loses more than U by clipping alone, and one >= a/3.5 is no better than its half.
    """
    blocks = rows.reshape(-1, BLOCK).to(torch.float64).abs()
    candidates, unit = e4m3_values(rows.device), scale_2.to(torch.float64)
    amax = blocks.amax(-1)
    first = torch.searchsorted(candidates, amax / (E2M1_MAX * unit)).clamp_max(len(candidates) - 1)
    best, best_loss = first.clone(), _loss(blocks, candidates[first] * unit)
    low = torch.searchsorted(candidates, (amax - best_loss.sqrt()) / (E2M1_MAX * unit) * (1 - 1e-12))
    # Up to 15 * 2**-9 (index 14) halving may leave the FP8 grid, so those candidates are always tried.
    high = (torch.searchsorted(candidates, amax / (3.5 * unit) * (1 + 1e-12)) - 1).clamp_min(14)
    owner = torch.arange(len(low), device=low.device)
    index = low
    while len(owner):
        open_ = index <= high
        if 3 * int(open_.sum()) < 2 * len(
            owner
        ):  # gathering costs as much as a candidate: do it when it pays
            owner, index, high, blocks = owner[open_], index[open_], high[open_], blocks[open_]
            continue
        loss = _loss(blocks, candidates[index.clamp_max(len(candidates) - 1)] * unit)
        loss = torch.where(index <= high, loss, torch.inf)
        old, old_loss = best[owner], best_loss[owner]
        better = (loss < old_loss) | ((loss == old_loss) & (index < old))
        best[owner] = torch.where(better, index, old)
        best_loss[owner] = torch.where(better, loss, old_loss)
        index = index + 1
    codes = (best + 1).to(torch.uint8)
    return codes.reshape(rows.shape[0], -1).view(torch.float8_e4m3fn)


def _loss(blocks: Tensor, scale: Tensor) -> Tensor:
    """Squared error float64 [n] of rounding magnitudes [n, 16] to e2m1 times `scale` [n]; a fixed tree of
    additions.

    c - (c - x) is x on the e2m1 grid if c has the exponent of max(x, 1) * 2**51, whose last bit is x's step.
    """
    x = blocks * scale.reciprocal()[:, None]
    c = (x * 2.0**51).clamp_min(1.5 * 2.0**51)
    grid = (c - (c - x)).clamp_max(E2M1_MAX)
    error = (blocks - grid * scale[:, None]).square_()
    for width in (8, 4, 2, 1):
        error = error[:, :width] + error[:, width : 2 * width]
    return error[:, 0]


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    """Row ranges whose temporaries stay small (a few MB on the CPU), whatever the size of the weight."""
    elements = _SEARCH_ELEMENTS.get(rows.device.type, _SEARCH_ELEMENTS["cpu"])
    step = max(1, elements // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
