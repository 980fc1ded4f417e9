"""Likelihood: what logits say of a text, the loss of each token and how far two models' predictions lie
apart.

Logits [B, S, V] predict token s + 1 at position s; the last position predicts nothing. They are widened to
float32 some rows at a time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 25


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log likelihood in nats of every token but the first of each sample: float64 [B * (S - 1)], on
    the CPU. ids: int64 [B, S]."""
    targets = ids[:, 1:].flatten().to(logits.device)
    parts = [
        torch.nn.functional.cross_entropy(rows.float(), targets[at], reduction="none")
        for at, (rows,) in _rows(logits)
    ]
    return torch.cat(parts).double().cpu()


def divergences(base: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(base || model) in nats, whether both rank the same token first) at every position that predicts:
    float64 and bool [B * (S - 1)], on the CPU. Ties go to the token of the lower number."""
    apart, same = [], []
    for _, (p, q) in _rows(base, logits.to(base.device)):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        ruled_out = torch.isneginf(log_p)  # 0 * log(0 / q) is 0
        terms = log_p.exp() * torch.where(ruled_out, 0.0, log_p - log_q)
        apart.append(terms.sum(-1, dtype=torch.float64).clamp_min(0).cpu())
        same.append((_first(p) == _first(q)).cpu())
    return torch.cat(apart), torch.cat(same)


def divergence(base: Tensor, logits: Tensor) -> Tensor:
    """The mean of KL(base || model) in nats over all positions that predict, f32 []: gradients flow to the
    model's logits."""
    log_p, log_q = (part[:, :-1].float().log_softmax(-1) for part in (base, logits))
    return (log_p.exp() * torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)).sum(-1).mean()


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss; infinite where that is beyond floating point."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


def _rows(*logits: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The same predicting rows [n, V] of each, few enough to be widened."""
    flat = [part[:, :-1].flatten(0, 1) for part in logits]
    most = max(1, _ELEMENTS_AT_ONCE // flat[0].shape[-1])
    for start in range(0, len(flat[0]), most):
        at = slice(start, start + most)
        yield at, tuple(part[at] for part in flat)


def _first(rows: Tensor) -> Tensor:
    """The lowest index of each row's maximum."""
    return (rows == rows.amax(-1, keepdim=True)).int().argmax(-1)
