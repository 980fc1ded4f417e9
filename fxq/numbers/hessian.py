"""Block scales of least output error: of a block w of 16 weights whose inputs have the Gram matrix G,
rounding it to w - d costs d G d^T, whatever the other blocks do, if their errors do not go with its.

All 126 FP8 scales count. Two bounds spare most of them: under a step of four times the block's maximum all is
zero, and stays so; below, where the maximum is clipped by c, the loss is at least c^2 times G's least
eigenvalue.
"""

import torch
from torch import Tensor

from fxq.numbers import kernels
from fxq.numbers.nvfp4 import BLOCK, Measured, decided, global_scale, pack


def quantize_weighted(w: Tensor, amax: Tensor, gram: Tensor) -> Measured:
    """Weights [n, R, K] of amaxes f32 [n], each block with the scale of least d G d^T under its Gram
    [n, K/16, 16, 16]; a block without inputs with that of least squared error."""
    scale_2 = global_scale(amax)
    scales = weighted_scales(w, scale_2, gram)
    return decided(w, amax, pack(w, scales, scale_2), scales)


def weighted_scales(w: Tensor, scale_2: Tensor, gram: Tensor) -> Tensor:
    """The scales of `quantize_weighted`, float8_e4m3fn [n, R, K/16]; ties to the smaller."""
    g = gram.to(w.device, torch.float64, copy=True)
    unseen = g.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0
    g[unseen] = torch.eye(BLOCK, dtype=torch.float64, device=w.device)
    values = torch.linalg.eigvalsh(g)
    # What rounding may have added to the least eigenvalue, many times over.
    least = (values[..., 0] - 1e-12 * values[..., -1]).clamp_min(0)
    return kernels.weighted_scales(w, scale_2, g, least).view(torch.float8_e4m3fn)
