"""The NVFP4 number format: e2m1 codes, FP8 block scales, one FP32 scale a tensor; rounding, packing and the
scale search.

A weight row is cut into blocks of 16. Element k of block b decodes to `e2m1(code) * scale[b] * scale_2`,
where `scale` is a positive float8_e4m3fn and `scale_2 = amax / (6 * 448)` is shared by a whole tensor or
fusion group. Every function takes weights `[..., rows, K]` with amax `[...]`: a whole fused weight is one
call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
_RECIPROCAL = torch.tensor(1 / (E2M1_MAX * E4M3_MAX), dtype=torch.float32)
_SEARCH_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
# An all-zero tensor decodes to zeros under any scale; engines want a positive one.
_ZERO_AMAX = 1.0


@dataclass(frozen=True)
class Packed:
    """A quantized weight: `weight` uint8 [..., rows, K/2], `scale` float8_e4m3fn [..., rows, K/16],
    `scale_2` f32 [...]."""

    weight: Tensor
    scale: Tensor
    scale_2: Tensor


def e4m3_values(device: torch.device | str = "cpu") -> Tensor:
    """The 126 positive finite float8_e4m3fn values in ascending order, float64; value `i` has the code `i
    + 1`."""
    codes = torch.arange(1, 127, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).to(torch.float64)


def global_scale(amax: Tensor) -> Tensor:
    """`amax / 2688` as float32, never zero: weight_scale_2 and input_scale of the checkpoint contract.

    It is a product with the float32 reciprocal, not a division: that is what the deployed tools compute, to
    the bit.
    """
    amax = amax.to(torch.float32)
    amax = torch.where(amax > 0, amax, torch.full_like(amax, _ZERO_AMAX))
    return (amax * _RECIPROCAL.to(amax.device)).clamp_min(torch.finfo(torch.float32).tiny)


def round_e2m1(magnitude: Tensor) -> Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 (ties to the even mantissa, saturating) for magnitudes >=
    0."""
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(magnitude.dtype)
    return ((magnitude / step).round() * step).clamp_max(E2M1_MAX)


def max_scales(w: Tensor, scale_2: Tensor) -> Tensor:
    """Block scales that reach each block's maximum: `e4m3(clamp(block_amax / (6 * scale_2), 2**-9, 448))`.

    `w` [..., rows, K], `scale_2` f32 [...]; returns float8_e4m3fn [..., rows, K/16]. A zero block gets 1.0.
    """
    block_amax = _blocks(w).abs().amax(-1).to(torch.float32)
    scale = block_amax / (E2M1_MAX * scale_2[..., None, None])
    scale = torch.where(block_amax > 0, scale.clamp(E4M3_TINY, E4M3_MAX), torch.ones_like(scale))
    return scale.to(torch.float8_e4m3fn)


