"""MXFP4 values are NVFP4 values under powers of two, wherever e4m3 holds those."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxq
from fxq.numbers import mxfp4
from tests import reference

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
ROWS, BLOCKS = 16, 8


def _mxfp4(least: int, most: int, seed: int = 0) -> Tensor:
    """float64 [ROWS, 32 * BLOCKS] of random codes under random powers of two, the largest of them among
    them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 8, (ROWS, BLOCKS, 32), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, codes.shape, generator=generator)
    powers = torch.randint(least, most + 1, (ROWS, BLOCKS, 1), generator=generator)
    powers[0, 0], codes[0, 0, 0] = most, 7
    return (GRID[codes] * signs * torch.exp2(powers.double())).flatten(1)


def _decoded(found: mxfp4.Cast) -> Tensor:
    """float64, by code that shares nothing with fxq."""
    parts = (found.weight[0], found.scale[0].view(torch.uint8), found.scale_2[0])
    packed, scale, scale_2 = (t.numpy() for t in parts)
    return torch.from_numpy(reference.dequantize(packed, scale, float(scale_2))).double()


@pytest.mark.parametrize(("least", "most"), [(0, 0), (-17, 0), (-30, -13), (3, 20), (-100, -90), (90, 107)])
def test_powers_within_reach_of_e4m3_are_exact(least: int, most: int) -> None:
    w = _mxfp4(least, most)
    found = mxfp4.cast(w[None].bfloat16(), w.abs().amax().float()[None])
    assert torch.equal(_decoded(found), w)
    assert float(found.scale_2) == 2.0 ** (most - 8)
    assert int(found.inexact) == 0
    assert float(found.error) == 0
    scales = found.scale.float().log2()
    assert torch.equal(scales, scales.round())


def test_a_group_s_amax_decides_and_what_is_too_small_is_rounded_and_counted() -> None:
    w = _mxfp4(-24, 0)
    found = mxfp4.cast(w[None].bfloat16(), torch.tensor([6.0]))
    decoded = _decoded(found)
    wrong = (decoded != w).unflatten(-1, (-1, 16)).any(-1)
    assert 0 < int(found.inexact) == int(wrong.sum()) < wrong.numel()
    assert float((decoded - w).abs().max()) <= 0.25 * 2.0**-17  # half a step under the smallest scale
    assert float(found.error) == pytest.approx(float((decoded - w).square().sum()))
    assert bool((w.unflatten(-1, (-1, 16)).abs().amax(-1)[wrong] < 6 * 2.0**-17).all())


def test_zeros_and_the_smallest_of_bfloat16_have_scales_that_engines_take() -> None:
    w = torch.zeros(1, 4, 32, dtype=torch.bfloat16)
    w[0, 1, 3] = 2.0**-133
    found = mxfp4.cast(w, w.abs().amax((1, 2)).float())
    assert bool((found.scale.float() > 0).all())
    assert float(found.scale_2) > 0


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(fxq.SourceError, match="finite"):
        mxfp4.cast(torch.full((1, 2, 16), float("nan")), torch.ones(1))
