"""Symbolic sizes: those of inputs have an example value, those that only data knows have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxq.trace.symbols import backed, data_symbols, examples, size_at


class Both(nn.Module):
    """A result [2 S + 1], one as long as the data says, one of 5."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([x, x, x[:1]]), x.nonzero(), x.new_zeros(5)


@pytest.fixture(scope="module")
def found() -> tuple[Any, Any, Any, Any]:
    """(the input's size, a size made of it, one known from data, a plain one) of a graph traced at 17."""
    program = torch.export.export(Both(), (torch.ones(17),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    (given,) = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    output = next(n for n in program.graph.nodes if n.op == "output")
    shapes = [n.meta["val"].shape[0] for n in output.args[0]]
    return given.shape[0], *shapes  # type: ignore[return-value]


def test_sizes_of_inputs_are_known_by_example(found: tuple[Any, Any, Any, Any]) -> None:
    given, made, data, plain = found
    (symbol,) = examples([given])
    assert examples([made, data, plain]) == {symbol: 17}
    assert backed(given)[symbol] == 17


def test_a_size_is_worked_out_at_other_values(found: tuple[Any, Any, Any, Any]) -> None:
    given, made, _, plain = found
    (symbol,) = examples([given])
    assert [size_at(size, {symbol: 4}) for size in (given, made, plain, 3)] == [4, 9, 5, 3]
    assert size_at(made, examples([made])) == 35


def test_only_sizes_that_data_decides_are_of_data(found: tuple[Any, Any, Any, Any]) -> None:
    given, made, data, plain = found
    assert [len(data_symbols(size)) for size in (given, made, data, plain, 7)] == [0, 0, 1, 0, 0]
