"""NVFP4 numbers against float64 references that share no code with them, and a hunt for counterexamples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fxq.numbers import fp8, nvfp4
from tests import reference

Array = NDArray[Any]
ROWS, WIDTH = 24, 96


def _gaussian(generator: np.random.Generator) -> Array:
    return generator.standard_normal((ROWS, WIDTH)) * 0.02


def _sparse(generator: np.random.Generator) -> Array:
    return np.where(generator.random((ROWS, WIDTH)) < 0.05, generator.standard_normal((ROWS, WIDTH)), 0)


def _one_outlier(generator: np.random.Generator) -> Array:
    w = generator.standard_normal((ROWS, WIDTH)) * 1e-3
    w[3, 17] = 40
    return w


def _denormal_scales(generator: np.random.Generator) -> Array:
    """Rows whose best block scale is a denormal FP8 value, next to one row that sets the amax."""
    w = generator.standard_normal((ROWS, WIDTH)) * np.exp2(-np.linspace(6, 22, ROWS))[:, None]
    w[0, 0] = 8
    return w


def _zero_blocks(generator: np.random.Generator) -> Array:
    w = generator.standard_normal((ROWS, WIDTH))
    w[:, 16:32], w[5] = 0, -0.0
    return w


def _grid(generator: np.random.Generator) -> Array:
    """Values on the grid and on the midpoints between grid points: ties everywhere."""
    points = np.concatenate([reference.E2M1, reference.MIDPOINTS])
    return generator.choice(points, (ROWS, WIDTH)) * generator.choice([-1, 1], (ROWS, WIDTH)) * 0.25


WEIGHTS: dict[str, Callable[[np.random.Generator], Array]] = {
    "gaussian": _gaussian,
    "student-t": lambda g: g.standard_t(3, (ROWS, WIDTH)) * 0.01,
    "cauchy": lambda g: g.standard_cauchy((ROWS, WIDTH)) * 0.01,
    "laplace": lambda g: g.laplace(0, 0.02, (ROWS, WIDTH)),
    "uniform": lambda g: g.uniform(-1, 1, (ROWS, WIDTH)),
    "row-scaled": lambda g: g.standard_normal((ROWS, WIDTH)) * np.exp2(g.integers(-12, 6, (ROWS, 1))),
    "sparse": _sparse,
    "constant": lambda g: np.full((ROWS, WIDTH), 0.37),
    "signs": lambda g: g.choice([-2.0, 2.0], (ROWS, WIDTH)),
    "one outlier": _one_outlier,
    "denormal scales": _denormal_scales,
    "zero blocks": _zero_blocks,
    "all zeros": lambda g: np.zeros((ROWS, WIDTH)),
    "grid": _grid,
    "tiny": lambda g: g.standard_normal((ROWS, WIDTH)) * 1e-30,
    "huge": lambda g: g.standard_normal((ROWS, WIDTH)) * 1e30,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    (name, dtype)
    for name in WEIGHTS
    for dtype in DTYPES
    if not (dtype == torch.float16 and name in ("tiny", "huge", "cauchy"))
]
every_weight = pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))


def _weight(name: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.from_numpy(WEIGHTS[name](np.random.default_rng(seed))).to(dtype)


def _array(w: Tensor) -> Array:
    return w.to(torch.float64).numpy()


def _bytes(t: Tensor) -> Array:
    return t.contiguous().view(torch.uint8).numpy()


def _amax(w: Tensor) -> Tensor:
    return w.abs().amax().to(torch.float32)


def about(error: float, energy: float) -> Any:
    """Weights off by a few 2**-24 of themselves move the root of an error by as much of the energy's root."""
    return pytest.approx(error, rel=1e-6, abs=2**-21 * (error * energy) ** 0.5 + 1e-12 * energy)


def _assert_optimal(w: Tensor, codes: Array, amax: Tensor) -> None:
    """No scale of the 126 loses less than a block's (by over 1e-6), and no smaller one ties it."""
    value = float(amax) or 1.0
    best = reference.search_all(_array(w), value)
    loss = reference.block_loss(_array(w), codes, value)
    assert (loss <= best.loss * (1 + 1e-6)).all()
    exact = best.loss == 0  # where losses are exact, so is the choice
    assert (codes[exact] == best.codes[exact]).all()
    assert (codes <= best.codes).all() or np.allclose(
        loss[codes > best.codes], best.loss[codes > best.codes], rtol=1e-12
    )


@every_weight
def test_the_global_scale_is_amax_times_the_float32_reciprocal(name: str, dtype: torch.dtype) -> None:
    amax = _amax(_weight(name, dtype))
    scale = nvfp4.global_scale(amax)
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    if amax > 0:
        assert scale.item() == reference.weight_scale_2(float(amax))
    else:
        assert scale.item() > 0


