"""The operators of the dialect: what they compute, and that their shape rules tell the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxq.errors import VerifyError
from fxq.graph import dialect, edit
from fxq.graph.text import dump, parse
from fxq.graph.verify import verify
from fxq.numbers import fp8, nvfp4

E, OUT, IN = 5, 32, 48
SCALAR = torch.tensor(3.0)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _loop(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """One matrix-vector product a token."""
    y = torch.zeros(len(x), w.shape[1], dtype=x.dtype)
    for t, e in enumerate(ids.tolist()):
        if e < len(w):
            y[t] = (w[e].double() @ x[t].double()).to(x.dtype)
    return y


IDS = {
    "every expert": [0, 1, 2, 3, 4, 0, 1, 2],
    "unsorted": [4, 0, 4, 2, 2, 0, 4],
    "experts without tokens": [1, 1, 1, 3],
    "one expert": [2] * 9,
    "one token": [4],
    "no expert for some": [E, 0, E + 3, 1, E, 4],
    "no expert for any": [E, E, E + 1],
    "no tokens": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_expert_linear_is_a_product_a_token(
    ids: list[int], dtype: torch.dtype, integers: torch.dtype
) -> None:
    x, w = _random(len(ids), IN, dtype=dtype), _random(E, OUT, IN, dtype=dtype)
    found = dialect.EXPERT_LINEAR(x, w, torch.tensor(ids, dtype=integers))
    wanted = _loop(x, w, torch.tensor(ids, dtype=integers))
    assert found.shape == (len(ids), OUT)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * 10)
    assert (found[torch.tensor(ids, dtype=torch.int64) >= E] == 0).all()


def test_expert_linear_takes_a_transposed_weight() -> None:
    x, w, ids = _random(6, IN), _random(E, IN, OUT), torch.tensor([3, 0, 0, 4, 1, 3])
    found = dialect.EXPERT_LINEAR(x, w.transpose(1, 2), ids)
    torch.testing.assert_close(found, _loop(x, w.transpose(1, 2), ids), rtol=1e-5, atol=1e-4)


def test_expert_linear_does_not_change_its_arguments() -> None:
    x, w, ids = _random(4, IN), _random(E, OUT, IN), torch.tensor([3, 0, 0, 4])
    before = [t.clone() for t in (x, w, ids)]
    dialect.EXPERT_LINEAR(x, w, ids)
    assert all(torch.equal(a, b) for a, b in zip((x, w, ids), before, strict=True))


def test_expert_linear_never_gathers_weights_per_token() -> None:
    """With weights that must not be multiplied by a token of another expert: NaN in one stays there."""
    w = _random(E, OUT, IN)
    w[2] = torch.nan
    y = dialect.EXPERT_LINEAR(_random(4, IN), w, torch.tensor([0, 1, 3, 4]))
    assert torch.isfinite(y).all()


def test_slice_is_a_view_of_one_expert() -> None:
    w = _random(E, OUT, IN)
    piece = dialect.SLICE(w, 3)
    assert torch.equal(piece, w[3])
    assert piece.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    w[3, 0, 0] = 77
    assert piece[0, 0] == 77


@pytest.mark.parametrize("expert", [E, -E - 1])
def test_slice_refuses_an_expert_that_is_not_there(expert: int) -> None:
    with pytest.raises(IndexError):
        dialect.SLICE(_random(E, OUT, IN), expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_amax_is_the_largest_magnitude_in_float32(dtype: torch.dtype) -> None:
    t = torch.tensor([[1.0, -7.5], [3.0, 0.0]], dtype=dtype)
    found = dialect.AMAX(t)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found == 7.5


def test_sync_is_the_largest_of_its_inputs() -> None:
    assert dialect.SYNC([torch.tensor(v) for v in (1.0, 4.0, 2.0)]) == 4.0
    assert dialect.SYNC([torch.tensor(2.0)]) == 2.0


def test_stack_undoes_slice() -> None:
    w = _random(E, OUT, IN)
    assert torch.equal(dialect.STACK([dialect.SLICE(w, e) for e in range(E)]), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_quantize_of_a_weight_is_pack_and_unpack(scale: str, dtype: torch.dtype) -> None:
    w = _random(OUT, IN, dtype=dtype)
    amax = w.abs().amax().float() * 1.5
    found = dialect.QUANTIZE(w, amax, format="nvfp4", scale=scale)
    assert found.dtype == dtype
    assert torch.equal(found, nvfp4.dequantize(nvfp4.quantize_weight(w, amax, scale)).to(dtype))
    assert not torch.equal(found, w)


def test_quantize_of_inputs_and_caches() -> None:
    x = _random(2, 3, IN, dtype=torch.bfloat16)
    inputs = dialect.QUANTIZE(x, SCALAR, format="nvfp4", scale="dynamic")
    assert torch.equal(inputs, nvfp4.fake_quantize_activation(x, SCALAR))
    cache = dialect.QUANTIZE(x, SCALAR, format="fp8", scale="max")
    assert torch.equal(cache, fp8.fake_quantize(x, SCALAR))


def test_pack_is_weight_scales_and_scale() -> None:
    w = _random(OUT, IN)
    packed = nvfp4.quantize_weight(w, w.abs().amax(), "mse")
    weight, scale, scale_2 = dialect.PACK(w, w.abs().amax(), format="nvfp4", scale="mse")
    assert torch.equal(weight, packed.weight)
    assert torch.equal(scale_2, packed.scale_2)
    assert torch.equal(scale.view(torch.uint8), packed.scale.view(torch.uint8))


CALLS: dict[str, Callable[[str], Any]] = {
    "expert_linear": lambda d: dialect.EXPERT_LINEAR(
        _random(7, IN).to(d), _random(E, OUT, IN).to(d), torch.zeros(7, dtype=torch.int64, device=d)
    ),
    "slice": lambda d: dialect.SLICE(_random(E, OUT, IN).bfloat16().to(d), 2),
    "slice of a transposed weight": lambda d: dialect.SLICE(_random(E, IN, OUT).to(d).transpose(1, 2), 2),
    "amax": lambda d: dialect.AMAX(_random(OUT, IN).bfloat16().to(d)),
    "sync": lambda d: dialect.SYNC([SCALAR.to(d), SCALAR.to(d)]),
    "quantize weight": lambda d: dialect.QUANTIZE(
        _random(OUT, IN).bfloat16().to(d), SCALAR.to(d), format="nvfp4", scale="mse"
    ),
    "quantize input": lambda d: dialect.QUANTIZE(
        _random(2, 3, IN).bfloat16().to(d), SCALAR.to(d), format="nvfp4", scale="dynamic"
    ),
    "quantize cache": lambda d: dialect.QUANTIZE(
        _random(1, 2, 3, 16).to(d), SCALAR.to(d), format="fp8", scale="max"
    ),
    "stack": lambda d: dialect.STACK([_random(OUT, IN).to(d)] * 3),
    "pack fp8": lambda d: dialect.PACK(_random(OUT, IN).to(d), SCALAR.to(d), format="fp8", scale="max"),
    "pack nvfp4": lambda d: dialect.PACK(_random(OUT, IN).to(d), SCALAR.to(d), format="nvfp4", scale="max"),
}


@pytest.mark.parametrize("name", CALLS)
def test_shape_rules_say_what_the_operator_returns(name: str) -> None:
    real, meta = CALLS[name]("cpu"), CALLS[name]("meta")
    pairs = list(zip(real, meta, strict=True)) if isinstance(real, (list, tuple)) else [(real, meta)]
    for a, b in pairs:
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert b.device.type == "meta"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    "call",
    [lambda: dialect.VALUE("x_amax"), lambda: dialect.LOAD("lm_head.weight", shape=[2], dtype=torch.float32)],
)
def test_operators_of_the_checkpoint_program_say_who_runs_them(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="interpreter"):
        call()


SCALED = dialect.operator(
    "acme::scaled(Tensor t, Tensor by) -> Tensor",
    run=lambda t, by: t * by.to(t.dtype),
    shape=lambda t, by: dialect.tensor_type(t.shape, t.dtype),
    rules=((lambda node: dialect.shape_at(node, 1) == (), "expected a scale of shape []"),),
)
LOGGED = dialect.operator("acme::logged(str name, Tensor t) -> ()")
FOREIGN = """\
%x : bf16[4,32] = placeholder()
%by : f32[] = @by
%y : bf16[4,32] = acme.scaled(%x, %by)
%seen : none = acme.logged('y', %y)
return [%y]
"""


def test_an_operator_of_another_package_prints_parses_verifies_and_runs() -> None:
    graph = parse(FOREIGN)
    assert dump(graph) == FOREIGN
    verify(graph)
    x, by = _random(4, 32).bfloat16(), torch.tensor(0.5)
    assert torch.equal(SCALED(x, by), x * 0.5)
    assert SCALED(x.to("meta"), by.to("meta")).shape == x.shape


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scaled(%x, %by)", "scaled(%x, %x)", "%y: expected a scale of shape []"),
        ("scaled(%x, %by)", "scaled(%x)", "%y: "),
        ("%y : bf16[4,32]", "%y : f32[4,32]", "%y: expected type bf16[4,32], found f32[4,32]"),
    ],
)
def test_the_rules_of_an_operator_of_another_package_hold(old: str, new: str, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(parse(FOREIGN.replace(old, new)))
    assert str(caught.value).startswith(message)


def test_an_operator_without_a_result_is_kept_for_its_effect() -> None:
    graph = parse(FOREIGN.replace("return [%y]", "return [%x]"))
    edit.tidy(graph)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [SCALED, LOGGED]
    unused = "%y2 : bf16[4,32] = acme.scaled(%y, %by)\nreturn [%y]"
    edit.tidy(graph := parse(FOREIGN.replace("return [%y]", unused)))
    assert [node.name for node in graph.nodes if node.op == "call_function"] == ["y", "seen"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(RuntimeError):
        dialect.operator("slice(Tensor t) -> Tensor", run=lambda t: t, shape=lambda t: t)
