"""calibrate-hessian: every quantized weight's block scales are those of least error of the output, judged by
the inputs that calibration shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.dialect import rounding, shape_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.inputs import InputStatistics, Reader, readers
from fxq.graph.structure.views import shape_of
from fxq.numbers.formats import Measured
from fxq.numbers.hessian import quantize_weighted
from fxq.numbers.nvfp4 import BLOCK
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared


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
class CalibrateHessian(Pass):
    """Choose the block scales of every NVFP4 weight by d G d^T: d is what rounding changes of a block, G the
    Gram matrix of the 16 inputs that it multiplies, of all tokens of a linear, or of those routed to an
    expert with some of the layer's others counted in. Codes are the nearest.

    gram: full, or its diagonal alone, which is less to keep and sees no input that goes with another.
    """

    gram: Literal["full", "diagonal"] = "full"

    name: ClassVar[str] = "calibrate-hessian"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by quantized weights; formats without blocks miss, and a weight that two share."""
        seen: set[Node] = set()
        for reader in readers(program.graph):
            first = reader.roundings[0]
            if first in seen or first.target is WEIGHTED:
                yield Miss("nvfp4", reader.node, "its weight's scales are weighted already", depth=1)
            elif first.kwargs["format"] != "nvfp4":
                reason = f"{first.kwargs['format']} has one scale, that of its maximum: there are no blocks"
                yield Miss("nvfp4", reader.node, reason)
            elif first.target is not dialect.QUANTIZE:
                yield Miss("nvfp4", reader.node, f"%{first.name} decides its own scales")
            else:
                seen.add(first)
                yield Match("nvfp4", reader.node, {"x": reader.x, "w": first})

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        fires = {site.node for site in sites if isinstance(site, Match)}
        if not fires and not any(isinstance(site, Miss) and site.depth for site in sites):
            raise nothing_matched(self, program, "NVFP4 weights")
        statistics = InputStatistics(program.graph)
        for reader in readers(program.graph):
            if reader.node in fires:
                self._weigh(reader, statistics)
        return len(fires)

    def _weigh(self, reader: Reader, statistics: InputStatistics) -> None:
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
