"""Every matmul by a matrix of weights becomes `aten.linear`, bit for bit the same; nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxq.graph.program import Program
from fxq.graph.text import dump, parse
from fxq.graph.verify import verify
from fxq.trace.canonical import linears
from tests.passes.golden import Evaluate

CASES = {
    "mm_by_a_weight_reads_it_transposed": (
        """\
%x : f32[4,32] = placeholder()
%w : f32[32,16] = @c_attn.weight
%y : f32[4,16] = aten.mm(%x, %w)
return [%y]
""",
        """\
%x : f32[4,32] = placeholder()
%w : f32[32,16] = @c_attn.weight
%w_t : f32[16,32] = aten.t(%w)
%y_linear : f32[4,16] = aten.linear(%x, %w_t)
return [%y_linear]
""",
    ),
    "matmul_keeps_leading_dimensions": (
        """\
%x : f32[2,4,32] = placeholder()
%w : f32[32,16] = @w
%y : f32[2,4,16] = aten.matmul(%x, %w)
return [%y]
""",
        """\
%x : f32[2,4,32] = placeholder()
%w : f32[32,16] = @w
%w_t : f32[16,32] = aten.t(%w)
%y_linear : f32[2,4,16] = aten.linear(%x, %w_t)
return [%y_linear]
""",
    ),
    "addmm_of_a_conv1d_has_its_bias": (
        """\
%x : f32[4,32] = placeholder()
%w : f32[32,16] = @c_fc.weight
%b : f32[16] = @c_fc.bias
%y : f32[4,16] = aten.addmm(%b, %x, %w)
return [%y]
""",
        """\
%x : f32[4,32] = placeholder()
%w : f32[32,16] = @c_fc.weight
%w_t : f32[16,32] = aten.t(%w)
%b : f32[16] = @c_fc.bias
%y_linear : f32[4,16] = aten.linear(%x, %w_t, %b)
return [%y_linear]
""",
    ),
    "a_transpose_is_undone": (
        """\
%x : f32[4,32] = placeholder()
%w : f32[16,32] = @w
%wt : f32[32,16] = aten.t(%w)
%a : f32[4,16] = aten.mm(%x, %wt)
%w3 : f32[32,16] = aten.permute(%w, [1, 0])
%b : f32[4,16] = aten.matmul(%x, %w3)
%w4 : f32[32,16] = aten.transpose.int(%w, -1, -2)
%c : f32[4,16] = aten.matmul(%x, %w4)
return [%a, %b, %c]
""",
        """\
%x : f32[4,32] = placeholder()
%w : f32[16,32] = @w
%a_linear : f32[4,16] = aten.linear(%x, %w)
%b_linear : f32[4,16] = aten.linear(%x, %w)
%c_linear : f32[4,16] = aten.linear(%x, %w)
return [%a_linear, %b_linear, %c_linear]
""",
    ),
    "a_square_weight_is_turned_too": (
        """\
%x : f32[4,16] = placeholder()
%w : f32[16,16] = @w
%y : f32[4,16] = aten.matmul(%x, %w)
return [%y]
""",
        """\
%x : f32[4,16] = placeholder()
%w : f32[16,16] = @w
%w_t : f32[16,16] = aten.t(%w)
%y_linear : f32[4,16] = aten.linear(%x, %w_t)
return [%y_linear]
""",
    ),
}
ALONE = {
    "a product of activations": """\
%x : f32[4,32] = placeholder()
%y : f32[32,4] = placeholder()
%z : f32[4,4] = aten.mm(%x, %y)
return [%z]
""",
    "a stack of experts": """\
%x : f32[4,32] = placeholder()
%w : f32[3,32,16] = @w
%z : f32[3,4,16] = aten.matmul(%x, %w)
return [%z]
""",
    "a weight on the left": """\
%x : f32[32,4] = placeholder()
%w : f32[16,32] = @w
%z : f32[16,4] = aten.mm(%w, %x)
return [%z]
""",
    "a vector of weights": """\
%x : f32[4,32] = placeholder()
%w : f32[32] = @w
%z : f32[4] = aten.matmul(%x, %w)
return [%z]
""",
    "a scaled addmm": """\
%x : f32[4,32] = placeholder()
%b : f32[16] = @b
%w : f32[32,16] = @w
%z : f32[4,16] = aten.addmm(%b, %x, %w, beta=2)
return [%z]
""",
    "an addmm onto activations": """\
%x : f32[4,32] = placeholder()
%r : f32[4,16] = placeholder()
%w : f32[32,16] = @w
%z : f32[4,16] = aten.addmm(%r, %x, %w)
return [%z]
""",
}


def normalized(text: str) -> str:
    graph = parse(text)
    linears(graph)
    verify(graph)
    return dump(graph)


@pytest.mark.parametrize("name", CASES)
def test_a_matmul_by_a_weight_is_a_linear(name: str) -> None:
    before, after = CASES[name]
    assert normalized(before) == after
    assert normalized(after) == after


@pytest.mark.parametrize("name", ALONE)
def test_anything_else_is_left_alone(name: str) -> None:
    assert normalized(ALONE[name]) == dump(parse(ALONE[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    def values(text: str) -> list[Tensor]:
        program = Program(parse(text if dtype is torch.float32 else text.replace("f32[", "bf16[")))
        generator = torch.Generator().manual_seed(0)
        shapes = {
            str(n.target): n.meta["val"].shape
            for n in program.graph.nodes
            if n.op in ("placeholder", "get_attr")
        }
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        inputs = [tensors[str(n.target)] for n in program.graph.nodes if n.op == "placeholder"]
        found: list[Tensor] = Evaluate(program, tensors).run(*inputs)
        return found

    for a, b in zip(*map(values, CASES[name]), strict=True):
        assert torch.equal(a, b)