def mse_scales(w: Tensor, scale_2: Tensor) -> Tensor:
    """Block scales of least squared error: the best of all 126 FP8 candidates, ties to the smaller.

    `w` [..., rows, K], `scale_2` f32 [...]; returns float8_e4m3fn [..., rows, K/16]. Losses are compared in
    float64 and summed in a fixed order, so that every device chooses alike. Only a bracket of candidates is
    evaluated: with `a` the block's maximum and U the loss of the smallest candidate >= a/6, a candidate s
    below (a - sqrt U)/6 loses more than U by clipping alone, and one >= a/3.5 is no better than its half.
    """
    rows = _as_rows(w)
    per_row = _per_row(scale_2, w)
    codes = torch.empty(rows.shape[0], rows.shape[1] // BLOCK, dtype=torch.uint8, device=w.device)
    candidates = e4m3_values(w.device)
    for part in _row_chunks(rows):
        blocks = _blocks(rows[part]).to(torch.float64).abs()
        g = per_row[part].to(torch.float64)[:, None].expand(blocks.shape[:-1])
        codes[part] = _search(blocks.reshape(-1, BLOCK), g.reshape(-1), candidates).reshape(blocks.shape[:-1])
    return codes.reshape(*w.shape[:-1], w.shape[-1] // BLOCK).view(torch.float8_e4m3fn)


def _search(blocks: Tensor, g: Tensor, candidates: Tensor) -> Tensor:
    """e4m3 codes uint8 [n] of least loss for magnitudes float64 [n, 16] under `candidates * g`, g float64
    [n]."""
    amax = blocks.amax(-1)
    first = torch.searchsorted(candidates, amax / (E2M1_MAX * g)).clamp_max(len(candidates) - 1)
    best, best_loss = first.clone(), _loss(blocks, candidates[first] * g)
    low = torch.searchsorted(candidates, (amax - best_loss.sqrt()) / (E2M1_MAX * g) * (1 - 1e-12))
    # Up to 15 * 2**-9 (index 14) halving may leave the FP8 grid, so those candidates are always tried.
    high = (torch.searchsorted(candidates, amax / (3.5 * g) * (1 + 1e-12)) - 1).clamp_min(14)
    owner = torch.arange(len(low), device=low.device)
    index = low
    while len(owner):
        open_ = index <= high
        if 3 * int(open_.sum()) < 2 * len(
            owner
        ):  # gathering costs as much as a candidate: do it when it pays
            owner, index, high, blocks, g = owner[open_], index[open_], high[open_], blocks[open_], g[open_]
            continue
        loss = _loss(blocks, candidates[index.clamp_max(len(candidates) - 1)] * g)
        loss = torch.where(index <= high, loss, torch.inf)
        old, old_loss = best[owner], best_loss[owner]
        better = (loss < old_loss) | ((loss == old_loss) & (index < old))
        best[owner] = torch.where(better, index, old)
        best_loss[owner] = torch.where(better, loss, old_loss)
        index = index + 1
    return (best + 1).to(torch.uint8)


def _loss(blocks: Tensor, scale: Tensor) -> Tensor:
    """Squared error float64 [n] of rounding magnitudes [n, 16] to e2m1 times `scale` [n]; a fixed tree of
    additions."""
    scale = scale[:, None]
    error = (round_e2m1(blocks / scale).mul_(scale).sub_(blocks)).square_()
    for width in (8, 4, 2, 1):
        error = error[:, :width] + error[:, width : 2 * width]
    return error[:, 0]


def pack(w: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """e2m1 codes of `w / (scale * scale_2)`, two a byte along K (even k in the low nibble): uint8 [...,
    rows, K/2].

    The sign bit is `w < 0`: -0.0 gives code 0, a small negative value that rounds to zero gives code 8.
    """
    out = torch.empty(*w.shape[:-1], w.shape[-1] // 2, dtype=torch.uint8, device=w.device)
    rows, flat, scales = (
        w.reshape(-1, w.shape[-1]),
        out.view(-1, out.shape[-1]),
        scale.reshape(-1, scale.shape[-1]),
    )
    per_row = _per_row(scale_2, w)
    for part in _row_chunks(rows):
        blocks = _blocks(rows[part]).to(torch.float32)
        step = scales[part].to(torch.float32) * per_row[part][:, None]
        q = round_e2m1(blocks.abs() / step[..., None])
        code = torch.where(q < 2, 2 * q, torch.where(q < 4, q + 2, q / 2 + 4)).to(torch.uint8)
        code = (code | ((blocks < 0).to(torch.uint8) << 3)).reshape(-1, w.shape[-1])
        flat[part] = code[:, 0::2] | (code[:, 1::2] << 4)
    return out


def quantize_weight(w: Tensor, amax: Tensor, scale: str) -> Packed:
    """Quantize weights `[..., rows, K]` given each one's (or its group's) amax f32 `[...]`.

    `scale` says how block scales are chosen: "max" reaches each block's maximum, "mse" searches for least
    error.
    """
    scale_2 = global_scale(amax)
    block_scale = {"max": max_scales, "mse": mse_scales}[scale](w, scale_2)
    return Packed(pack(w, block_scale, scale_2), block_scale, scale_2)


def dequantize(packed: Packed) -> Tensor:
    """float32 [..., rows, K]: `e2m1(code) * (scale * scale_2)`."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.weight.device)
    grid = torch.cat([grid, -grid])
    codes = torch.stack([packed.weight & 15, packed.weight >> 4], -1).flatten(-2)
    step = packed.scale.to(torch.float32) * packed.scale_2[..., None, None]
    return (_blocks(grid[codes.int()]) * step[..., None]).flatten(-2)


def squared_error(w: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """(sum (w - w')**2, sum w**2) in float64 over the last two dimensions, each of shape [...]."""
    error, energy = [], []
    lead = w.shape[:-2]
    for index in range(max(1, lead.numel())):
        one = w.reshape(-1, *w.shape[-2:])[index]
        part = Packed(
            *(
                t.reshape(-1, *t.shape[len(lead) :])[index]
                for t in (packed.weight, packed.scale, packed.scale_2)
            )
        )
        difference = dequantize(part).to(torch.float64).sub_(one)
        error.append(difference.square_().sum())
        energy.append(one.to(torch.float64).square_().sum())
    return torch.stack(error).reshape(lead), torch.stack(energy).reshape(lead)


def fake_quantize_activation(x: Tensor, amax: Tensor) -> Tensor:
    """What an NVFP4 kernel sees of activations [..., K]: block scale e4m3(block_amax / 6 / input_scale),
    then e2m1."""
    input_scale = global_scale(amax)
    blocks = _blocks(x).to(torch.float32)
    scale = (blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / input_scale).clamp_max(E4M3_MAX)
    step = scale.to(torch.float8_e4m3fn).to(torch.float32) * input_scale
    q = round_e2m1(blocks.abs() / torch.where(step > 0, step, 1.0)) * step
    return torch.copysign(q, blocks).flatten(-2).to(x.dtype)


def fake_quantize_fp8(x: Tensor, amax: Tensor) -> Tensor:
    """Per-tensor FP8: e4m3(x / (amax / 448)) times that scale, saturating; shape and dtype of `x`."""
    scale = torch.where(amax > 0, amax, torch.full_like(amax, _ZERO_AMAX)).to(torch.float32) / E4M3_MAX
    q = (x.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (q.to(torch.float32) * scale).to(x.dtype)


def _as_rows(w: Tensor) -> Tensor:
    return w.reshape(w.shape[:-1].numel(), w.shape[-1])


def _per_row(scale_2: Tensor, w: Tensor) -> Tensor:
    """`scale_2` [...] repeated for every row of `w` [..., rows, K]: float32 [... * rows]."""
    return scale_2[..., None].expand(w.shape[:-1]).reshape(-1)


def _blocks(w: Tensor) -> Tensor:
    return w.unflatten(-1, (w.shape[-1] // BLOCK, BLOCK))


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    """Row ranges whose temporaries stay small (a few MB on the CPU), whatever the size of the weight."""
    step = max(
        1,
        _SEARCH_ELEMENTS[rows.device.type if rows.device.type in _SEARCH_ELEMENTS else "cpu"]
        // max(1, rows.shape[1]),
    )
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