@every_weight
def test_max_scales_are_the_reference_s(name: str, dtype: torch.dtype) -> None:
    w = _weight(name, dtype)
    found = nvfp4.max_scales(w, nvfp4.global_scale(_amax(w)))
    assert found.dtype == torch.float8_e4m3fn
    wanted = reference.max_block_scales(w.to(torch.float32).numpy(), float(_amax(w)) or 1.0)
    assert (_bytes(found) == wanted).all()


@every_weight
def test_searched_scales_are_the_best_of_all_126(name: str, dtype: torch.dtype) -> None:
    w = _weight(name, dtype)
    _assert_optimal(w, _bytes(nvfp4.mse_scales(w, nvfp4.global_scale(_amax(w)))), _amax(w))


@pytest.mark.parametrize("factor", [1.0, 1.7, 33.0, 5000.0])
@pytest.mark.parametrize(
    "name", ["gaussian", "student-t", "row-scaled", "denormal scales", "zero blocks", "grid"]
)
def test_searched_scales_are_the_best_under_the_larger_amax_of_a_group(name: str, factor: float) -> None:
    w = _weight(name, torch.bfloat16)
    amax = _amax(w) * factor
    _assert_optimal(w, _bytes(nvfp4.mse_scales(w, nvfp4.global_scale(amax))), amax)


@pytest.mark.parametrize("seed", range(2))
def test_searched_scales_are_the_best_on_many_gaussian_blocks(seed: int) -> None:
    generator = np.random.default_rng(seed)
    w = torch.from_numpy(generator.standard_normal((128, 512)) * 0.02).bfloat16()
    _assert_optimal(w, _bytes(nvfp4.mse_scales(w, nvfp4.global_scale(_amax(w)))), _amax(w))


def test_blocks_of_zeros_get_the_contract_s_scales() -> None:
    w = torch.zeros(2, 32, dtype=torch.bfloat16)
    scale_2 = nvfp4.global_scale(torch.tensor(3.0))
    assert (nvfp4.max_scales(w, scale_2).float() == 1).all()
    assert (nvfp4.mse_scales(w, scale_2).float() == 2.0**-9).all()


magnitudes = st.one_of(
    st.floats(0, 8, width=32),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0]),
    st.integers(-40, 3).map(lambda e: 2.0**e),
    st.floats(0, 2.0**-10, width=32),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    block=st.lists(st.tuples(magnitudes, st.booleans()), min_size=16, max_size=16),
    others=st.floats(2.0**-30, 2.0**40),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from(DTYPES[::2]),
)
def test_no_block_beats_the_search(
    block: list[tuple[float, bool]], others: float, exponent: int, dtype: torch.dtype
) -> None:
    values = [-m if negative else m for m, negative in block]
    w = torch.tensor([values], dtype=torch.float64).mul(2.0**exponent).to(dtype)
    amax = torch.maximum(_amax(w), torch.tensor(others * 2.0**exponent, dtype=torch.float32))
    scale_2 = nvfp4.global_scale(amax)
    if scale_2 < 1e-37:
        return
    codes = _bytes(nvfp4.mse_scales(w, scale_2))
    _assert_optimal(w, codes, amax)
    largest = _bytes(nvfp4.max_scales(w, scale_2))
    assert (largest == reference.max_block_scales(w.float().numpy(), float(amax))).all()


@every_weight
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_packed_bytes_are_the_reference_s(name: str, dtype: torch.dtype, scale: str) -> None:
    w = _weight(name, dtype)
    packed = nvfp4.quantize_weight(w, _amax(w), scale)
    step = reference.e4m3_decode(_bytes(packed.scale)).astype(np.float32) * packed.scale_2.numpy()
    wanted = reference.pack(reference.quantize_codes(w.to(torch.float32).numpy(), step, np.float32))
    assert packed.weight.dtype == torch.uint8
    assert (packed.weight.numpy() == wanted).all()


def test_the_even_element_is_in_the_low_nibble_and_signs_are_kept() -> None:
    row = [6.0, -0.5, 0.0, -0.0, 1.0, -1.5, 2.0, 3.0, -4.0, -6.0, 0.1, -0.1, 5.0, -5.0, 2.5, 1.75]
    codes = [7, 9, 0, 0, 2, 11, 4, 5, 14, 15, 0, 8, 6, 14, 4, 4]
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    packed = nvfp4.pack(torch.tensor([row]), one, torch.tensor(1.0))
    assert packed[0].tolist() == [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]


