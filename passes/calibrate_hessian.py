"""calibrate-hessian: every quantized weight's block scales are those of least error of the output, judged by
the inputs that calibration shows."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.dialect import rounding, shape_at
from fxq.graph.structure.inputs import InputStatistics, Reader
from fxq.graph.structure.views import shape_of
from fxq.numbers.formats import Measured
from fxq.numbers.hessian import quantize_weighted
from fxq.numbers.nvfp4 import BLOCK
from fxq.pipeline.by_inputs import ByInputs


def _pack(t: Tensor, amax: Tensor, gram: Tensor, *, format: str) -> Measured:
    return quantize_weighted(t, amax, gram)


# A weight t [out, in] in NVFP4, its block scales chosen by Gram matrices of blocks of 16 inputs, `gram`
# [in / 16, 16, 16]: see fxq.numbers.hessian.
WEIGHTED = rounding(
    "quantize_weighted(Tensor t, Tensor amax, Tensor gram, *, str format) -> Tensor",
    pack=_pack,
    rules=(
        (
            lambda n: shape_at(n, 2) == ((shape_at(n, 0) or (0,))[-1] // BLOCK, BLOCK, BLOCK),
            "expected Gram matrices [in / 16, 16, 16] of a weight [out, in]",
        ),
        (lambda n: n.kwargs["format"] == "nvfp4", "quantize_weighted rounds to nvfp4"),
    ),
)


@dataclass(frozen=True)
class CalibrateHessian(ByInputs):
    """Choose the block scales of every NVFP4 weight by d G d^T: d is what rounding changes of a block, G the
    Gram matrix of the 16 inputs that it multiplies, of all tokens of a linear, or of those routed to an
    expert with some of the layer's others counted in. Codes are the nearest.

    gram: full, or its diagonal alone, which is less to keep and sees no input that goes with another.
    """

    gram: Literal["full", "diagonal"] = "full"

    name: ClassVar[str] = "calibrate-hessian"
    expected: ClassVar[str] = "NVFP4 weights"

    def is_decided(self, rounding: Node) -> bool:
        return rounding.target is WEIGHTED

    def why_not(self, rounding: Node) -> str | None:
        format = rounding.kwargs["format"]
        if format != "nvfp4":
            return f"{format} has one scale, that of its maximum: there are no blocks"
        return None if rounding.target is dialect.QUANTIZE else f"%{rounding.name} decides its own scales"

    def decide(self, reader: Reader, statistics: InputStatistics) -> None:
        if self.gram == "full":
            grams = statistics.take(dialect.GRAM_BLOCKS, dialect.EXPERT_GRAM_BLOCKS, reader, reader.x)
        else:
            squares = statistics.take(dialect.SQUARE_SUM, dialect.EXPERT_SQUARE_SUM, reader, reader.x)
            grams = [_diagonal(square) for square in squares]
        for node, gram in zip(reader.roundings, grams, strict=True):
            node.target = WEIGHTED
            node.args = (node.args[0], node.args[1], gram)
            node.kwargs = {"format": node.kwargs["format"]}


def _diagonal(squares: Node) -> Node:
    """Sums of squares [K] as Gram matrices of blocks, [K / 16, 16, 16]."""
    aten, shape = torch.ops.aten, [shape_of(squares)[0] // BLOCK, BLOCK]
    blocks = edit.call(squares.graph, f"{squares.name}_blocks", aten.view.default, squares, shape)
    return edit.call(squares.graph, f"{squares.name}_diagonal", aten.diag_embed.default, blocks)
