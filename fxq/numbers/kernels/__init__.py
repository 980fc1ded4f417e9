"""Where block scales are chosen and weights packed: Triton on CUDA, numba on the CPU, else torch operators.

All three give the same bytes. Losses are compared in float64 and computed by the same operations in the same
order; what a kernel skips, it has proved worse.
"""

import contextlib
import importlib
import importlib.util
import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers.kernels import eager

BLOCK = eager.BLOCK
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize(
    w: Tensor, scale_2: Tensor, *, search: bool, pack: bool, measure: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scales, packed, sums): e4m3 codes of blocks uint8 [n, rows, K/16]; if `pack`, e2m1 codes uint8
    [n, rows, K/2]; if also `measure`, float64 [2, n]: sum (w - w')**2, w' being what the codes decode to, and
    sum w**2.

    w [n, rows, K]: any strides, nothing is copied whole; bfloat16, float16 or float32, other dtypes by torch
    operators. scale_2 f32 [n]. search: the scales of least squared error, else those that reach each block's
    maximum. Sums are added in an order that the shape and layout of a slice decide, not those beside it; they
    are exact but for roundings of w by a few 2**-24 of itself.
    Raises SourceError if a weight or a scale_2 is infinite or NaN, ValueError if K is no multiple of 16.
    """
    if w.shape[-1] % BLOCK:
        raise ValueError(f"expected rows of a multiple of {BLOCK} weights, found {w.shape[-1]}")
    quantize = implementation(w).quantize
    scales, packed, sums, finite = quantize(w, scale_2.to(w.device), search, pack, measure)
    if not finite:
        raise SourceError(_not_finite(w, scale_2))
    return scales, packed, sums


def round_block(
    t: Tensor, u: Tensor, scale_2: Tensor, near: Tensor | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, errors, codes, losses) of blocks of 16 columns rounded one after the other, each column's error e_j
    moving the later ones by -e_j u_j,j+1.., under the scale for which the sum of all e_j^2 is least:
    q and errors f32 [n, R, 16], e4m3 codes uint8 [n, R] of the scales, losses f32 [n, R].

    t f32 [n, R, 16]; u f32 [n, 16, 16], upper triangular; scale_2 f32 [n]. Scales are tried in the window
    (first, last) of codes about `near` uint8 [n, R], or about the one that reaches the block's maximum; of
    equal losses the smaller code is taken.
    """
    return implementation(t).round_block(t, u, scale_2, near, window)


def weighted_scales(w: Tensor, scale_2: Tensor, gram: Tensor, least: Tensor) -> Tensor:
    """e4m3 codes uint8 [n, R, K/16] of the block scales of least d G d^T, ties to the smaller: see
    `fxq.numbers.hessian`.

    w [n, R, K]; scale_2 f32 [n]; gram float64 [n, K/16, 16, 16], symmetric; least: a lower bound of each
    one's eigenvalues, float64 [n, K/16].
    """
    return implementation(w).weighted_scales(w, scale_2, gram, least)


def implementation(w: Tensor) -> ModuleType:
    """The module that serves this device, dtype and installation."""
    name = {"cuda": "gpu", "cpu": "cpu"}.get(w.device.type) if w.dtype in _DTYPES else None
    return (name and _module(name)) or eager


def prepare(device: torch.device) -> None:
    """Use a GPU on another thread, once for either search: its context, its libraries and, on a new machine,
    compiling the kernels take seconds, in which a model can be traced. Nothing happens for a CPU."""
    if device.type == "cuda":
        threading.Thread(target=_use, args=(device,), name="fxq-prepare").start()


def _use(device: torch.device) -> None:
    with contextlib.suppress(Exception):  # whoever uses it for the result says what is wrong with it
        w = torch.ones(1, 16, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.linear(w, w[0])
        for search in (False, True):
            quantize(w, torch.ones(1), search=search, pack=True, measure=True)


@cache
def _module(name: str) -> ModuleType | None:
    """`fxq.numbers.kernels.<name>`, or None where what it compiles with is missing."""
    needs = {"gpu": "triton", "cpu": "numba"}[name]
    if importlib.util.find_spec(needs) is None:
        return None
    try:
        return importlib.import_module(f"fxq.numbers.kernels.{name}")
    except ImportError:  # installed, but not for this numpy or this Python
        return None


def _not_finite(w: Tensor, scale_2: Tensor) -> str:
    for index, matrix in enumerate(w):
        where = torch.nonzero(~torch.isfinite(matrix))
        if len(where):
            row, column = where[0].tolist()
            value = matrix[row, column].item()
            return f"expected finite weights, found {value} in slice {index}, row {row}, column {column}"
    index = int(torch.nonzero(~torch.isfinite(scale_2))[0])
    return f"expected finite amaxes, found one that gives the scale {scale_2[index].item()} for slice {index}"
