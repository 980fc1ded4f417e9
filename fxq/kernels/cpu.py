"""Block scales and e2m1 codes on the CPU: each thread converts a cache's worth of rows and runs the compiled
kernel over it. Beside weight and result that needs a few hundred KB a thread.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fxq.kernels.cpu_jit import quantize_rows
from fxq.kernels.eager import BLOCK

# Weights a thread converts to float32 at a time. Up to 2**15, torch converts in the calling thread.
CHUNK = 1 << 15
# Columns at a time where neighbours along a row are far apart: a cache line then serves several rows.
STRIDED_COLUMNS = 256


def quantize(w: Tensor, scale_2: Tensor, search: bool, pack: bool) -> tuple[Tensor, Tensor | None, bool]:
    """(scales uint8 [n, rows, K/16], packed uint8 [n, rows, K/2] or None, whether everything was finite).

    w [n, rows, K], bfloat16, float16 or float32, any strides; scale_2 f32 [n]. Uses as many threads as torch.
    """
    n, rows, width = w.shape
    scales = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8)
    packed = torch.empty(n, rows, width // 2 if pack else 0, dtype=torch.uint8)
    units = scale_2.detach().tolist()
    across = min(width, CHUNK if w.stride(-1) == 1 else STRIDED_COLUMNS)
    down = max(1, CHUNK // max(1, across))

    def part(at: tuple[int, int, int]) -> bool:
        index, row, column = at
        values = w[index, row : row + down, column : column + across].detach().to(torch.float32).contiguous()
        outputs = (
            out[index, row : row + down, column // weights : (column + across) // weights]
            for out, weights in ((scales, BLOCK), (packed, 2))
        )
        arrays = (t.numpy() for t in (values, values.view(torch.int32), *outputs))
        return bool(quantize_rows(*arrays, units[index], search, pack))

    starts = (range(n), range(0, rows, down), range(0, width, max(1, across)))
    parts = list(itertools.product(*starts))
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        done = [part(at) for at in parts]
    else:
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(part, parts))
    finite = all(done) and bool(torch.isfinite(scale_2).all())
    return scales, packed if pack else None, finite
