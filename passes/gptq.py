"""gptq: weights are rounded, codes and scales, so that what their linears and experts compute of the
calibration text changes least."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import Node

from fxq.graph.dialect import rounding, shape_at
from fxq.graph.structure.inputs import InputStatistics, Reader
from fxq.numbers import gptq
from fxq.numbers.formats import Measured
from fxq.pipeline.by_inputs import ByInputs


def _pack(
    t: Tensor, amax: Tensor, gram: Tensor, *, format: str, damp: float, order: gptq.Order, sweeps: int
) -> Measured:
    gram = gram.sum(1) if gram.dim() == 4 else gram
    return gptq.gptq(t, amax, gram, damp=damp, order=order, sweeps=sweeps)


def _grams(width: int) -> tuple[tuple[int, ...], ...]:
    return (width, width), (2, width, width)


# A weight t [out, in] in NVFP4, rounded for inputs of the Gram matrix `gram` [in, in], or of the sum of two,
# [2, in, in]: see fxq.numbers.gptq.
GPTQ = rounding(
    "gptq(Tensor t, Tensor amax, Tensor gram, *, str format, float damp, str order, int sweeps) -> Tensor",
    pack=_pack,
    rules=(
        (
            lambda n: (shape_at(n, 2) or ())[-3:] in _grams((shape_at(n, 0) or (0,))[-1]),
            "expected the Gram matrix [in, in] of a weight [out, in]",
        ),
        (lambda n: n.kwargs["format"] == "nvfp4", "gptq rounds to nvfp4"),
        (lambda n: n.kwargs["order"] in ("none", "blocks"), "order is none or blocks"),
    ),
)


@dataclass(frozen=True)
class Gptq(ByInputs):
    """Round every NVFP4 weight column by column, with feedback, by the Gram matrix of its inputs: of all its
    linear's, or of those routed to its expert, with some of the layer's other tokens counted in (an expert
    that no token reached has theirs).

    Inputs are those that calibrate-max finds: with `prefix: quantized` what the served model will multiply.

    damp: added to a Gram's diagonal, as a share of its mean.
    order: blocks rounds the 16 columns first that see the largest inputs; none goes from left to right.
    sweeps: how often each block is solved again, given all others.
    """

    damp: float = 0.01
    order: Literal["blocks", "none"] = "blocks"
    sweeps: int = 2

    name: ClassVar[str] = "gptq"
    expected: ClassVar[str] = "NVFP4 weights"

    def is_decided(self, rounding: Node) -> bool:
        return rounding.target is GPTQ

    def why_not(self, rounding: Node) -> str | None:
        format = rounding.kwargs["format"]
        return None if format == "nvfp4" else f"{format} has no block scales to choose"

    def decide(self, reader: Reader, statistics: InputStatistics) -> None:
        for node, gram in zip(reader.roundings, statistics.gram(reader), strict=True):
            node.target = GPTQ
            node.args = (node.args[0], node.args[1], gram)
            format = node.kwargs["format"]
            node.kwargs = {"format": format, "damp": self.damp, "order": self.order, "sweeps": self.sweeps}
