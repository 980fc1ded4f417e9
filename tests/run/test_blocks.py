"""Blocks: a model block by block, run as it was and as deployed, with gradients."""

from contextlib import closing

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect
from fxq.graph.hub import Hub
from fxq.graph.program import Program
from fxq.graph.text import parse
from fxq.numbers import nvfp4
from fxq.run.blocks import Blocks
from fxq.run.simulate import DEPLOYED, ORIGINAL, simulation
from fxq.run.statistics import Calibration

CPU = torch.device("cpu")
# Two blocks, each `h + silu(norm(h) a) b`, the second of experts; embedding before, head behind.
MODEL = """\
%ids : i64[2,3] = placeholder()
%table : f32[11,32] = @table
%h0 : f32[2,3,32] = aten.embedding(%table, %ids)
%a : f32[48,32] = @a
%a_amax : f32[] = fxq.amax(%a)
%a_q : f32[48,32] = fxq.quantize(%a, %a_amax, format='nvfp4', scale='max')
%y : f32[2,3,48] = aten.linear(%h0, %a_q)
%act : f32[2,3,48] = aten.silu(%y)
%b : f32[32,48] = @b
%b_amax : f32[] = fxq.amax(%b)
%b_q : f32[32,48] = fxq.quantize(%b, %b_amax, format='nvfp4', scale='max')
%z : f32[2,3,32] = aten.linear(%act, %b_q)
%h1 : f32[2,3,32] = aten.add.Tensor(%h0, %z)
%tokens : f32[6,32] = aten.view(%h1, [-1, 32])
%flat : i64[6] = aten.view(%ids, [-1])
%e : i64[6] = aten.remainder.Scalar(%flat, 2)
%w : f32[2,64,32] = @w
%w0 : f32[64,32] = fxq.slice(%w, 0)
%w0_amax : f32[] = fxq.amax(%w0)
%w0_q : f32[64,32] = fxq.quantize(%w0, %w0_amax, format='nvfp4', scale='mse')
%w1 : f32[64,32] = fxq.slice(%w, 1)
%w1_amax : f32[] = fxq.amax(%w1)
%w1_q : f32[64,32] = fxq.quantize(%w1, %w1_amax, format='nvfp4', scale='mse')
%w_q : f32[2,64,32] = fxq.stack([%w0_q, %w1_q])
%x : f32[6,64] = fxq.expert_linear(%tokens, %w_q, %e)
%down : f32[2,32,64] = @down
%d : f32[6,32] = fxq.expert_linear(%x, %down, %e)
%d3 : f32[2,3,32] = aten.view(%d, [2, 3, 32])
%h2 : f32[2,3,32] = aten.add.Tensor(%h1, %d3)
%head : f32[11,32] = @head
%logits : f32[2,3,11] = aten.linear(%h2, %head)
return [%logits]
"""


class Weights:
    """Random weights, counted as they are read."""

    hub = Hub()
    concurrent = False
    bytes_read = 0

    def __init__(self, program: Program) -> None:
        torch.manual_seed(0)
        nodes = [n for n in program.graph.nodes if n.op == "get_attr"]
        self.values = {str(n.target): torch.randn(n.meta["val"].shape) / 4 for n in nodes}
        self.reads: list[str] = []

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        self.reads.append(name)
        return self.values[name].clone() if out is None else out.copy_(self.values[name])

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        raise AssertionError(name)

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        raise AssertionError(key)


@pytest.fixture
def program() -> Program:
    return Program(parse(MODEL))


def batches() -> list[Tensor]:
    return [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 9], [10, 0, 1]])]