def test_rounding_goes_to_the_nearest_with_ties_to_even_and_saturates() -> None:
    below = [0.0, 0.25, 1.25, 2.5, 5.0, 100.0, 0.2500001, 0.2499999, 4.9999995, 5.0000005]
    assert nvfp4.round_e2m1(torch.tensor(below)).tolist() == [0, 0, 1, 2, 4, 6, 0.5, 0, 4, 6]
    assert nvfp4.round_e2m1(torch.tensor([0.75, 1.75, 3.5])).tolist() == [1, 2, 4]


@every_weight
def test_dequantize_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    w = _weight(name, dtype)
    packed = nvfp4.quantize_weight(w, _amax(w), "mse")
    found = nvfp4.dequantize(packed)
    assert found.dtype == torch.float32
    assert found.shape == w.shape
    wanted = reference.dequantize(packed.weight.numpy(), _bytes(packed.scale), float(packed.scale_2))
    # Two float32 roundings; the exact product is the reference's.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2**-22, atol=1e-44)


@every_weight
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_the_error_is_that_of_the_packed_bytes(name: str, dtype: torch.dtype, scale: str) -> None:
    w = _weight(name, dtype)
    found = nvfp4.quantize_measured(w, _amax(w), scale)
    assert found.error.dtype == found.energy.dtype == torch.float64
    assert found.error.shape == found.energy.shape == ()
    held = reference.dequantize(found.weight.numpy(), _bytes(found.scale), float(found.scale_2))
    energy = np.square(_array(w)).sum()
    assert found.error.item() == about(np.square(_array(w) - held).sum(), energy)
    assert found.energy.item() == pytest.approx(energy, rel=1e-6)


