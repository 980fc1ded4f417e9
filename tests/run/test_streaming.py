"""Interpreters on hand-built graphs, with a source that counts what is read and what is still alive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxq.errors import SourceError
from fxq.graph import dialect, text
from fxq.graph.hub import Hub
from fxq.graph.program import Program
from fxq.numbers import nvfp4
from fxq.passes.calibrate_bootstrap import CalibrateBootstrap
from fxq.run import stages
from fxq.run.simulate import DEPLOYED, ORIGINAL, UNROUNDED, simulation
from fxq.run.statistics import Calibration, Prefix
from fxq.run.streaming import Streaming
from fxq.run.weights import WeightExpressions, amaxes
from fxq.run.work import total

CPU = torch.device("cpu")
DEPTH, EXPERTS = 6, 4


class Counting:
    """A weight source over a dictionary: hands out copies, and knows which of them are alive."""

    concurrent = False
    bytes_read = 0

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.hub = tensors, Hub()
        self.reads: Counter[str] = Counter()
        self.handed: list[tuple[StorageWeakRef, int]] = []
        self.peak_bytes = self.peak = 0

    def _hand_out(self, name: str, tensor: Tensor, out: Tensor | None) -> Tensor:
        self.reads[name] += 1
        copy = tensor.clone() if out is None else out.copy_(tensor)
        self.handed.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        self.look()
        return copy

    def look(self) -> None:
        """Note how much of what was handed out is still alive."""
        sizes = [size for storage, size in self.handed if not storage.expired()]
        self.peak, self.peak_bytes = max(self.peak, len(sizes)), max(self.peak_bytes, sum(sizes))

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self._hand_out(name, self.tensors[name], out)

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        return self._hand_out(f"{name}[{expert}]", self.tensors[name][expert], out)

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        whole = self.read(key)
        return whole if part is None else whole[part.start : part.stop]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _program(lines: Sequence[str]) -> Program:
    return Program(text.parse("\n".join(lines)))


IDS = ["%ids : i64[2,3] = placeholder()", "%flat : i64[6] = aten.view(%ids, [-1])", "%emb : f32[8,16] = @emb"]
IDS += ["%x : f32[6,16] = aten.embedding(%emb, %flat)"]


def _chain() -> tuple[Program, Counting]:
    """DEPTH linears after an embedding, each weight just before its use."""
    lines, h = list(IDS), "%x"
    for i in range(DEPTH):
        lines += [f"%w{i} : f32[16,16] = @w{i}", f"%h{i} : f32[6,16] = aten.linear({h}, %w{i})"]
        h = f"%h{i}"
    tensors = {"emb": _random(8, 16)} | {f"w{i}": _random(16, 16, seed=i) for i in range(DEPTH)}
    return _program([*lines, f"return [{h}]"]), Counting(tensors)


def _quantized(name: str, of: str, shape: str, scale: str) -> list[str]:
    return [
        f"%{name}_amax : f32[] = fxq.amax({of})",
        f"%{name}_q : f32[{shape}] = fxq.quantize({of}, %{name}_amax, format='nvfp4', scale='{scale}')",
    ]


def _experts(scale: str = "max") -> tuple[Program, Counting]:
    """Token t goes to expert t % 4 and is quantized; ids 0 to 7 choose tokens and experts."""
    lines = [*IDS, f"%experts : i64[6] = aten.remainder.Scalar(%flat, {EXPERTS})", "%w : f32[4,32,16] = @w"]
    for e in range(EXPERTS):
        lines += [
            f"%w_e{e} : f32[32,16] = fxq.slice(%w, {e})",
            *_quantized(f"w_e{e}", f"%w_e{e}", "32,16", scale),
        ]
    lines += [f"%w_q : f32[4,32,16] = fxq.stack([{', '.join(f'%w_e{e}_q' for e in range(EXPERTS))}])"]
    lines += [
        *_quantized("x", "%x", "6,16", "dynamic"),
        "%y : f32[6,32] = fxq.expert_linear(%x_q, %w_q, %experts)",
    ]
    scales = torch.tensor([1.0, 10.0, 0.1, 5.0])[:, None, None]
    tensors = {"emb": _random(8, 16), "w": _random(EXPERTS, 32, 16) * scales}
    return _program([*lines, "return [%y]"]), Counting(tensors)


def _ids(*rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


BATCHES = [_ids([0, 1, 2], [3, 4, 5]), _ids([7]), _ids([1, 1, 6, 2, 0, 3, 3])]


def test_each_weight_is_read_once_for_any_number_of_batches() -> None:
    program, source = _chain()
    outputs = Streaming(program.graph, source, CPU).run_batches(BATCHES * 3)
    assert source.reads == Counter(source.tensors.keys())
    for ids, output in zip(BATCHES * 3, outputs, strict=True):
        wanted = source.tensors["emb"][ids.flatten()]
        for i in range(DEPTH):
            wanted = torch.nn.functional.linear(wanted, source.tensors[f"w{i}"])
        assert torch.equal(output, wanted)


def test_a_weight_is_freed_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages.AHEAD, "cpu", 1)
    program, source = _chain()
    Streaming(program.graph, source, CPU, step=lambda done: source.look()).run_batches([_ids([7])])
    assert source.peak <= 2  # the one in use, and at most the next
    assert source.peak_bytes <= 2 * 16 * 16 * 4
    source.peak = 0
    source.look()
    assert source.peak == 0


def test_only_what_reduce_keeps_of_each_output_stays() -> None:
    program, source = _chain()
    kept = Streaming(program.graph, source, CPU, reduce=lambda y, i: (i, tuple(y.shape))).run_batches(BATCHES)
    assert kept == [(0, (6, 16)), (1, (1, 16)), (2, (7, 16))]


def test_no_batches_give_no_outputs() -> None:
    program, source = _chain()
    assert Streaming(program.graph, source, CPU).run_batches([]) == []


def _calibrated(
    program: Program, source: Counting, batches: Sequence[Tensor], prefix: Prefix = "original"
) -> Program:
    Calibration(program, source, CPU, prefix=prefix).run(batches)
    return program


def _amaxes(program: Program, source: Counting) -> dict[str, Tensor]:
    return amaxes(program, source, CPU)


def test_calibration_finds_exact_amaxes_over_batches_of_different_lengths() -> None:
    program, source = _experts()
    assert Calibration(program, source, CPU).run(BATCHES) == 1
    tokens = torch.cat([b.flatten() for b in BATCHES])
    assert set(program.values) == {"x_amax"}
    assert program.values["x_amax"] == source.tensors["emb"][tokens].abs().max()
    assert program.values["x_amax"].dtype == torch.float32
    assert program.values["x_amax"].shape == ()


def test_calibration_reads_each_weight_that_it_needs_once_and_no_other() -> None:
    program, source = _experts()
    _calibrated(program, source, BATCHES)
    assert source.reads == Counter(["emb"])
    program, source = _experts("mse")
    program.graph = text.parse(
        text.dump(program.graph).replace("return [%y]", "%y_amax : f32[] = fxq.amax(%y)\nreturn [%y]")
    )
    _calibrated(program, source, BATCHES)
    assert source.reads == Counter(["emb", "w"])


def test_calibration_counts_the_tokens_of_each_expert_over_all_batches() -> None:
    program, source = _experts()
    tokens = torch.cat([b.flatten() for b in BATCHES])
    wanted = torch.bincount(tokens % EXPERTS, minlength=EXPERTS)
    assert torch.equal(_calibrated(program, source, BATCHES).tokens["w"], wanted)


@pytest.mark.parametrize("order", [1, -1])
def test_calibration_does_not_depend_on_the_order_or_the_cut_of_batches(order: int) -> None:
    rows = [_ids([t]) for b in BATCHES for t in b.flatten().tolist()][::order]
    one, other = _calibrated(*_experts(), rows), _calibrated(*_experts(), BATCHES)
    assert one.values == other.values
    assert torch.equal(one.tokens["w"], other.tokens["w"])


def test_what_is_known_is_not_found_again() -> None:
    program, source = _experts()
    program.values["x_amax"] = torch.tensor(7.0)
    assert Calibration(program, source, CPU).run(BATCHES) == 0
    assert program.values == {"x_amax": torch.tensor(7.0)}


def test_the_amax_of_a_weight_is_that_of_the_weight_whether_tokens_reach_it_or_not() -> None:
    program, source = _experts()
    _calibrated(program, source, [_ids([0, 2, 4, 6])])
    assert program.tokens["w"].tolist() == [2, 0, 2, 0]
    found = _amaxes(program, source)
    assert set(found) == {n.name for n in program.graph.nodes if n.target is dialect.AMAX}
    for e in range(EXPERTS):
        assert found[f"w_e{e}_amax"] == source.tensors["w"][e].abs().max()
    assert found["x_amax"] == program.values["x_amax"]


def test_without_any_data_all_amaxes_follow_from_weights_alone() -> None:
    program, source = _experts()
    CalibrateBootstrap().run(program)
    found = _amaxes(program, source)
    assert set(found) == {n.name for n in program.graph.nodes if n.target is dialect.AMAX}
    for e in range(EXPERTS):
        assert found[f"w_e{e}_amax"] == source.tensors["w"][e].abs().max()
    assert torch.isfinite(found["x_amax"])
    assert found["x_amax"] > 0
    assert "emb" not in source.reads
    assert "w" not in source.reads
    assert max(source.reads.values()) == 1


def _unrolled() -> tuple[Program, Counting]:
    """Each expert's linear on its own rows: tokens 2e and 2e + 1 are expert e's, which may have none."""
    lines = [*IDS, "%w : f32[4,32,16] = @w"]
    for e in range(EXPERTS):
        lines += [
            f"%pick{e} : i64[6] = aten.floor_divide(%flat, 2)",
            f"%mask{e} : bool[6] = aten.eq.Scalar(%pick{e}, {e})",
            f"%x{e} : f32[6,16] = aten.index.Tensor(%x, [%mask{e}])",
            *_quantized(f"x{e}", f"%x{e}", "6,16", "dynamic"),
            f"%w_e{e} : f32[32,16] = fxq.slice(%w, {e})",
            *_quantized(f"w_e{e}", f"%w_e{e}", "32,16", "max"),
            f"%y{e} : f32[6,32] = aten.linear(%x{e}_q, %w_e{e}_q)",
        ]
    lines.append(f"%y : f32[24,32] = aten.cat([{', '.join(f'%y{e}' for e in range(EXPERTS))}])")
    tensors = {"emb": _random(8, 16), "w": _random(EXPERTS, 32, 16)}
    lines = [
        line.replace("aten.floor_divide(%flat, 2)", "aten.__rshift__.Scalar(%flat, 1)") for line in lines
    ]
    return _program([*lines, "return [%y]"]), Counting(tensors)


def test_an_input_that_no_token_reached_takes_the_largest_of_its_layer() -> None:
    program, source = _unrolled()
    _calibrated(program, source, [_ids([0, 1]), _ids([4])])
    assert program.values["x1_amax"] == program.values["x3_amax"] == -1, "no token produced these"
    CalibrateBootstrap().run(program)
    found = _amaxes(program, source)
    largest = max(program.values["x0_amax"], program.values["x2_amax"])
    assert found["x1_amax"] == found["x3_amax"] == largest
    assert largest == source.tensors["emb"][[0, 1, 4]].abs().max()
    assert found["x0_amax"] == program.values["x0_amax"]


def test_an_expert_that_no_token_reached_is_served_with_the_scale_of_the_others() -> None:
    program, source = _unrolled()
    CalibrateBootstrap().run(_calibrated(program, source, [_ids([0, 1]), _ids([4])]))
    (found,) = simulation(program, source, CPU).run_batches([_ids([2, 3])])
    x = nvfp4.fake_quantize_activation(
        source.tensors["emb"][[2, 3]], max(program.values["x0_amax"], program.values["x2_amax"])
    )
    own = source.tensors["w"][1]
    w = nvfp4.dequantize(nvfp4.quantize_weight(own, own.abs().max(), "max"))
    assert torch.equal(found, torch.nn.functional.linear(x, w))


@pytest.mark.parametrize("scale", ["max", "mse"])
def test_simulation_is_quantizing_by_hand(scale: str) -> None:
    program, source = _experts(scale)
    program.values["x_amax"] = torch.tensor(1.5)
    found = simulation(program, source, CPU).run_batches(BATCHES)
    packed = [nvfp4.quantize_weight(w, w.abs().max(), scale) for w in source.tensors["w"]]
    w = torch.stack([nvfp4.dequantize(each) for each in packed])
    for ids, y in zip(BATCHES, found, strict=True):
        x = nvfp4.fake_quantize_activation(source.tensors["emb"][ids.flatten()], torch.tensor(1.5))
        assert torch.equal(y, dialect.EXPERT_LINEAR(x, w, ids.flatten() % EXPERTS))


def test_quantize_passes_through_where_the_model_is_wanted_as_it_was() -> None:
    program, source = _experts()
    found = simulation(program, source, CPU, [ORIGINAL]).run_batches(BATCHES)
    for ids, y in zip(BATCHES, found, strict=True):
        x = source.tensors["emb"][ids.flatten()]
        assert torch.equal(y, dialect.EXPERT_LINEAR(x, source.tensors["w"], ids.flatten() % EXPERTS))


def _rewritten() -> tuple[Program, Counting]:
    """A linear whose weight is doubled, and rounded."""
    lines = [*IDS, "%w : f32[16,16] = @w", "%twice : f32[16,16] = aten.mul.Tensor(%w, 2.0)"]
    lines += ["%new : f32[16,16] = fxq.rewrite(%w, %twice)", *_quantized("new", "%new", "16,16", "max")]
    lines += ["%y : f32[6,16] = aten.linear(%x, %new_q)", "return [%y]"]
    return _program(lines), Counting({"emb": _random(8, 16), "w": _random(16, 16)})


def test_variants_run_side_by_side_on_one_reading_of_each_weight() -> None:
    program, source = _rewritten()
    variants = (ORIGINAL, UNROUNDED, DEPLOYED)
    found = simulation(program, source, CPU, variants).run_batches(BATCHES)
    assert source.reads == Counter(["emb", "w"])
    w = source.tensors["w"]
    rounded = nvfp4.dequantize(nvfp4.quantize_weight(2 * w, (2 * w).abs().max(), "max"))
    for ids, outputs in zip(BATCHES, found, strict=True):
        x = source.tensors["emb"][ids.flatten()]
        wanted = [torch.nn.functional.linear(x, each) for each in (w, 2 * w, rounded)]
        assert all(map(torch.equal, outputs, wanted))
    for variant, outputs in zip(variants, zip(*found, strict=True), strict=True):
        alone = simulation(program, source, CPU, [variant]).run_batches(BATCHES)
        assert all(map(torch.equal, alone, outputs))


def _downstream() -> tuple[Program, Counting]:
    """The largest output of a linear whose weight and input are rounded."""
    lines = [
        *IDS,
        "%w : f32[16,16] = @w",
        *_quantized("w", "%w", "16,16", "max"),
        *_quantized("x", "%x", "6,16", "dynamic"),
    ]
    lines += ["%y : f32[6,16] = aten.linear(%x_q, %w_q)", "%y_amax : f32[] = fxq.amax(%y)"]
    source = Counting({"emb": _random(8, 16), "w": _random(16, 16)})
    return _program([*lines, "return [%y, %y_amax]"]), source


def test_calibration_sees_the_unquantized_model_downstream() -> None:
    program, source = _downstream()
    _calibrated(program, source, [_ids([0, 5]), _ids([3])])
    wanted = torch.nn.functional.linear(source.tensors["emb"][[0, 5, 3]], source.tensors["w"]).abs().max()
    assert program.values["y_amax"] == pytest.approx(float(wanted))
    assert _amaxes(program, source)["w_amax"] == source.tensors["w"].abs().max()


@pytest.mark.parametrize("bootstrapped", [False, True])
def test_or_the_quantized_one_if_that_is_asked_for(bootstrapped: bool) -> None:
    program, source = _downstream()
    if bootstrapped:
        CalibrateBootstrap().run(program)
    _calibrated(program, source, [_ids([0, 5]), _ids([3])], "quantized")
    assert source.reads == Counter(["emb", "w"])
    used, w = source.tensors["emb"][[0, 5, 3]], source.tensors["w"]
    assert program.values["x_amax"] == used.abs().max()
    rounded = nvfp4.dequantize(nvfp4.quantize_weight(w, w.abs().max(), "max"))
    x = nvfp4.fake_quantize_activation(used, used.abs().max())
    assert program.values["y_amax"] == pytest.approx(
        float(torch.nn.functional.linear(x, rounded).abs().max())
    )


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "Inf"), (-torch.inf, "Inf")])
def test_a_broken_expert_that_calibration_meets_is_named(value: float, word: str) -> None:
    program, source = _experts()
    program.graph = text.parse(
        text.dump(program.graph).replace("return [%y]", "%y_amax : f32[] = fxq.amax(%y)\nreturn [%y]")
    )
    source.tensors["w"][2, 7, 5] = value
    with pytest.raises(SourceError, match=f"^w, expert 2: the weight holds {word}") as caught:
        _calibrated(program, source, [torch.arange(8)[None]])
    assert len(str(caught.value).splitlines()) <= 3


def test_weight_expressions_are_evaluated_without_the_model() -> None:
    program, source = _chain()
    weights = [n for n in program.graph.nodes if n.op == "get_attr"]
    seen = []
    for computation in WeightExpressions(source, CPU, {}, {}).computations(weights):
        for (node,) in computation.groups:
            assert torch.equal(computation.expressions.one(node), source.tensors[str(node.target)])
            seen.append(node)
    assert seen == weights
    assert max(source.reads.values()) == 1


def test_a_broken_activation_is_named() -> None:
    lines = [*IDS, "%y : f32[6,16] = aten.log(%x)", *_quantized("y", "%y", "6,16", "dynamic")]
    program, source = _program([*lines, "return [%y_q]"]), Counting({"emb": _random(8, 16)})
    with pytest.raises(SourceError, match=r"y_amax: calibration produced NaN in an activation") as caught:
        _calibrated(program, source, BATCHES)
    assert len(str(caught.value).splitlines()) <= 3


def test_progress_counts_work_and_ends_at_its_total() -> None:
    program, source = _chain()
    done: list[int] = []
    run = Streaming(program.graph, source, CPU, step=done.append)
    run.run_batches(BATCHES)
    assert sum(done) == pytest.approx(total(run.graph, BATCHES), rel=1e-2)
    multiplications = sum(batch.numel() for batch in BATCHES) * DEPTH * 16 * 16
    assert multiplications <= sum(done) <= 10 * multiplications  # small as these are, the rest counts too


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_does_not_fit_on_the_gpu_waits_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    program, source = _chain()
    wanted = Streaming(program.graph, source, torch.device("cuda")).run_batches(BATCHES)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    found = Streaming(program.graph, source, torch.device("cuda")).run_batches(BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
