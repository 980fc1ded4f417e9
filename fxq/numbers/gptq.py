"""GPTQ on NVFP4: codes and block scales of least output error, found column by column with feedback.

A weight w [R, K] reads inputs x whose Gram matrix H = sum x x^T is known. What rounding it to q costs is
tr((q - w) H (q - w)^T). With U the upper Cholesky factor of H^-1 = U^T U, rounding column j with error
e_j = (w_j - q_j) / U_jj and moving later columns by -e_j U_j,j+1.. keeps that the sum of all e_j^2
(Frantar et al., arXiv 2210.17323). Two things are NVFP4's: each block of 16 columns takes the block scale
under which its own feedback loses least, and `sweeps` of coordinate descent solve each block again, scale and
codes, given all others; none of these can raise the error.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fxq.numbers import kernels
from fxq.numbers.nvfp4 import BLOCK, Measured, decided, global_scale

Order = Literal["none", "blocks"]

# FP8 scales tried, as steps in their table from the one that reaches the block's maximum.
WINDOW = (-10, 8)
# The same about the present scale, when a block is solved again.
NEAR = (-4, 3)
# Of weights that are solved together, the Grams in float64 take so many bytes.
_AT_ONCE = 1 << 30


def gptq(w: Tensor, amax: Tensor, gram: Tensor, *, damp: float, order: Order, sweeps: int) -> Measured:
    """Weights [n, R, K] of amaxes f32 [n] as what costs little under Grams [n, K, K], on their device.

    damp: added to the diagonal of a Gram, as a share of its mean; a column without inputs has the mean.
    order: "blocks" rounds the blocks, and the columns in them, of the largest inputs first. sweeps: of
    descent. `error` and `energy` are those of the weights, as for every other rounding.
    """
    rows, width = w.shape[1:]
    scale_2 = global_scale(amax)
    codes = torch.empty(len(w), rows, width // BLOCK, dtype=torch.uint8, device=w.device)
    packed = torch.empty(len(w), rows, width // 2, dtype=torch.uint8, device=w.device)
    for part in parts(len(w), width, w.device):
        solver = _Solver(w[part], scale_2[part], gram[part], damp, order)
        solver.round_in_order()
        for _ in range(sweeps):
            solver.descend()
        codes[part], packed[part] = solver.result()
    return decided(w, amax, packed, codes.view(torch.float8_e4m3fn))


def damped(gram: Tensor, damp: float) -> Tensor:
    """A Gram [..., K, K] in float64 with `damp` times its mean diagonal added to the diagonal, and the mean
    where no input ever was: positive definite for damp > 0."""
    h = gram.to(torch.float64, copy=True)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += damp * mean + torch.where(diagonal > 0, 0.0, mean)
    return h


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U of positive diagonal with U^T U = h^-1, float64 [..., K, K].

    Of h with rows and columns reversed, L L^T: then h = R R^T with R = L reversed, which is upper triangular,
    and U = R^-1.
    """
    lower = torch.linalg.cholesky(h.flip(-2, -1))
    one = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower, one.expand_as(h), upper=False).flip(-2, -1)


def parts(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """On a CPU one by one: a product's last bits may depend on how many are computed together, and what a
    resumed run has left must come out as if it had all."""
    step = 1 if device.type == "cpu" else max(1, _AT_ONCE // (8 * width * width))
    for start in range(0, n, step):
        yield slice(start, start + step)


class _Solver:
    """Weights w [n, R, K], columns in the order in which they are rounded, and what they are by now: `q`, as
    float32, with the e4m3 codes of its block scales."""

    def __init__(self, w: Tensor, scale_2: Tensor, gram: Tensor, damp: float, order: Order) -> None:
        self.scale_2, self.h = scale_2, damped(gram.to(w.device), damp)
        self.order = _by_size(self.h.diagonal(dim1=-2, dim2=-1)) if order == "blocks" else None
        self.w = w.to(torch.float32)
        if self.order is not None:
            self.w = self.w.gather(2, self.order[:, None].expand_as(self.w))
            by_row = self.order[..., None].expand_as(self.h)
            self.h = self.h.gather(1, by_row).gather(2, by_row.mT)
        self.q = torch.empty_like(self.w)
        self.codes = torch.empty(*w.shape[:2], w.shape[2] // BLOCK, dtype=torch.uint8, device=w.device)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        for b in range(self.codes.shape[-1]):
            yield b, slice(BLOCK * b, BLOCK * (b + 1))

    def round_in_order(self) -> None:
        """Every block once, from what earlier ones left of it."""
        factor = inverse_factor(self.h).to(torch.float32)
        left = self.w.clone()
        for b, own in self.blocks():
            t, u = left[..., own].contiguous(), factor[:, own, own].contiguous()
            self.q[..., own], error, self.codes[..., b], _ = kernels.round_block(
                t, u, self.scale_2, None, WINDOW
            )
            left[..., own.stop :] -= error @ factor[:, own, own.stop :]

    def descend(self) -> None:
        """Every block again, given all others, if that lowers the error."""
        h = self.h.to(torch.float32)
        inner = torch.stack([self.h[:, own, own] for _, own in self.blocks()])  # [K/16, n, 16, 16]
        u = inverse_factor(inner)
        inverse, u, inner = (each.to(torch.float32).contiguous() for each in (u.mT @ u, u, inner))
        difference = self.q - self.w
        for b, own in self.blocks():
            pull = difference @ h[..., own] - difference[..., own] @ inner[b]  # of the other blocks' errors
            t = self.w[..., own] - pull @ inverse[b]
            away = self.q[..., own] - t
            now = ((away @ inner[b]) * away).sum(-1)
            q, _, codes, loss = kernels.round_block(
                t.contiguous(), u[b], self.scale_2, self.codes[..., b].contiguous(), NEAR
            )
            is_better = loss < now
            self.q[..., own] = torch.where(is_better[..., None], q, self.q[..., own])
            self.codes[..., b] = torch.where(is_better, codes, self.codes[..., b])
            difference[..., own] = self.q[..., own] - self.w[..., own]

    def result(self) -> tuple[Tensor, Tensor]:
        """(e4m3 codes uint8 [n, R, K/16], e2m1 codes uint8 [n, R, K/2]), columns where they belong."""
        q, codes = self.q, self.codes
        if self.order is not None:
            back = self.order.argsort(dim=-1)
            q = q.gather(2, back[:, None].expand_as(q))
            codes = codes.gather(2, (back[:, ::BLOCK] // BLOCK)[:, None].expand_as(codes))
        scales = codes.view(torch.float8_e4m3fn)
        packed = torch.stack(
            [kernels.eager.pack_rows(q[i], scales[i], self.scale_2[i]) for i in range(len(q))]
        )
        return codes, packed


def _by_size(diagonal: Tensor) -> Tensor:
    """[n, K] of a Gram's diagonal -> the columns, blocks of the largest sums first, and in a block those of
    the largest."""
    blocks = diagonal.unflatten(-1, (-1, BLOCK))
    first = blocks.sum(-1).argsort(dim=-1, descending=True, stable=True)
    inner = blocks.argsort(dim=-1, descending=True, stable=True)
    inner = inner + BLOCK * torch.arange(blocks.shape[1], device=diagonal.device)[:, None]
    return inner.gather(1, first[..., None].expand_as(inner)).flatten(1)
