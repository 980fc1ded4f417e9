"""Retargeting: the weights that come nearest to the original outputs from the inputs that there will be.

A linear of weights W [R, K] was to compute W x; while serving it is given y, what is left of x once earlier
layers, and its own inputs, are rounded. With C = sum x y^T and H = sum y y^T, the V of least
|W x - V y|^2 + ridge |V - W|^2 is

    V = W + W (C - H) (H + ridge I)^-1.

A V that fits few tokens too well is worse on others: so the ridge is the one, of several, under which V as
fitted on three of four tokens does best on the fourth.
"""

import torch
from torch import Tensor

# Ridges tried, as shares of the mean of H's diagonal; without end, V is W.
RIDGES = (1e-3, 1e-2, 0.05, 0.2, 1.0, 4.0)
# With fewer tokens an input, nothing is fitted: a split of so few says little.
LEAST_TOKENS = 8


def retarget(w: Tensor, cross: Tensor, gram: Tensor, tokens: Tensor) -> Tensor:
    """V, float32, for weights [..., R, K] of original inputs x and present ones y.

    cross: sums of x y^T [..., 2, K, K], over the tokens that are fitted and those held back; gram: of y y^T.
    tokens: how many there are, int64 [...]. Weights with fewer than 8 tokens an input stay.
    """
    width = w.shape[-1]
    out = w.reshape(-1, *w.shape[-2:]).to(torch.float32, copy=True)
    pairs = (cross.reshape(-1, 2, width, width), gram.reshape(-1, 2, width, width))
    for i, (c, h, count) in enumerate(zip(*pairs, tokens.reshape(-1).tolist(), strict=True)):
        if count >= LEAST_TOKENS * width:
            c, h = c.to(w.device, torch.float64), h.to(w.device, torch.float64)
            ridge = _ridge(out[i], c, h)
            if ridge is not None:
                out[i] += out[i] @ _change(c.sum(0), h.sum(0), ridge).to(torch.float32)
    return out.view(w.shape)


def _change(c: Tensor, h: Tensor, ridge: float) -> Tensor:
    """(C - H) (H + ridge mean(diag H) I)^-1, float64 [K, K]."""
    held = h.clone()
    held.diagonal().add_(ridge * h.diagonal().mean())
    return torch.cholesky_solve((c - h).mT, torch.linalg.cholesky(held)).mT


def _ridge(w: Tensor, c: Tensor, h: Tensor) -> float | None:
    """The ridge that does best on the tokens held back; None if W itself does.

    With V = W + W G, the error there changes by tr(S (G H G^T - 2 (C - H) G^T)), S = W^T W.
    """
    if not float(h[0].diagonal().mean()) > 0:
        return None
    s = (w.mT @ w).double()
    drift = c[1] - h[1]
    best, chosen = 0.0, None
    for ridge in RIDGES:
        g = _change(c[0], h[0], ridge)
        change = float(((g @ h[1] - 2 * drift) * (s @ g)).sum())
        if change < best:
            best, chosen = change, ridge
    return chosen
