"""Retargeting: the weights that come nearest to the original outputs from the inputs that there will be.

A linear of weights O [R, K] was to compute O x; while serving it is given y, what is left of x once earlier
layers, and its own inputs, are rounded. W is its weight by now: O, or O with scales folded into it. With
C = sum x y^T and H = sum y y^T, the V of least |O x - V y|^2 + ridge |V - W|^2 is

    V = W + (O C - W H) (H + ridge I)^-1.

A V that fits few tokens too well is worse on others: so the ridge is the one, of several, under which V as
fitted on three of four tokens does best on the fourth.
"""

import torch
from torch import Tensor

from fxq.numbers.gptq import parts

# Ridges tried, as shares of the mean of H's diagonal; without end, V is W.
RIDGES = (1e-2, 0.05, 0.2, 1.0, 4.0)
# With fewer tokens an input, nothing is fitted: a split of so few says little.
LEAST_TOKENS = 8
# Outputs by which the ridge is chosen, evenly spread.
OUTPUTS = 256


def retarget(w: Tensor, original: Tensor, cross: Tensor, gram: Tensor, tokens: Tensor) -> Tensor:
    """V, float32 [n, R, K], for weights w [n, R, K] that were `original` [n, R, K].

    cross: sums of x y^T [n, 2, K, K], over the tokens that are fitted and those held back; gram: of y y^T.
    tokens: how many there are, int64 [n]. With fewer than 8 an input a weight stays.
    """
    made = w.to(torch.float32, copy=True)
    enough = (tokens >= LEAST_TOKENS * w.shape[-1]).to(w.device)
    for part in parts(len(w), w.shape[-1], w.device):
        o, c, h = original[part].to(torch.float32), cross[part].to(w.device), gram[part].to(w.device)
        ridge = torch.where(enough[part], _ridges(made[part], o, c, h), torch.inf)
        fitted = made[part] + _solved(_drift(made[part], o, c.sum(1), h.sum(1)), h.sum(1), ridge)
        made[part] = torch.where(ridge.isfinite()[:, None, None], fitted, made[part])
    return made


def _drift(w: Tensor, o: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """O C - W H, [n, R, K]."""
    return o @ c - w @ h


def _solved(drift: Tensor, h: Tensor, ridge: Tensor) -> Tensor:
    """drift (H + ridge mean(diag H) I)^-1, float32 [n, R, K], for ridges f32 [n]; any value for one without
    end, or an H of zeros."""
    held = h.double()
    diagonal = held.diagonal(dim1=-2, dim2=-1)
    diagonal += (ridge.nan_to_num(posinf=1.0) * diagonal.mean(-1).clamp_min(1e-30))[:, None]
    factor = torch.linalg.cholesky(held)
    return torch.cholesky_solve(drift.double().mT, factor).mT.to(torch.float32)


def _ridges(w: Tensor, o: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """f32 [n]: the ridges that do best on the tokens held back, by some of the outputs; inf where W does.

    With V = W + D the error there changes by tr(D H D^T) - 2 tr((O C - W H) D^T).
    """
    some = slice(None, None, -(-w.shape[1] // OUTPUTS))
    fitted, judged = (_drift(w[:, some], o[:, some], c[:, i], h[:, i]) for i in (0, 1))
    best = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    chosen = torch.full((len(w),), torch.inf, device=w.device)
    for ridge in RIDGES:
        d = _solved(fitted, h[:, 0], torch.full_like(chosen, ridge))
        change = ((d @ h[:, 1] - 2 * judged) * d).sum((1, 2), dtype=torch.float64)
        is_better = change < best
        best, chosen = torch.where(is_better, change, best), torch.where(is_better, ridge, chosen)
    return chosen
