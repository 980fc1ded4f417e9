"""Block scales and e2m1 codes on the CPU: each thread converts a cache's worth of rows and runs the compiled
kernel over it. Beside weight and result that needs a few hundred KB a thread.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxq.kernels.cpu_jit import quantize_rows
from fxq.kernels.eager import BLOCK

# Weights a thread converts to float32 at a time. Up to 2**15, torch converts in the calling thread.
CHUNK = 1 << 15
# Columns at a time where neighbours along a row are far apart: a cache line then serves several rows.
STRIDED_COLUMNS = 256


def quantize(
    w: Tensor, scale_2: Tensor, search: bool, pack: bool, measure: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(scales, packed or None, sums or None, whether everything was finite): see `kernels.quantize`.

    w [n, rows, K], bfloat16, float16 or float32, any strides; scale_2 f32 [n]. Uses as many threads as torch.
    """
    n, rows, width = w.shape
    scales = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8)
    packed = torch.empty(n, rows, width // 2 if pack else 0, dtype=torch.uint8)
    units = scale_2.detach().tolist()
    across = min(width, CHUNK if w.stride(-1) == 1 else STRIDED_COLUMNS)
    down = max(1, CHUNK // max(1, across))

    starts = (range(n), range(0, rows, down), range(0, width, max(1, across)))
    parts = list(itertools.product(*starts))
    sums = np.zeros((len(parts), 2))  # as good as free, so always there

    def part(number: int) -> bool:
        index, row, column = parts[number]
        values = w[index, row : row + down, column : column + across].detach().to(torch.float32).contiguous()
        outputs = (
            out[index, row : row + down, column // weights : (column + across) // weights]
            for out, weights in ((scales, BLOCK), (packed, 2))
        )
        arrays = (t.numpy() for t in (values, values.view(torch.int32), *outputs))
        return bool(quantize_rows(*arrays, sums[number], units[index], search, pack))

    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        done = [part(number) for number in range(len(parts))]
    else:
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(part, range(len(parts))))
    finite = all(done) and bool(torch.isfinite(scale_2).all())
    return scales, packed if pack else None, _totals(sums, n) if measure else None, finite


def _totals(sums: NDArray[np.float64], n: int) -> Tensor:
    """float64 [2, n] of pairs [parts, 2], as many for each slice, added exactly."""
    by_slice = sums.reshape(n, len(sums) // max(1, n), 2)
    totals = [[math.fsum(pairs[:, i].tolist()) for pairs in by_slice] for i in range(2)]
    return torch.tensor(totals, dtype=torch.float64)
