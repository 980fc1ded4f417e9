"""Block scales and e2m1 codes on the CPU: threads take parts of the weight from one queue and run the
compiled kernel over them, on bfloat16 and float32 as they lie, on others after converting a cache's worth.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxq.numbers.kernels.cpu_jit import quantize_rows, round_rows, weighted_rows
from fxq.numbers.kernels.eager import BLOCK

# About so many weights are a part: enough for Python's share of its time to be small.
PART = 1 << 18
# Of what must be converted first, fewer: up to 2**15, torch converts in the calling thread.
CONVERTED = 1 << 15
# Columns at a time where neighbours along a row are far apart: a cache line then serves several rows.
STRIDED_COLUMNS = 256
# How the kernel takes dtypes, and the shift that makes float32 of their bits.
_AS_BITS = {torch.bfloat16: (torch.int16, 16), torch.float32: (torch.int32, 0)}


def quantize(
    w: Tensor, scale_2: Tensor, search: bool, pack: bool, measure: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(scales, packed or None, sums or None, whether everything was finite): see `kernels.quantize`.

    w [n, rows, K], bfloat16, float16 or float32, any strides; scale_2 f32 [n]. Uses as many threads as torch.
    """
    w = w.detach()
    n, rows, width = w.shape
    scales = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8)
    packed = torch.empty(n, rows, width // 2 if pack else 0, dtype=torch.uint8)
    units = scale_2.detach().tolist()
    down, across = _part_shape(w)
    starts = (range(n), range(0, rows, down), range(0, width, across))
    parts = list(itertools.product(*starts))
    sums = np.zeros((len(parts), 2))  # as good as free, so always there

    def part(number: int) -> bool:
        index, row, column = parts[number]
        values = w[index, row : row + down, column : column + across]
        if values.dtype not in _AS_BITS or not values.is_contiguous():
            values = values.to(torch.float32).contiguous()
        bits, shift = _AS_BITS[values.dtype]
        scale, codes = (
            out[index, row : row + down, column // weights : (column + across) // weights].numpy()
            for out, weights in ((scales, BLOCK), (packed, 2))
        )
        raw = values.view(bits).numpy()
        return bool(quantize_rows(raw, shift, scale, codes, sums[number], units[index], search, pack))

    finite = _all(part, len(parts)) and bool(torch.isfinite(scale_2).all())
    return scales, packed if pack else None, _totals(sums, n) if measure else None, finite


def round_block(
    t: Tensor, u: Tensor, scale_2: Tensor, near: Tensor | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.round_block`."""
    n, rows, _ = t.shape
    q, e = torch.empty_like(t), torch.empty_like(t)
    codes, losses = torch.empty(n, rows, dtype=torch.uint8), torch.empty(n, rows)
    middle = torch.empty(n, 0, dtype=torch.uint8) if near is None else near
    units, at_once = scale_2.numpy(), PART // BLOCK
    parts = list(itertools.product(range(n), range(0, rows, at_once)))

    def part(number: int) -> bool:
        i, row = parts[number]
        own = slice(row, row + at_once)
        rows_of = [each[i, own].numpy() for each in (t, q, e, codes, losses, middle)]
        t_, q_, e_, codes_, losses_, middle_ = rows_of
        round_rows(t_, u[i].numpy(), units[i], middle_, *window, q_, e_, codes_, losses_)
        return True

    _all(part, len(parts))
    return q, e, codes, losses


def weighted_scales(w: Tensor, scale_2: Tensor, gram: Tensor, least: Tensor) -> Tensor:
    """See `kernels.weighted_scales`."""
    n, rows, width = w.shape
    codes = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8)
    units, at_once = scale_2.tolist(), max(1, CONVERTED // width)
    parts = list(itertools.product(range(n), range(0, rows, at_once)))

    def part(number: int) -> bool:
        i, row = parts[number]
        values = w[i, row : row + at_once].to(torch.float32).contiguous().numpy()
        weighted_rows(
            values, gram[i].numpy(), least[i].numpy(), units[i], codes[i, row : row + at_once].numpy()
        )
        return True

    _all(part, len(parts))
    return codes


def _part_shape(w: Tensor) -> tuple[int, int]:
    """Rows and columns of a part, which the shape and layout of a slice decide."""
    width = w.shape[-1]
    if w.dtype in _AS_BITS and w[:1].is_contiguous():
        return max(1, PART // max(1, width)), max(1, width)
    across = max(1, min(width, CONVERTED if w.stride(-1) == 1 else STRIDED_COLUMNS))
    return max(1, CONVERTED // across), across


def _all(part: Callable[[int], bool], count: int) -> bool:
    """Whether all parts are true; each is run, on as many threads as torch uses."""
    left = deque(range(count))

    def work() -> bool:
        good = True
        while left:
            try:
                number = left.popleft()
            except IndexError:  # another thread was faster
                break
            good &= part(number)
        return good

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        return all(pool.map(lambda _: work(), range(threads)))


def _totals(sums: NDArray[np.float64], n: int) -> Tensor:
    """float64 [2, n] of pairs [parts, 2], as many for each slice, added exactly."""
    by_slice = sums.reshape(n, len(sums) // max(1, n), 2)
    totals = [[math.fsum(pairs[:, i].tolist()) for pairs in by_slice] for i in range(2)]
    return torch.tensor(totals, dtype=torch.float64)
