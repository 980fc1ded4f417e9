"""Scales, codes and weights that calibration decides: against brute force, least squares and what rounding
to the nearest loses."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxq.numbers import nvfp4
from fxq.numbers.folding import fold_scale
from fxq.numbers.gptq import damped, gptq
from fxq.numbers.hessian import quantize_weighted, weighted_scales
from fxq.numbers.kernels import cpu, eager
from fxq.numbers.retarget import retarget
from tests.numbers.test_kernels import DEVICE, IMPLEMENTATIONS

ORDERS: tuple[Any, ...] = ("none", "blocks")
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Tokens whose columns go together, some of them large."""
    mixed = _random(tokens, width, seed=seed) @ (torch.eye(width) + 0.3 * _random(width, width, seed=99))
    return mixed * (1 + 10 * (torch.arange(width) % 7 == 0))


def _loss(w: Tensor, made: nvfp4.Packed, gram: Tensor) -> Tensor:
    d = nvfp4.dequantize(made).double() - w.double()
    return ((d @ gram.double()) * d).sum((-2, -1))


def _nearest(x: np.ndarray) -> np.ndarray:
    """e2m1 of magnitudes, ties to the even code."""
    distance = np.abs(np.minimum(x, 6)[..., None] - GRID)
    least = distance.min(-1, keepdims=True)
    is_tied = distance == least
    even = is_tied & (np.arange(8) % 2 == 0)
    return GRID[np.where(even.any(-1), even.argmax(-1), is_tied.argmax(-1))]


def _brute_force(w: Tensor, unit: float, gram: Tensor) -> list[int]:
    """The code of least d G d^T for each block of one row, all of 126 tried in float64."""
    found = []
    values = eager.e4m3_values().numpy()
    for block, g in zip(w.double().numpy().reshape(-1, 16), gram.double().numpy(), strict=True):
        losses = []
        for value in values:
            d = block - np.sign(block) * _nearest(np.abs(block) / (value * unit)) * value * unit
            losses.append(d @ g @ d)
        found.append(int(np.argmin(losses)) + 1)
    return found


BOTH = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(["numba", "eager"], BOTH), ("triton", torch.bfloat16)]
)
def test_weighted_scales_are_those_of_brute_force(name: str, dtype: torch.dtype) -> None:
    w = (_random(2, 6, 64) * torch.tensor([1.0, 1e-3])[:, None, None]).to(dtype)
    w[0, 0, 5] = 40.0
    x = _inputs(50, 64)
    x[:, 16:32] *= _random(50, 1, seed=3)  # a Gram that is nearly of rank 1
    blocks = x.unflatten(-1, (-1, 16)).transpose(0, 1)
    gram = (blocks.mT @ blocks).double().expand(2, -1, -1, -1).contiguous()
    scale_2 = nvfp4.global_scale(w.abs().amax((1, 2)).float())
    least = torch.linalg.eigvalsh(gram)[..., 0].clamp_min(0) * (1 - 1e-9)
    device = torch.device("cpu")
    if name == "triton":
        device = DEVICE
        if DEVICE.type == "cpu":  # interpreted: one block a row, and bounds that leave few scales
            w, gram = w[:1, 1:4, :16], gram[:1, :1] + gram.max() * torch.eye(16)
            scale_2, least = w.abs().amax((1, 2)).float() / 2000, gram.amax() * torch.ones(1, 1) / 2
    args = (each.to(device) for each in (w.mT.contiguous().mT, scale_2, gram, least))
    found = IMPLEMENTATIONS[name]().weighted_scales(*args).cpu()
    for e, row in itertools.product(range(len(w)), range(w.shape[1])):
        assert found[e, row].tolist() == _brute_force(w[e, row], float(scale_2[e]), gram[e])


def test_weighted_scales_without_inputs_are_those_of_least_squared_error() -> None:
    w = _random(1, 8, 32)
    scale_2 = nvfp4.global_scale(w.abs().amax((1, 2)))
    found = weighted_scales(w, scale_2, torch.zeros(1, 2, 16, 16))
    assert torch.equal(found.view(torch.uint8), nvfp4.mse_scales(w, scale_2).view(torch.uint8))


