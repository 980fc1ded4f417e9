"""Block scales and e2m1 codes on the CPU: each thread converts a cache's worth of rows and runs the compiled
kernel over it. Beside weight and result that needs a few hundred KB a thread.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fxq.kernels.cpu_jit import quantize_rows
from fxq.kernels.eager import BLOCK

# Weights a thread converts to float32 at a time. Up to 2**15, torch converts in the calling thread.
CHUNK = 1 << 15


def quantize(w: Tensor, scale_2: Tensor, search: bool, pack: bool) -> tuple[Tensor, Tensor | None, bool]:
    """(scales uint8 [n, rows, K/16], packed uint8 [n, rows, K/2] or None, whether everything was finite).

    w [n, rows, K], bfloat16, float16 or float32, any strides; scale_2 f32 [n]. Uses as many threads as torch.
    """
    n, rows, width = w.shape
    scales = torch.empty(n, rows, width // BLOCK, dtype=torch.uint8)
    packed = torch.empty(n, rows, width // 2 if pack else 0, dtype=torch.uint8)
    units = scale_2.detach().tolist()
    step = max(1, CHUNK // max(1, width))

    def part(at: tuple[int, int]) -> bool:
        index, rows = at[0], slice(at[1], at[1] + step)
        values = w[index, rows].detach().to(torch.float32).contiguous()
        bits = values.view(torch.int32)
        arrays = (t.numpy() for t in (values, bits, scales[index, rows], packed[index, rows]))
        return bool(quantize_rows(*arrays, units[index], search, pack))

    parts = [(index, start) for index in range(n) for start in range(0, rows, step)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        done = [part(at) for at in parts]
    else:
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(part, parts))
    finite = all(done) and bool(torch.isfinite(scale_2).all())
    return scales, packed if pack else None, finite