def node(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_the_last_block_gives_the_model_s_outputs_of_both_variants(program: Program) -> None:
    source = Weights(program)
    found: list[list[Tensor]] = []
    names: list[set[str]] = []
    with closing(Blocks(program, source, CPU).run(batches())) as blocks:
        for block in blocks:
            names.append({n.name for n in block.roundings})
            entered = {v: block.inputs(0, v) for v in (ORIGINAL, DEPLOYED)}
            left = [[block.outputs(i, v) for v in (ORIGINAL, DEPLOYED)] for i in range(block.batches)]
            if "logits" in left[0][0]:
                found = [[own["logits"] for own in each] for each in left]
            assert entered[ORIGINAL].keys() == entered[DEPLOYED].keys()
    assert set().union(*names) == {"a_q", "b_q", "w0_q", "w1_q"}
    assert sorted(source.reads) == sorted(source.values)  # once each
    both = simulation(program, source, CPU, (ORIGINAL, DEPLOYED)).run_batches(batches())
    for mine, theirs in zip(found, both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert not torch.equal(*mine)


def test_gradients_reach_what_is_replaced(program: Program) -> None:
    """Those of a parameter behind a norm-free path equal finite differences; a rounding counts as the
    identity."""
    source = Weights(program)
    with closing(Blocks(program, source, CPU).run(batches())) as blocks:
        for block in blocks:
            for name in ("b", "down"):
                if name in block.parameters:
                    w = block.parameters[name].clone().requires_grad_()
                    (made, *_) = block.outputs(0, ORIGINAL, {node(program, name): w}).values()
                    torch.manual_seed(1)
                    probe, step = torch.randn_like(made), torch.randn_like(w) / 100
                    (grad,) = torch.autograd.grad((made * probe).sum(), w)
                    moved = [
                        next(iter(block.outputs(0, ORIGINAL, {node(program, name): w.detach() + s}).values()))
                        for s in (step, -step)
                    ]
                    expected = ((moved[0] - moved[1]) * probe).sum() / 2
                    torch.testing.assert_close((grad * step).sum(), expected, rtol=1e-3, atol=1e-5)
            if "b" in block.parameters:
                w = block.parameters["b"].clone().requires_grad_()
                rounded = block.outputs(0, DEPLOYED, {node(program, "b"): w})
                (straight,) = torch.autograd.grad(next(iter(rounded.values())).sum(), w)
                with torch.no_grad():
                    q = dialect.QUANTIZE(w, dialect.AMAX(w), format="nvfp4", scale="max")
                q.requires_grad_()
                given = block.outputs(0, DEPLOYED, {node(program, "b_q"): q})
                (direct,) = torch.autograd.grad(next(iter(given.values())).sum(), q)
                torch.testing.assert_close(straight, direct)


def _logits(program: Program, source: Weights, decided: dict[str, Tensor]) -> list[Tensor]:
    """The deployed model's, with what is decided in the block in which it is."""
    found: list[Tensor] = []
    with closing(Blocks(program, source, CPU).run(batches())) as blocks:
        for block in blocks:
            own = {node(program, n): v for n, v in decided.items() if block.reads(node(program, n))}
            block.decide(own)
            found = [block.outputs(i, DEPLOYED).get("logits", torch.empty(0)) for i in range(block.batches)]
    return found


@pytest.mark.parametrize("name", ["b_q", "w_q"])
def test_what_a_pass_decides_in_a_block_is_what_later_blocks_see(program: Program, name: str) -> None:
    source = Weights(program)
    parameter = name.removesuffix("_q")
    found = _logits(program, source, {name: torch.zeros(source.values[parameter].shape)})
    source.values[parameter] = torch.zeros_like(source.values[parameter])
    wanted = simulation(Program(parse(MODEL)), source, CPU).run_batches(batches())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# The same, rounded inputs before `w`, whose amax batches decide, and rounded in a way that asks for a Gram.
TAKING = MODEL.replace(
    "%w : f32[2,64,32] = @w",
    "%tokens_amax : f32[] = fxq.amax(%tokens)\n"
    "%tokens_q : f32[6,32] = fxq.quantize(%tokens, %tokens_amax, format='nvfp4', scale='dynamic')\n"
    "%w : f32[2,64,32] = @w",
).replace("fxq.expert_linear(%tokens, %w_q", "fxq.expert_linear(%tokens_q, %w_q")


def test_statistics_are_found_of_the_model_before_them_as_it_was_decided() -> None:
    program = Program(parse(TAKING))
    source = Weights(program)
    zero = torch.zeros(source.values["b"].shape)
    decided = _logits(program, source, {"b_q": zero})
    source.values["b"] = zero
    plain = Program(parse(TAKING))
    Calibration(plain, source, CPU, prefix="quantized").run(batches())
    assert program.values.keys() == plain.values.keys()
    torch.testing.assert_close(program.values, plain.values, rtol=0, atol=0)
    torch.testing.assert_close(program.tokens, plain.tokens, rtol=0, atol=0)
    for mine, theirs in zip(decided, simulation(plain, source, CPU).run_batches(batches()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_block_shows_how_its_weights_are_packed(program: Program) -> None:
    source = Weights(program)
    with closing(Blocks(program, source, CPU).run(batches())) as blocks:
        found = {key: value for block in blocks for key, value in block.packed.items()}
    assert {tuple(n.name for n in key) for key in found} == {("a_q",), ("b_q",), ("w0_q", "w1_q")}
    for key, (w, amaxes, packed) in found.items():
        parameter = source.values[key[0].name[0]].reshape(w.shape)
        assert torch.equal(w, parameter)
        assert torch.equal(amaxes, parameter.abs().amax((1, 2)))
        scale = str(key[0].kwargs["scale"])
        assert torch.equal(packed.weight, nvfp4.quantize_weight(parameter, amaxes, scale).weight)