def test_weighted_scales_lose_less_of_the_output_and_more_of_the_weight() -> None:
    w, x = _random(1, 64, 64), _inputs(400, 64)
    blocks = x.unflatten(-1, (-1, 16)).transpose(0, 1)
    made, plain = (
        quantize_weighted(w, w.abs().amax((1, 2)), (blocks.mT @ blocks)[None]),
        nvfp4.quantize_measured(w, w.abs().amax((1, 2)), "mse"),
    )
    gram = torch.block_diag(*(blocks.mT @ blocks))
    assert _loss(w, made, gram) < 0.9 * _loss(w, plain, gram)
    assert float(made.error) > float(plain.error)
    exact = (nvfp4.dequantize(made).double() - w.double()).square().sum()
    assert float(made.error) == pytest.approx(float(exact))


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize("near", [False, True])
def test_all_kernels_round_a_block_alike(near: bool, name: str) -> None:
    window = (-10, 8) if name == "eager" or DEVICE.type == "cuda" else (-2, 1)
    rows = 40 if window == (-10, 8) else 5
    t = _random(2, rows, 16) * torch.logspace(-2, 1, rows)[:, None]
    t[0, 3] = 0
    u = torch.linalg.cholesky(torch.eye(16) + 0.2 * torch.ones(16, 16), upper=True).expand(2, 16, 16)
    scale_2 = torch.tensor([1e-3, 0.02])
    codes = torch.randint(1, 127, (2, rows), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    args = t, u.contiguous(), scale_2, codes if near else None, window
    device = DEVICE if name == "triton" else torch.device("cpu")
    there = (each.to(device) if isinstance(each, Tensor) else each for each in args)
    found = [each.cpu() for each in IMPLEMENTATIONS[name]().round_block(*there)]
    for a, b in zip(cpu.round_block(*args), found, strict=True):
        if name == "triton":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def test_a_block_is_rounded_with_feedback_in_order() -> None:
    t, unit = _random(1, 1, 16, seed=8), torch.tensor([0.01])
    u = torch.triu(_random(16, 16, seed=9)) + 4 * torch.eye(16)
    q, errors, codes, loss = eager.round_block(t, u[None], unit, None, (-10, 8))
    left = t[0, 0].double().numpy().copy()
    step = float(eager.e4m3_values()[int(codes) - 1]) * float(unit)
    for k in range(16):
        rounded = np.sign(left[k]) * _nearest(np.abs(left[k]) / step) * step
        assert float(q[0, 0, k]) == pytest.approx(rounded, rel=1e-4, abs=1e-6)
        error = (left[k] - rounded) / float(u[k, k])
        assert float(errors[0, 0, k]) == pytest.approx(error, rel=1e-3, abs=1e-5)
        left[k + 1 :] -= error * u[k, k + 1 :].double().numpy()
    assert float(loss) == pytest.approx(float(errors.square().sum()), rel=1e-5)


def test_inputs_that_do_not_go_together_give_scales_of_least_squared_error() -> None:
    w = _random(2, 24, 64)
    amax = w.abs().amax((1, 2))
    made = gptq(w, amax, torch.eye(64).expand(2, 64, 64), damp=0.01, order="none", sweeps=0)
    plain = nvfp4.quantize_measured(w, amax, "mse")
    torch.testing.assert_close(made.error, plain.error, rtol=1e-6, atol=0)
    assert (
        made.scale.float() == plain.scale.float()
    ).float().mean() > 0.97  # ties, that float32 does not see


@pytest.mark.parametrize("order", ORDERS)
def test_gptq_loses_less_of_the_output_and_descent_never_more(order: Any) -> None:
    w, x = _random(2, 48, 96), _inputs(600, 96)
    amax, gram = w.abs().amax((1, 2)), torch.stack([x.T @ x, torch.eye(96) + x.T @ x / 9])
    losses = [
        _loss(w, gptq(w, amax, gram, damp=0.01, order=order, sweeps=n), damped(gram, 0.01)) for n in range(3)
    ]
    plain = _loss(w, nvfp4.quantize_measured(w, amax, "mse"), damped(gram, 0.01))
    assert (losses[0] < 0.7 * plain).all()
    assert (losses[1] <= losses[0]).all()
    assert (losses[2] <= losses[1]).all()


def test_gptq_of_one_weight_is_the_same_among_others() -> None:
    w, x = _random(3, 40, 224), _inputs(300, 224)
    amax, gram = w.abs().amax((1, 2)), torch.stack([x.T @ x * n for n in (1, 2, 3)])
    together = gptq(w, amax, gram, damp=0.01, order="blocks", sweeps=1)
    alone = gptq(w[1:2], amax[1:2], gram[1:2], damp=0.01, order="blocks", sweeps=1)
    assert torch.equal(together.weight[1:2], alone.weight)
    assert torch.equal(together.scale[1:2].view(torch.uint8), alone.scale.view(torch.uint8))


def _broken_inputs(kind: str) -> Tensor:
    x = _inputs(100, 32)
    if kind == "none":
        return torch.zeros(32, 32)
    if kind == "one token":
        return torch.outer(x[0], x[0])
    x[:, 3:20] = 0
    return x.T @ x


@pytest.mark.parametrize("kind", ["none", "one token", "dead columns"])
def test_gptq_of_few_inputs_is_finite_and_near_the_weight(kind: str) -> None:
    w = _random(1, 16, 32).bfloat16()
    w[0, 5] = 0
    amax = w.abs().amax((1, 2)).float()
    made = gptq(w, amax, _broken_inputs(kind)[None], damp=0.01, order="blocks", sweeps=2)
    decoded = nvfp4.dequantize(made)
    assert torch.isfinite(decoded).all()
    assert float(made.error) < 0.1 * float(made.energy)
    exact = (decoded.double() - w.double()).square().sum()
    assert float(made.error) == pytest.approx(float(exact), rel=1e-6)


def _halves(x: Tensor, y: Tensor) -> Tensor:
    cut = 3 * len(x) // 4
    return torch.stack([x[:cut].T @ y[:cut], x[cut:].T @ y[cut:]])


def _output_error(w: Tensor, v: Tensor, x: Tensor, y: Tensor) -> float:
    return float((x @ w.T - y @ v.T).square().sum())


def _noisy(tokens: int, width: int = 32) -> tuple[Tensor, Tensor]:
    x = _inputs(tokens, width)
    return x, x * 0.9 + 0.5 * _random(tokens, width, seed=5)


def _retargeted(w: Tensor, original: Tensor, cross: Tensor, gram: Tensor, tokens: int) -> Tensor:
    return retarget(w[None], original[None], cross[None], gram[None], torch.tensor([tokens]))[0]


def test_retargeted_weights_lose_less_on_tokens_never_seen() -> None:
    w, (x, y) = _random(24, 32), _noisy(4000)
    fitted = _retargeted(w, w, _halves(x[:2000], y[:2000]), _halves(y[:2000], y[:2000]), 2000)
    before, after = (_output_error(w, v, x[2000:], y[2000:]) for v in (w, fitted))
    best = torch.linalg.lstsq(y[2000:], x[2000:] @ w.T).solution.T
    least = _output_error(w, best, x[2000:], y[2000:])
    assert after < before
    assert after - least < 0.1 * (before - least)


def test_folded_weights_are_retargeted_to_what_the_original_ones_gave() -> None:
    w, (x, y) = _random(24, 32), _noisy(2000)
    s = torch.linspace(0.5, 2, 32)
    folded = _retargeted(w * s, w, _halves(x, y / s), _halves(y / s, y / s), 2000)
    assert _output_error(w, folded, x, y / s) < _output_error(w, w, x, y)


@pytest.mark.parametrize("tokens", [0, 8 * 32 - 1])
def test_few_tokens_retarget_nothing(tokens: int) -> None:
    w, (x, y) = _random(24, 32), _noisy(400)
    gram = _halves(y, y)
    assert torch.equal(_retargeted(w, w, _halves(x, y), gram, tokens), w)


def test_many_are_retargeted_each_as_if_alone() -> None:
    w, pairs = _random(3, 24, 32), [_noisy(400), _noisy(900), (torch.zeros(400, 32),) * 2]
    cross, gram = (torch.stack([_halves(p[i], p[1]) for p in pairs]) for i in (0, 1))
    found = retarget(w, w, cross, gram, torch.tensor([400, 900, 400]))
    for i in range(3):
        assert torch.equal(found[i], _retargeted(w[i], w[i], cross[i], gram[i], (400, 900, 400)[i]))
    assert torch.equal(found[2], w[2])


def test_inputs_that_lost_nothing_retarget_nothing() -> None:
    w, x = _random(24, 32), _inputs(400, 32)
    assert torch.equal(_retargeted(w, w, _halves(x, x), _halves(x, x), 400), w)


def _fold_error(w: Tensor, x: Tensor, s: Tensor) -> float:
    a, scaled = x / s, w * s
    rounded = nvfp4.fake_quantize(scaled, scaled.abs().amax(), "mse")
    return _output_error(w, rounded, x, nvfp4.fake_quantize_activation(a, a.abs().amax()))


def test_channels_of_large_inputs_are_folded() -> None:
    w, x = _random(64, 64), _random(1000, 64, seed=2)
    x[:, ::9] *= 50
    s = fold_scale(x, [w], inputs=True)
    assert float(s[9]) > 2 * float(s[1])
    unseen = _random(1000, 64, seed=3)
    unseen[:, ::9] *= 50
    assert _fold_error(w, unseen, s) < 0.9 * _fold_error(w, unseen, torch.ones(64))


@pytest.mark.parametrize(
    "make",
    [lambda x: x, lambda x: x * 0, lambda x: x[:1]],
    ids=["nothing to gain", "no tokens", "one token"],
)
def test_nothing_is_folded_without_a_gain(make: Callable[[Tensor], Tensor]) -> None:
    x = make(_random(1000, 64, seed=2))
    assert torch.equal(fold_scale(x, [_random(64, 64)], inputs=True), torch.ones(64))


def test_a_channel_without_inputs_is_not_folded() -> None:
    x = _random(1000, 64, seed=2)
    x[:, ::9] *= 50
    x[:, 5] = 0
    s = fold_scale(x, [_random(64, 64)], inputs=True)
    assert torch.isfinite(s).all()
    assert float(s[5]) == 1