@pytest.mark.parametrize("scale", ["max", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_experts_gives_what_each_gives_alone(scale: str, dtype: torch.dtype) -> None:
    names = ["gaussian", "zero blocks", "all zeros", "row-scaled", "denormal scales", "student-t"]
    w = torch.stack([_weight(name, dtype) for name in names])
    amax = torch.stack([_amax(e) for e in w])
    batch = nvfp4.quantize_measured(w, amax, scale)
    assert batch.weight.shape == (6, ROWS, WIDTH // 2)
    assert batch.scale.shape == (6, ROWS, WIDTH // 16)
    assert batch.scale_2.shape == batch.error.shape == batch.energy.shape == (6,)
    for e in range(len(w)):
        alone = nvfp4.quantize_measured(w[e], amax[e], scale)
        assert torch.equal(batch.weight[e], alone.weight)
        assert (_bytes(batch.scale[e]) == _bytes(alone.scale)).all()
        assert torch.equal(batch.scale_2[e], alone.scale_2)
        assert torch.equal(nvfp4.dequantize(batch)[e], nvfp4.dequantize(alone))
        assert torch.equal(batch.error[e], alone.error)
        assert torch.equal(batch.energy[e], alone.energy)


@pytest.mark.parametrize("scale", ["max", "mse"])
def test_a_transposed_view_gives_what_its_copy_gives(scale: str) -> None:
    w = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0)).bfloat16().transpose(1, 2)
    amax = w.abs().amax((1, 2)).float()
    view, copy = (nvfp4.quantize_weight(t, amax, scale) for t in (w, w.contiguous()))
    assert torch.equal(view.weight, copy.weight)
    assert (_bytes(view.scale) == _bytes(copy.scale)).all()


def test_a_large_weight_gives_what_its_rows_give() -> None:
    w = torch.randn(600, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = nvfp4.quantize_weight(w, _amax(w), "mse")
    for rows in (slice(0, 100), slice(490, 530), slice(590, 600)):
        part = nvfp4.quantize_weight(w[rows], _amax(w), "mse")
        assert torch.equal(whole.weight[rows], part.weight)
        assert (_bytes(whole.scale[rows]) == _bytes(part.scale)).all()


@pytest.mark.parametrize("scale", ["max", "mse"])
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (0, 4, 32)])
def test_empty_tensors(shape: tuple[int, ...], scale: str) -> None:
    w = torch.empty(shape, dtype=torch.bfloat16)
    packed = nvfp4.quantize_measured(w, torch.ones(shape[:-2]), scale)
    assert packed.weight.shape == (*shape[:-1], shape[-1] // 2)
    assert packed.scale.shape == (*shape[:-1], shape[-1] // 16)
    assert packed.error.shape == packed.energy.shape == shape[:-2]
    assert not packed.error.any()
    assert nvfp4.dequantize(packed).shape == shape


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_searching_never_loses_to_the_max_recipe(name: str) -> None:
    w = _weight(name, torch.float32)
    amax = float(_amax(w)) or 1.0
    scale_2 = nvfp4.global_scale(_amax(w))
    searched, largest = (
        reference.block_loss(_array(w), _bytes(f(w, scale_2)), amax)
        for f in (nvfp4.mse_scales, nvfp4.max_scales)
    )
    assert (searched <= largest * (1 + 1e-6)).all()


def test_quantizing_what_was_dequantized_changes_nothing() -> None:
    w = _weight("gaussian", torch.float32)
    packed = nvfp4.quantize_weight(w, _amax(w), "mse")
    again = nvfp4.quantize_weight(nvfp4.dequantize(packed), _amax(w), "mse")
    np.testing.assert_allclose(nvfp4.dequantize(again), nvfp4.dequantize(packed), rtol=1e-6)


def _fake_quantized_activation(x: Array, amax: float) -> Array:
    """Section 1 of the contract, block by block in float32, without clamping from below."""
    scale_2 = reference.weight_scale_2(amax)
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            ratio = np.float32(np.abs(block).max()) / np.float32(6) / scale_2
            code = 0 if ratio <= 2.0**-10 else int(reference.e4m3_codes(np.minimum(ratio, 448))[()])
            step = np.float32(reference.e4m3_decode(np.array(code, dtype=np.uint8))) * scale_2
            if step > 0:
                grid = reference.SIGNED_E2M1[reference.quantize_codes(block, np.array(step), np.float32)]
                out[row, start : start + 16] = grid * step
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["gaussian", "student-t", "zero blocks", "row-scaled", "one outlier", "uniform"]
)
@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_activations_are_rounded_as_a_kernel_does(name: str, dtype: torch.dtype, clip: float) -> None:
    x = _weight(name, dtype)
    amax = _amax(x) * clip
    found = nvfp4.fake_quantize_activation(x, amax)
    assert found.dtype == dtype
    assert found.shape == x.shape
    wanted = _fake_quantized_activation(x.to(torch.float32).numpy(), float(amax))
    np.testing.assert_array_equal(found.float().numpy(), torch.from_numpy(wanted).to(dtype).float().numpy())


def test_an_activation_by_hand() -> None:
    x = torch.tensor([[6.0, -3.1, 0.2, 0.3, 12.0, 4.9] + [0.0] * 10])
    # input_scale 1; the block's maximum 12 needs scale 2: the grid is 0, 1, 2, 3, 4, 6, 8, 12.
    found = nvfp4.fake_quantize_activation(x, torch.tensor(2688.0))
    assert found[0, :7].tolist() == [6, -3, 0, 0, 12, 4, 0]
    clipped = nvfp4.fake_quantize_activation(torch.full((1, 16), 1e6), torch.tensor(2688.0))
    assert (clipped == 6 * 448).all()


def test_activations_of_any_rank_and_without_tokens() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    flat = nvfp4.fake_quantize_activation(x.reshape(6, 32), _amax(x))
    assert torch.equal(nvfp4.fake_quantize_activation(x, _amax(x)), flat.reshape(2, 3, 32))
    assert nvfp4.fake_quantize_activation(torch.empty(0, 32), torch.tensor(1.0)).shape == (0, 32)


def test_fp8_by_hand() -> None:
    x = torch.tensor([448.0, -1000.0, 1.0, 17.0, 0.0, 2.0**-9, 2.0**-11])
    assert fp8.fake_quantize(x, torch.tensor(448.0)).tolist() == [448, -448, 1, 16, 0, 2.0**-9, 0]
    assert fp8.fake_quantize(torch.tensor([1.0, 0.3]), torch.tensor(1.0)).tolist() == pytest.approx(
        [1.0, 128 / 448]  # 0.3 * 448 lies between 128 and 144
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_agrees_with_the_reference(dtype: torch.dtype) -> None:
    x = _weight("student-t", dtype)
    found = fp8.fake_quantize(x, _amax(x))
    assert found.dtype == dtype
    scale = np.float32(float(_amax(x))) / np.float32(448)
    ratio = np.abs(x.float().numpy()) / scale
    codes = np.where(ratio <= 2.0**-10, 0, reference.e4m3_codes(ratio))
    wanted = np.copysign(reference.e4m3_decode(codes).astype(np.float32) * scale, x.float().numpy())
    np.testing.assert_array_equal(found.float().numpy(), torch.from_numpy(wanted).to(dtype).float().numpy())


@pytest.mark.parametrize("function", [nvfp4.fake_quantize_activation, fp8.fake_quantize])
def test_zero_amaxes_and_zero_inputs_stay_finite(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert (function(torch.zeros(2, 32), torch.tensor(0.0)) == 0).all()
    assert torch.isfinite(function(torch.ones(2, 32), torch.tensor(0.0))).all()


def test_the_candidates_are_the_126_positive_finite_values() -> None:
    np.testing.assert_array_equal(nvfp4.e4m3_values().numpy(), reference.POSITIVE_E4M3)
