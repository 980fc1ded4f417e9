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

# Ridges tried, as shares of the mean of H's diagonal; without end, V is W.
RIDGES = (1e-2, 0.05, 0.2, 1.0, 4.0)
# With fewer tokens an input, nothing is fitted: a split of so few says little.
LEAST_TOKENS = 8


def retarget(w: Tensor, original: Tensor, cross: Tensor, gram: Tensor, tokens: Tensor) -> Tensor:
    """V, float32 [R, K], for weights w [R, K] that were `original` [R, K].

    cross: sums of x y^T [2, K, K], over the tokens that are fitted and those held back; gram: of y y^T.
    tokens: how many there are, int64 []. With fewer than 8 an input w stays.
    """
    w, o = w.to(torch.float32), original.to(torch.float32)
    if int(tokens) < LEAST_TOKENS * w.shape[-1]:
        return w
    c, h = cross.to(w.device), gram.to(w.device)
    ridge = _ridge(w, o, c, h)
    if ridge is None:
        return w
    return w + _drift(w, o, c.sum(0), h.sum(0)) @ _inverse(h.sum(0), ridge)


def _drift(w: Tensor, o: Tensor, c: Tensor, h: Tensor) -> Tensor:
    """O C - W H, [R, K]."""
    return o @ c - w @ h


def _inverse(h: Tensor, ridge: float) -> Tensor:
    """(H + ridge mean(diag H) I)^-1, float32 [K, K]."""
    held = h.double()
    held.diagonal().add_(ridge * h.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(held)).to(torch.float32)


def _ridge(w: Tensor, o: Tensor, c: Tensor, h: Tensor) -> float | None:
    """The ridge that does best on the tokens held back; None if W itself does.

    With V = W + D the error there changes by tr(D H D^T) - 2 tr((O C - W H) D^T).
    """
    if not float(h[0].diagonal().mean()) > 0:
        return None
    fitted, judged = (_drift(w, o, c[i], h[i]) for i in (0, 1))
    best, chosen = 0.0, None
    for ridge in RIDGES:
        d = fitted @ _inverse(h[0], ridge)
        change = float(((d @ h[1] - 2 * judged) * d).sum(dtype=torch.float64))
        if change < best:
            best, chosen = change, ridge
    return chosen
