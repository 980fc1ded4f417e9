"""Statistics of activations: what calibration finds is what all tokens together show, in float64."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fxq.errors import SourceError, SpecError
from fxq.graph import dialect
from fxq.graph.hub import Hub
from fxq.graph.program import Program
from fxq.graph.text import parse
from fxq.run.statistics import Calibration, Prefix
from tests import reference

CPU = torch.device("cpu")
WIDTH, EXPERTS = 32, 4
PREFIXES: tuple[Prefix, ...] = ("original", "quantized")


def _over(t: Tensor) -> Tensor:
    return (t.flatten(0, -2) > 0.5).sum(0)


# A statistic of a third party: how often each column is above one half.
OVER = dialect.operator(
    "test_statistics::over(Tensor t) -> Tensor",
    run=_over,
    shape=lambda t: dialect.tensor_type(t.shape[-1:], torch.int64),
    fold=torch.add,
)

# Tokens go to expert id % 5: 4 is none, and no batch below has a token for expert 3.
INPUTS = """\
%ids : i64[2,3] = placeholder()
%emb : f32[40,32] = @emb
%x : f32[2,3,32] = aten.embedding(%emb, %ids)
%rows : f32[6,32] = aten.view(%x, [-1, 32])
%flat : i64[6] = aten.view(%ids, [-1])
%e : i64[6] = aten.remainder.Scalar(%flat, 5)
"""
STATISTICS = {
    "amax": "f32[] = fxq.amax(%x)",
    "gram": "f32[32,32] = fxq.gram(%x)",
    "gram_blocks": "f32[2,16,16] = fxq.gram_blocks(%x)",
    "absmax": "f32[32] = fxq.absmax(%x)",
    "square_sum": "f32[32] = fxq.square_sum(%x)",
    "over": "i64[32] = test_statistics.over(%x)",
    "expert_gram": "f32[4,32,32] = fxq.expert_gram(%rows, %e, experts=4)",
    "expert_gram_blocks": "f32[4,2,16,16] = fxq.expert_gram_blocks(%rows, %e, experts=4)",
    "expert_square_sum": "f32[4,32] = fxq.expert_square_sum(%rows, %e, experts=4)",
    "expert_tokens": "i64[4] = fxq.expert_tokens(%e, experts=4)",
    "tokens": "i64[] = fxq.tokens(%x)",
    "split_gram": "f32[2,32,32] = fxq.split_gram(%x, %x)",
    "expert_split_gram": "f32[4,2,32,32] = fxq.expert_split_gram(%rows, %rows, %e, experts=4)",
}
COUNTS = ("over", "expert_tokens", "tokens")


class Source:
    """Weights by name, counted as they are read."""

    hub = Hub()
    concurrent = False
    bytes_read = 0

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.reads: Counter[str] = Counter()

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone() if out is None else out.copy_(self.tensors[name])

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        raise AssertionError(name)

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        raise AssertionError(key)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _ids(*rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


BATCHES = [
    _ids([0, 1, 2], [12, 5, 34]),
    _ids([7]),
    _ids([10, 11, 16, 2, 0, 1, 31], [39, 4, 20, 22, 7, 7, 6]),
    _ids([24, 9]),
]
TOKENS = torch.cat([batch.flatten() for batch in BATCHES])


def _found(text: str, source: Source, prefix: Prefix = "original") -> dict[str, Tensor]:
    program = Program(parse(text))
    Calibration(program, source, CPU, prefix=prefix).run(BATCHES)
    assert source.reads == Counter(source.tensors.keys())
    return program.values


def _blocks(gram: Tensor) -> Tensor:
    return torch.stack([gram[i : i + 16, i : i + 16] for i in range(0, len(gram), 16)])


def _references(x: Tensor) -> dict[str, Tensor]:
    """From all tokens x [T, 32], token by token or in float64."""
    x = x.double()
    gram = sum((torch.outer(row, row) for row in x), torch.zeros(WIDTH, WIDTH).double())
    of_experts = [
        sum(
            (torch.outer(row, row) for row, t in zip(x, TOKENS, strict=True) if int(t) % 5 == e),
            torch.zeros(WIDTH, WIDTH).double(),
        )
        for e in range(EXPERTS)
    ]
    return {
        "amax": x.abs().max(),
        "gram": gram,
        "gram_blocks": _blocks(gram),
        "absmax": x.abs().amax(0),
        "square_sum": gram.diagonal(),
        "over": (x > 0.5).sum(0),
        "expert_gram": torch.stack(of_experts),
        "expert_gram_blocks": torch.stack([_blocks(gram) for gram in of_experts]),
        "expert_square_sum": torch.stack([gram.diagonal() for gram in of_experts]),
        "expert_tokens": torch.tensor([(TOKENS % 5).tolist().count(e) for e in range(EXPERTS)]),
        "tokens": torch.tensor(len(TOKENS)),
        "split_gram": _split([range(len(TOKENS))], x),
        "expert_split_gram": torch.stack([_split(_of_expert(e), x) for e in range(EXPERTS)]),
    }


def _of_expert(expert: int) -> list[list[int]]:
    return [[i for i in range(len(TOKENS)) if int(TOKENS[i]) % 5 == expert]]


def _split(kinds: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """Of each batch, the first three quarters of the tokens that count, and the rest."""
    sums = torch.zeros(2, WIDTH, WIDTH).double()
    ends = np.cumsum([batch.numel() for batch in BATCHES]).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        own = [i for i in kinds[0] if start <= i < end]
        kept = -(-3 * len(own) // 4)
        for half, part in enumerate((own[:kept], own[kept:])):
            for i in part:
                sums[half] += torch.outer(x[i], x[i])
    return sums


def _equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_statistic_is_that_of_all_tokens(prefix: Prefix) -> None:
    lines = [f"%{name} : {call}\n" for name, call in STATISTICS.items()]
    source = Source({"emb": _random(40, WIDTH)})
    found = _found(f"{INPUTS}{''.join(lines)}return [%x]\n", source, prefix)
    wanted = _references(source.tensors["emb"][TOKENS])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        _equal(found[name], value)
    assert int(found["expert_tokens"][3]) == 0
    assert not found["expert_gram"][3].any()
    assert not found["expert_gram_blocks"][3].any()
    assert found["over"].dtype == torch.int64


@pytest.mark.parametrize("name", [name for name in STATISTICS if name not in COUNTS])
@pytest.mark.parametrize(("broken", "kind"), [(-1.0, "NaN"), (0.0, "Inf")])
def test_what_is_not_finite_is_an_error_that_names_the_statistic(name: str, broken: float, kind: str) -> None:
    source = Source({"emb": _random(40, WIDTH).abs() + 0.1})
    source.tensors["emb"][22, 3] = broken  # a token of the third batch, in a mixed block with finite ones
    wanted = "NaN|Inf" if "gram" in name else kind  # Inf times 0, or minus Inf, is NaN
    logs = INPUTS.replace("%x : f32[2,3,32]", "%e : f32[2,3,32]").replace("%e : i64", "%expert : i64")
    logs = logs.replace("%rows :", "%x : f32[2,3,32] = aten.log(%e)\n%rows :")
    call = STATISTICS[name].replace("%e,", "%expert,")
    with pytest.raises(SourceError, match=rf"^%{name}: calibration produced ({wanted})"):
        _found(f"{logs}%{name} : {call}\nreturn [%x]\n", source)


@pytest.mark.parametrize(("broken", "kind"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_a_weight_that_is_not_finite_is_named_rather_than_what_it_breaks(broken: float, kind: str) -> None:
    source = Source({"emb": _random(40, WIDTH)})
    source.tensors["emb"][22, 3] = broken
    with pytest.raises(SourceError, match=rf"^emb: the weight holds {kind}"):
        _found(f"{INPUTS}%gram : {STATISTICS['gram']}\nreturn [%x]\n", source)


# Two linears, inputs and weights of both rounded; the second's inputs are looked at.
LAYERS = """\
%ids : i64[2,3] = placeholder()
%emb : f32[40,32] = @emb
%x : f32[2,3,32] = aten.embedding(%emb, %ids)
%x_amax : f32[] = fxq.amax(%x)
%x_q : f32[2,3,32] = fxq.quantize(%x, %x_amax, format='nvfp4', scale='dynamic')
%a : f32[48,32] = @a
%a_amax : f32[] = fxq.amax(%a)
%a_q : f32[48,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : f32[2,3,48] = aten.linear(%x_q, %a_q)
%z : f32[2,3,48] = aten.silu(%y)
%z_amax : f32[] = fxq.amax(%z)
%z_gram : f32[48,48] = fxq.gram(%z)
%z_absmax : f32[48] = fxq.absmax(%z)
%z_q : f32[2,3,48] = fxq.quantize(%z, %z_amax, format='nvfp4', scale='dynamic')
%b : f32[16,48] = @b
%b_amax : f32[] = fxq.amax(%b)
%b_q : f32[16,48] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='mse')
%out : f32[2,3,16] = aten.linear(%z_q, %b_q)
%out_square : f32[16] = fxq.square_sum(%out)
return [%out]
"""


def _weights() -> dict[str, Tensor]:
    return {"emb": _random(40, 32), "a": _random(48, 32), "b": _random(16, 48)}


def _rounded(t: Tensor, amax: Tensor | None = None) -> Tensor:
    """t [..., K] in NVFP4 with the scales of block maxima, as the contract has it."""
    rows = t.flatten(0, -2).numpy()
    largest = float(t.abs().max() if amax is None else amax)
    unit, scales = reference.weight_scale_2(largest), reference.max_block_scales(rows, largest)
    steps = reference.e4m3_decode(scales).astype(np.float32) * unit
    codes = reference.quantize_codes(rows, steps, np.float32)
    return torch.from_numpy(
        reference.dequantize(reference.pack(codes), scales, float(unit)).astype(np.float32)
    ).view(t.shape)


def _second_layer(tensors: dict[str, Tensor], tokens: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """What the second linear reads, of all tokens at once."""
    x = rounding(tensors["emb"][TOKENS])[: len(tokens)]
    return torch.nn.functional.silu(torch.nn.functional.linear(x, rounding(tensors["a"])))


def test_a_prefix_is_the_model_as_it_was_or_as_it_will_be_served() -> None:
    source = Source(_weights())
    plain = _found(LAYERS, source)
    rounded = _found(LAYERS, Source(_weights()), "quantized")
    for found, rounding in ((plain, torch.clone), (rounded, _rounded)):
        z = _second_layer(source.tensors, TOKENS, rounding)
        z64 = z.double()
        _equal(found["x_amax"], source.tensors["emb"][TOKENS].abs().max())
        _equal(found["z_amax"], z64.abs().max())
        _equal(found["z_gram"], z64.T @ z64)
        _equal(found["z_absmax"], z64.abs().amax(0))
    b = source.tensors["b"]
    z = _second_layer(source.tensors, TOKENS, torch.clone)
    _equal(plain["out_square"], (z @ b.T).double().square().sum(0))
    # The amaxes of z in the served model are those of all batches before any of them is rounded.
    z = _second_layer(source.tensors, TOKENS, _rounded)
    best = reference.search_all(b.numpy(), float(b.abs().max()))
    unit = reference.weight_scale_2(float(b.abs().max()))
    steps = reference.e4m3_decode(best.codes).astype(np.float32) * unit
    codes = reference.quantize_codes(b.numpy(), steps, np.float32)
    b_q = torch.from_numpy(reference.dequantize(reference.pack(codes), best.codes, float(unit))).float()
    _equal(rounded["out_square"], (_rounded(z) @ b_q.T).double().square().sum(0))
    assert not torch.allclose(plain["z_gram"], rounded["z_gram"], rtol=1e-3)


# The columns of `a` are divided by what an absmax shows, a gram is of what that gives, and rewrites `b`.
DEPENDENT = """\
%ids : i64[2,3] = placeholder()
%emb : f32[40,32] = @emb
%x : f32[2,3,32] = aten.embedding(%emb, %ids)
%x_absmax : f32[32] = fxq.absmax(%x)
%a : f32[48,32] = @a
%a_scaled : f32[48,32] = aten.div.Tensor(%a, %x_absmax)
%a_new : f32[48,32] = fxq.rewrite(%a, %a_scaled)
%y : f32[2,3,48] = aten.linear(%x, %a_new)
%y_gram : f32[48,48] = fxq.gram(%y)
%y_absmax : f32[48] = fxq.absmax(%y)
%b : f32[16,48] = @b
%b_turned : f32[16,48] = aten.matmul(%b, %y_gram)
%b_scaled : f32[16,48] = aten.div.Tensor(%b_turned, %y_absmax)
%b_new : f32[16,48] = fxq.rewrite(%b, %b_scaled)
%out : f32[2,3,16] = aten.linear(%y, %b_new)
%out_amax : f32[] = fxq.amax(%out)
return [%out]
"""


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_a_statistic_decides_is_looked_at_by_the_next(prefix: Prefix) -> None:
    source = Source(_weights())
    found = _found(DEPENDENT, source, prefix)
    x, a, b = (t.double() for t in (source.tensors["emb"][TOKENS], source.tensors["a"], source.tensors["b"]))
    y = x @ (a / x.abs().amax(0)).T
    gram = y.T @ y
    out = y @ (b @ gram / y.abs().amax(0)).T
    for name, wanted in (
        ("x_absmax", x.abs().amax(0)),
        ("y_gram", gram),
        ("y_absmax", y.abs().amax(0)),
        ("out_amax", out.abs().max()),
    ):
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_statistic_that_is_known_is_not_taken_again() -> None:
    known = torch.full((WIDTH,), 2.0)
    program, source = Program(parse(DEPENDENT), values={"x_absmax": known}), Source(_weights())
    Calibration(program, source, CPU).run(BATCHES)
    assert program.values["x_absmax"] is known
    y = source.tensors["emb"][TOKENS].double() @ (source.tensors["a"].double() / 2).T
    _equal(program.values["y_absmax"], y.abs().amax(0))


COMPARED = LAYERS.replace(
    "return [%out]",
    "%z_original : f32[2,3,48] = fxq.original(%z)\n"
    "%cross : f32[2,48,48] = fxq.split_gram(%z_original, %z)\nreturn [%out]",
)


def test_a_statistic_compares_with_the_model_as_it_was() -> None:
    source = Source(_weights())
    found = _found(COMPARED, source, "quantized")
    before, after = (_second_layer(source.tensors, TOKENS, r).double() for r in (torch.clone, _rounded))
    _equal(found["cross"].sum(0), before.T @ after)


def test_a_comparison_with_itself_is_an_error() -> None:
    with pytest.raises(
        SpecError, match=r"%z_original compares .* expected calibrate-max: \{prefix: quantized\}"
    ):
        _found(COMPARED, Source(_weights()))


# A router after a rounded linear sends each token to one of two experts; what the second experts read depends
# on it. The original model would send some tokens elsewhere.
ROUTED = """\
%ids : i64[2,3] = placeholder()
%emb : f32[40,32] = @emb
%e : f32[2,3,32] = aten.embedding(%emb, %ids)
%x : f32[6,32] = aten.view(%e, [-1, 32])
%a : f32[32,32] = @a
%a_amax : f32[] = fxq.amax(%a)
%a_q : f32[32,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%h : f32[6,32] = aten.linear(%x, %a_q)
%router : f32[2,32] = @router
%logits : f32[6,2] = aten.linear(%h, %router)
%choice : i64[6] = aten.argmax(%logits, -1)
%order : i64[6] = aten.argsort(%choice)
%which : i64[6] = aten.index.Tensor(%choice, [%order])
%rows : f32[6,32] = aten.index.Tensor(%h, [%order])
%up : f32[2,32,32] = @up
%y : f32[6,32] = fxq.expert_linear(%rows, %up, %which)
%y_original : f32[6,32] = fxq.original(%y, %which)
%cross : f32[2,2,32,32] = fxq.expert_split_gram(%y_original, %y, %which, experts=2)
return [%y]
"""


def test_tokens_of_experts_are_compared_with_themselves_whatever_the_original_routing() -> None:
    tensors = {"emb": _random(40, 32), "a": _random(32, 32), "up": _random(2, 32, 32)}
    of_token = tensors["emb"][TOKENS[0]] @ tensors["a"].T
    along = of_token / of_token.square().sum()
    side = _random(2, 32)[0]
    side -= (side @ of_token) * along  # to which the first token gives nothing, before it is rounded
    moved = side @ (tensors["emb"][TOKENS[0]] @ _rounded(tensors["a"]).T)
    side -= along * moved.sign() * 1e-3
    tensors["router"] = torch.stack([side, -side])
    found = _found(ROUTED, Source(tensors), "quantized")
    x = tensors["emb"][TOKENS]
    before, after = (x @ w.T for w in (tensors["a"], _rounded(tensors["a"])))
    chosen, elsewhere = ((h @ tensors["router"].T).argmax(-1) for h in (after, before))
    assert (chosen != elsewhere).any(), "else there is nothing to tell apart"
    for e in range(2):
        own = chosen == e
        of_original, of_rounded = ((h[own] @ tensors["up"][e].T).double() for h in (before, after))
        wanted = of_original.T @ of_rounded
        torch.testing.assert_close(found["cross"][e].sum(0).double(), wanted, rtol=1e-4, atol=1e-2)
