"""Every implementation gives the bytes of the float64 brute force, whatever the layout, dtype or number of
threads; what cannot be packed is refused.

Triton runs on the GPU where there is one, else in its interpreter (conftest.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.errors import SourceError
from fxq.numbers import kernels, nvfp4
from fxq.numbers.kernels import eager
from fxq.run.simulate import simulation
from tests import reference
from tests.numbers.test_nvfp4 import WEIGHTS, about
from tests.run import test_streaming

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def _triton() -> ModuleType:
    pytest.importorskip("triton")
    from fxq.numbers.kernels import gpu

    if not CUDA:
        gpu._TILES = 1  # the interpreter takes as long over an empty tile
    return gpu


def _numba() -> ModuleType:
    pytest.importorskip("numba")
    from fxq.numbers.kernels import cpu

    return cpu


IMPLEMENTATIONS: dict[str, Callable[[], ModuleType]] = {
    "eager": lambda: eager,
    "numba": _numba,
    "triton": _triton,
}


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def quantize(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return _quantize(request.param)


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def sums(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return _sums(request.param)


def _quantize(name: str) -> Callable[..., Any]:
    """(scales, packed bytes or None, whether everything was finite) by one implementation."""
    quantize = _moved(name)

    def run(w: Tensor, amax: Tensor, search: bool = True, pack: bool = True) -> Any:
        scales, packed, sums, finite = quantize(w, amax, search, pack, False)
        assert sums is None
        return scales.cpu(), None if packed is None else packed.cpu(), finite

    return run


def _sums(name: str) -> Callable[..., Tensor]:
    """(squared error, energy) float64 [2, n] by one implementation."""
    quantize = _moved(name)

    def run(w: Tensor, amax: Tensor, search: bool = True) -> Tensor:
        sums: Tensor = quantize(w, amax, search, True, True)[2]
        return sums.cpu()

    return run


def _moved(name: str) -> Callable[..., Any]:
    module = IMPLEMENTATIONS[name]()
    device = DEVICE if name == "triton" else torch.device("cpu")

    def run(w: Tensor, amax: Tensor, search: bool, pack: bool, measure: bool) -> Any:
        scale_2 = nvfp4.global_scale(amax)
        whole = w.as_strided((w.untyped_storage().nbytes() // w.element_size(),), (1,), 0)
        moved = whole.to(device).as_strided(w.shape, w.stride(), w.storage_offset())
        return module.quantize(moved, scale_2.to(device), search, pack, measure)

    return run


def _mixture(dtype: torch.dtype, rows: int = 2, width: int = 48) -> Tensor:
    """A slice [rows, width] of every distribution; those that the dtype cannot hold are left out."""
    generator = np.random.default_rng(7)
    slices = [torch.from_numpy(make(generator)[:rows, :width]).to(dtype) for make in WEIGHTS.values()]
    return torch.stack([s for s in slices if torch.isfinite(s).all()])


def _amax(w: Tensor) -> Tensor:
    return w.abs().amax((-2, -1)).to(torch.float32)


def _assert_right(w: Tensor, amax: Tensor, scales: Tensor, packed: Tensor) -> None:
    """Scales lose the least of all 126, the smallest of equals; bytes are the nearest grid points."""
    for e in range(len(w)):
        value, matrix, codes = float(amax[e]) or 1.0, w[e].double().numpy(), scales[e].numpy()
        best = reference.search_all(matrix, value)
        loss = reference.block_loss(matrix, codes, value)
        assert (loss <= best.loss * (1 + 1e-12)).all()
        np.testing.assert_array_equal(codes[best.loss == 0], best.codes[best.loss == 0])
        assert (np.abs(loss - best.loss)[codes != best.codes] <= 1e-12 * loss[codes != best.codes]).all()
        unit = nvfp4.global_scale(amax[e]).numpy()
        step = reference.e4m3_decode(codes).astype(np.float32) * unit
        wanted = reference.pack(reference.quantize_codes(w[e].float().numpy(), step, np.float32))
        np.testing.assert_array_equal(packed[e].numpy(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_finds_the_best_of_all_126(
    quantize: Callable[..., Any], dtype: torch.dtype
) -> None:
    w = _mixture(dtype)
    scales, packed, finite = quantize(w, _amax(w))
    assert finite
    _assert_right(w, _amax(w), scales, packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_maxima_are_the_reference_s(quantize: Callable[..., Any], dtype: torch.dtype) -> None:
    w = _mixture(dtype)
    amax = _amax(w)
    scales, packed, finite = quantize(w, amax, search=False)
    assert finite
    for e in range(len(w)):
        wanted = reference.max_block_scales(w[e].float().numpy(), float(amax[e]) or 1.0)
        np.testing.assert_array_equal(scales[e].numpy(), wanted)
        step = reference.e4m3_decode(wanted).astype(np.float32) * nvfp4.global_scale(amax[e]).numpy()
        codes = reference.quantize_codes(w[e].float().numpy(), step, np.float32)
        np.testing.assert_array_equal(packed[e].numpy(), reference.pack(codes))


@pytest.mark.parametrize("factor", [1.0, *(pytest.param(f, marks=pytest.mark.slow) for f in (1e5, 0.3))])
@pytest.mark.parametrize("search", [True, False])
def test_errors_and_energies_are_those_of_the_bytes(
    sums: Callable[..., Tensor], search: bool, factor: float
) -> None:
    w = _mixture(torch.bfloat16, rows=1)[[0, 7, 10, 12, 14, 15]]
    amax = _amax(w) * factor
    scales, packed, _ = _quantize("eager")(w, amax, search)
    found = sums(w, amax, search)
    assert found.dtype == torch.float64
    for e, (error, energy) in enumerate(found.T.tolist()):
        unit = float(nvfp4.global_scale(amax[e]))
        lost = w[e].double().numpy() - reference.dequantize(packed[e].numpy(), scales[e].numpy(), unit)
        wanted = np.square(w[e].double().numpy()).sum()
        assert energy == pytest.approx(wanted, rel=1e-6)
        assert error == about(np.square(lost).sum(), wanted)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("layout", ["rows", pytest.param("stored transposed", marks=pytest.mark.slow)])
def test_the_error_of_a_slice_is_the_same_in_any_batch(
    sums: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, search: bool, layout: str
) -> None:
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr(_triton(), "_ADDED", 2)  # several programs a slice, several levels of sums
    w = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    place = LAYOUTS.get(layout, Tensor.contiguous)
    amax = _amax(w)
    together = sums(place(w), amax, search)
    for chosen in ([2], [1, 0]):
        assert torch.equal(sums(place(w[chosen]), amax[chosen], search), together[:, chosen])


@pytest.mark.parametrize("factor", [3.0, 1000.0, 1e5, 0.3])
def test_the_amax_of_a_group_is_not_the_slice_s(quantize: Callable[..., Any], factor: float) -> None:
    """A larger one puts scales into the subnormals of FP8, a smaller one clips."""
    w = _mixture(torch.bfloat16)[[0, 10]]
    amax = _amax(w) * factor
    scales, packed, _ = quantize(w, amax)
    _assert_right(w, amax, scales, packed)


def test_scales_alone_are_those_of_a_packed_weight(quantize: Callable[..., Any]) -> None:
    w = _mixture(torch.bfloat16)[:3]
    scales, packed, finite = quantize(w, _amax(w), pack=False)
    assert packed is None
    assert finite
    assert torch.equal(scales, quantize(w, _amax(w))[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stored transposed": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "stored slice last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "half of the columns": lambda w: torch.cat([w, w * 3], -1)[..., : w.shape[-1]],
    "every second column": lambda w: w.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda w: w.repeat_interleave(2, -2)[:, ::2],
    "misaligned": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
    "one row for all": lambda w: w[:, :1].expand(w.shape),
}


def test_negative_zeros_have_no_sign(quantize: Callable[..., Any]) -> None:
    w = torch.tensor([1.0, -1.0, 0.0, -0.0] * 8, dtype=torch.bfloat16).view(1, 1, 32)
    for search in (True, False):
        codes = quantize(w, _amax(w), search=search)[1]
        assert (codes[..., 1::2] == 0).all()
        assert (codes[..., 0::2] >> 4 == codes[..., 0::2] & 7 | 8).all()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_view_gives_what_its_copy_gives(quantize: Callable[..., Any], layout: str) -> None:
    w = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    view = LAYOUTS[layout](w)
    copy = view.clone(memory_format=torch.contiguous_format)
    assert view.stride() != copy.stride() or layout == "misaligned"
    for found, wanted in zip(quantize(view, _amax(w)), _quantize("eager")(copy, _amax(w)), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


def test_many_slices_need_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _triton()
    w = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted = _quantize("eager")(w, _amax(w))
    monkeypatch.setattr(gpu, "_GRID_Y", 2)
    found = _quantize("triton")(w, _amax(w))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("shape", [(0, 4, 32), (2, 0, 32), (2, 3, 0), (1, 1, 16)])
def test_empty_and_tiny(quantize: Callable[..., Any], shape: tuple[int, ...]) -> None:
    scales, packed, finite = quantize(torch.ones(shape, dtype=torch.bfloat16), torch.ones(shape[0]))
    assert scales.shape == (*shape[:2], shape[2] // 16)
    assert packed.shape == (*shape[:2], shape[2] // 2)
    assert finite


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("search", [True, False])
def test_what_is_not_finite_is_reported(quantize: Callable[..., Any], value: float, search: bool) -> None:
    w = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    amax = _amax(w)
    assert quantize(w, amax, search=search)[2]
    assert not quantize(w, torch.stack([amax[0], torch.tensor(value).abs()]), search=search)[2]
    w[1, 2, 63] = value
    assert not quantize(w, amax, search=search)[2]


def test_the_message_says_where() -> None:
    w = torch.ones(3, 4, 32)
    w[1, 2, 17] = float("nan")
    with pytest.raises(SourceError, match="found nan in slice 1, row 2, column 17"):
        nvfp4.quantize_weight(w, torch.ones(3), "mse")
    with pytest.raises(SourceError, match=r"found nan in slice 0, row 2, column 17"):
        nvfp4.mse_scales(w[1], torch.tensor(1.0))
    with pytest.raises(SourceError, match="finite amaxes, found one that gives the scale inf for slice 2"):
        nvfp4.quantize_weight(torch.ones(3, 4, 32), torch.tensor([1.0, 2.0, float("inf")]), "max")
    with pytest.raises(ValueError, match="multiple of 16 weights, found 24"):
        nvfp4.quantize_weight(torch.ones(4, 24), torch.tensor(1.0), "max")


magnitudes = st.one_of(
    st.floats(0, 8, width=32),
    st.sampled_from([*reference.E2M1.tolist(), *reference.MIDPOINTS.tolist(), 7.0, 4.5, 2.25]),
    st.integers(-40, 3).map(lambda e: 2.0**e),
    st.floats(0, 2.0**-10, width=32),
    st.sampled_from([4.0, 2.0, 6.0, 1.75, 3.5, 2.25, 4.5]).flatmap(
        lambda x: st.integers(-3, 3).map(lambda ulps: float(np.float32(x) * np.float32(1 + ulps * 2.0**-23)))
    ),
)
blocks = st.lists(
    st.lists(st.tuples(magnitudes, st.booleans()), min_size=16, max_size=16), min_size=1, max_size=8
)


@pytest.mark.parametrize(("name", "examples"), [("eager", 60), ("numba", 120), ("triton", 6)])
def test_no_counterexample_is_found(name: str, examples: int) -> None:
    run = _quantize(name)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        rows=blocks,
        others=st.one_of(st.floats(2.0**-3, 2.0**14), st.integers(-3, 30).map(lambda e: 2688 * 2.0**-e)),
        exponent=st.integers(-100, 60),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    )
    def hunt(rows: list[list[tuple[float, bool]]], others: float, exponent: int, dtype: torch.dtype) -> None:
        values = [[-m if negative else m for m, negative in row] for row in rows]
        w = torch.tensor([values], dtype=torch.float64).mul(2.0**exponent).to(dtype)
        amax = torch.maximum(_amax(w), torch.tensor([others * 2.0**exponent], dtype=torch.float32))
        _assert_right(w, amax, *run(w, amax)[:2])

    hunt()


def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = _numba()
    w = torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = _quantize("eager")(w, _amax(w))
    before = torch.get_num_threads()
    try:
        for threads, chunk in [(1, 1 << 15), (2, 1 << 15), (3, 704), (2, 16)]:
            torch.set_num_threads(threads)
            monkeypatch.setattr(cpu, "PART", chunk)
            monkeypatch.setattr(cpu, "CONVERTED", chunk)
            monkeypatch.setattr(cpu, "STRIDED_COLUMNS", min(48, chunk))
            for layout in (w, w.transpose(1, 2).contiguous().transpose(1, 2), w.half(), w.float()):
                found = _quantize("numba")(layout, _amax(w))
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
    finally:
        torch.set_num_threads(before)


def _digest(seed: int) -> int:
    w = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scales, packed, _ = _quantize("numba")(w, _amax(w))
    return int(scales.sum()) * 1_000_003 + int(packed.sum())


def test_calls_from_several_threads_and_after_a_fork() -> None:
    wanted = [_digest(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(_digest, range(6))) == wanted
    with multiprocessing.get_context("fork").Pool(2) as processes:
        assert processes.map(_digest, range(6)) == wanted


@pytest.fixture
def nothing_found() -> Iterator[None]:
    kernels._module.cache_clear()
    yield
    kernels._module.cache_clear()


@pytest.mark.usefixtures("nothing_found")
@pytest.mark.parametrize("failure", ["absent", "unusable"])
def test_without_numba_torch_operators_serve(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def unusable(name: str) -> ModuleType:
        raise ImportError("Numba needs NumPy 2.0 or less")

    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    if failure == "absent":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(importlib, "import_module", unusable)
    assert kernels.implementation(w) is eager
    found = nvfp4.quantize_weight(w, w.abs().amax().float(), "mse")
    monkeypatch.undo()
    kernels._module.cache_clear()
    wanted = nvfp4.quantize_weight(w, w.abs().amax().float(), "mse")
    assert torch.equal(found.weight, wanted.weight)


def test_numba_serves_the_cpu_and_other_dtypes_go_to_torch() -> None:
    cpu = _numba()
    for dtype in DTYPES:
        assert kernels.implementation(torch.empty(1, dtype=dtype)) is cpu
    assert kernels.implementation(torch.empty(1, dtype=torch.float64)) is eager
    assert kernels.implementation(torch.empty(1, device="meta")) is eager


def test_without_a_writable_cache_the_kernel_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    from fxq.numbers.kernels import cpu_jit

    compile_ = numba.njit

    def njit(*args: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return compile_(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert cpu_jit._jit(lambda x: x + 1)(2) == 3


def test_the_simulator_quantizes_a_fused_weight_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    program, source = test_streaming._experts("mse")
    w = source.tensors["w"]
    program.values["x_amax"] = torch.tensor(1.5)
    launched: list[tuple[int, ...]] = []
    quantize = kernels.quantize

    def counted(w: Tensor, *args: Any, **kwargs: Any) -> Any:
        launched.append(tuple(w.shape))
        return quantize(w, *args, **kwargs)

    monkeypatch.setattr(kernels, "quantize", counted)
    simulation(program, source, torch.device("cpu")).run_batches(test_streaming.BATCHES)
    assert launched == [tuple(w.shape)]
