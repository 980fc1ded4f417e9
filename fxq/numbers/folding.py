"""Folded scales: weights W [R, K] take s_k W_:k, and what makes their inputs gives x_k / s_k:
the same product, rounded otherwise. A channel of large inputs no longer decides the scale of its block.

s_k = rms(x_k)^a rms(W_:k)^-b over its geometric mean (a = b = 1/2 is SmoothQuant's, arXiv 2211.10438; b = 0
AWQ's, arXiv 2306.00978). Which a and b, or none at all, the error of the output says, W x against its rounded
self, weights and inputs as engines round them, on tokens that calibration showed.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.numbers import nvfp4

EXPONENTS = tuple(itertools.product((0.25, 0.5, 0.75), (0.0, 0.25, 0.5)))
LARGEST = 64.0
# Outputs of a matrix that are looked at, evenly spread.
OUTPUTS = 256
# By how much the error on tokens held back must fall for a fold to be made.
GAIN = 0.03


def fold_scale(rows: Tensor, weights: Sequence[Tensor], *, inputs: bool) -> Tensor:
    """s, float32 [K], of weights [R, K] each that multiply rows [n, K]; ones if no fold
    lowers the error by 3 % on the rows that were not used to choose it.

    Rows of zeros count for nothing. inputs: whether they are rounded too.
    """
    matrices = [w[:: -(-len(w) // OUTPUTS)].to(torch.float32) for w in weights]
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).to(torch.float32)
    rows = rows[rows.abs().amax(-1) > 0].to(torch.float32)
    none = torch.ones(rows.shape[-1], device=rows.device)
    if len(rows) < 2:
        return none
    chosen_by, judged_by = rows[0::2], rows[1::2]
    of_x = chosen_by.square().mean(0).sqrt()
    of_w = torch.stack([m.square().sum(0) for m in matrices]).sum(0).sqrt()
    scales = [none, *(_scale(of_x, of_w, a, b) for a, b in EXPONENTS)]
    best = min(scales, key=lambda s: _error(chosen_by, matrices, largest, s, inputs))
    before, after = (_error(judged_by, matrices, largest, s, inputs) for s in (none, best))
    return best if after < (1 - GAIN) * before else none


def _scale(of_x: Tensor, of_w: Tensor, a: float, b: float) -> Tensor:
    """One where either is zero: nothing is known of such a channel."""
    is_known = (of_x > 0) & (of_w > 0)
    log = torch.where(is_known, a * of_x.log() - b * of_w.log(), 0.0)
    log = torch.where(is_known, log - log.sum() / is_known.sum().clamp_min(1), 0.0)
    return log.exp().clamp(1 / LARGEST, LARGEST)


def _error(rows: Tensor, matrices: Sequence[Tensor], largest: Tensor, s: Tensor, inputs: bool) -> float:
    """Sum over the matrices of |W x - Q(W s) q(x / s)|^2, block scales by squared error; largest: the most
    that a column of any of them holds, f32 [K]."""
    x = rows / s
    if inputs:
        x = nvfp4.fake_quantize_activation(x, x.abs().amax())
    amax = (largest * s).amax()
    lost = 0.0
    for m in matrices:
        rounded = nvfp4.fake_quantize(m * s, amax, "mse")
        lost += float((rows @ m.T - x @ rounded.T).double().square().sum())
    return lost
