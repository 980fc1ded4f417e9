"""Block scales and e2m1 codes on CUDA: one launch reads each weight once, however many slices there are.

The configuration is fixed (nothing is tuned at run time) and sizes are arguments, so each dtype, layout and
variant is compiled once; Triton keeps the result on disk.
"""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from fxq.numbers.kernels.eager import BLOCK
from fxq.numbers.kernels.gpu_jit import add_rows, quantize_blocks
from fxq.numbers.kernels.gpu_weighted_jit import round_rows, weighted_rows

_LANES = 32
_TILES = 8  # tiles of 32 blocks that a program does one after another
_ROWS = 16  # of a tile where neighbours along a row are far apart: their bf16 fill a sector of 32 bytes
_GRID_Y = 65535
_REGISTERS = 96  # else sums take 142 in a search, and a third of the warps away
_ADDED = 1024  # sums of programs that one program adds


def quantize(
    w: Tensor, scale_2: Tensor, search: bool, pack: bool, measure: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(scales, packed or None, sums or None, whether everything was finite): see `kernels.quantize`.

    w [n, rows, K], bfloat16, float16 or float32, any strides; scale_2 f32 [n]. Waits for the result.
    """
    scales, packed, sums, bad = launch(w, scale_2, search, pack, measure)
    return scales, packed, sums, not bad.item()


def launch(
    w: Tensor, scale_2: Tensor, search: bool, pack: bool, measure: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`quantize` without waiting: the last result is int32 [1], not zero if something was not finite."""
    n, rows, width = w.shape
    blocks = width // BLOCK
    scales = torch.empty(n, rows, blocks, dtype=torch.uint8, device=w.device)
    packed = torch.empty(n, rows, blocks if pack else 0, dtype=torch.int64, device=w.device)
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    ss, sr, sk = w.stride()
    words = 8 // w.element_size()
    wide = sk == 1 and ss % words == 0 and sr % words == 0 and w.data_ptr() % 8 == 0
    if sk == 1:
        down, parts = 1, triton.cdiv(rows * blocks, _LANES)
    else:
        down, parts = _ROWS, triton.cdiv(rows, _ROWS) * triton.cdiv(blocks, _LANES // _ROWS)
    tiles = _TILES if wide else 1
    native = not triton.knobs.runtime.interpret
    grid = triton.cdiv(parts, tiles)
    sums = torch.empty(n, 2, grid if measure else 0, dtype=torch.float64, device=w.device)
    with torch.cuda.device(w.device) if w.is_cuda else nullcontext():  # a launch goes to the current device
        for start in range(0, n, _GRID_Y) if scales.numel() else ():
            part = slice(start, start + _GRID_Y)
            quantize_blocks[grid, min(n - start, _GRID_Y)](
                w[part], scale_2[part], scales[part], packed[part], sums[part], bad, rows, blocks, ss, sr, sk,
                SEARCH=search, PACK=pack, SUMS=measure, WIDE=wide, ROWS=down, NATIVE=native, LANES=_LANES,
                TILES=tiles, num_warps=1, maxnreg=_REGISTERS if measure else None, enable_fp_fusion=False,
            )  # fmt: skip
        totals = _added(sums) if measure else None
    return scales, packed.view(torch.uint8) if pack else None, totals, bad


def round_block(
    t: Tensor, u: Tensor, scale_2: Tensor, near: Tensor | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.round_block`."""
    n, rows, _ = t.shape
    q, e = torch.empty_like(t), torch.empty_like(t)
    codes = torch.empty(n, rows, dtype=torch.uint8, device=t.device)
    losses = torch.empty(n, rows, device=t.device)
    grid = triton.cdiv(rows, _LANES), n
    with torch.cuda.device(t.device) if t.is_cuda else nullcontext():
        round_rows[grid](
            t, u, scale_2, codes if near is None else near, q, e, codes, losses, rows, *window,
            NEAR=near is not None, LANES=_LANES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return q, e, codes, losses


def weighted_scales(w: Tensor, scale_2: Tensor, gram: Tensor, least: Tensor) -> Tensor:
    """See `kernels.weighted_scales`; w of any strides."""
    n, rows, width = w.shape
    blocks = width // BLOCK
    codes = torch.empty(n, rows, blocks, dtype=torch.uint8, device=w.device)
    grid = triton.cdiv(rows, _LANES), blocks, n
    with torch.cuda.device(w.device) if w.is_cuda else nullcontext():
        weighted_rows[grid](
            w, scale_2, gram, least, codes, rows, blocks, *w.stride(),
            LANES=_LANES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return codes


def _added(sums: Tensor) -> Tensor:
    """[2, n]: sums [n, 2, programs] over the programs, in an order that only their number decides."""
    while sums.shape[-1] > 1:
        totals = sums.new_empty(*sums.shape[:-1], triton.cdiv(sums.shape[-1], _ADDED))
        if len(sums):
            add_rows[2 * len(sums), totals.shape[-1]](sums, totals, sums.shape[-1], WIDTH=_ADDED)
        sums = totals
    return sums.sum(-1).T  # of one, or of none
