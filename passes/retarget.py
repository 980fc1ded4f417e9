"""retarget: weights are changed, before they are rounded, to those that come nearest to the original outputs
from the inputs that there will be."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.dialect import operator, shape_at, tensor_type
from fxq.graph.structure.inputs import InputStatistics, Reader
from fxq.graph.structure.views import strip
from fxq.numbers.retarget import retarget
from fxq.pipeline.by_inputs import ByInputs


def _one(*args: Tensor) -> Tensor:
    return retarget(*(arg[None] for arg in args))[0]


# A weight [out, in] fitted to what is left of its inputs, and many: see fxq.numbers.retarget.
RETARGET_MANY = operator(
    "retarget_many(Tensor w, Tensor original, Tensor cross, Tensor gram, Tensor tokens) -> Tensor",
    run=retarget,
    shape=lambda w, original, cross, gram, tokens: tensor_type(w.shape, torch.float32),
)
RETARGET = operator(
    "retarget(Tensor w, Tensor original, Tensor cross, Tensor gram, Tensor tokens) -> Tensor",
    run=_one,
    many=RETARGET_MANY,
    shape=lambda w, original, cross, gram, tokens: tensor_type(w.shape, torch.float32),
    rules=(
        (lambda n: shape_at(n, 0) == shape_at(n, 1), "expected the original weight [out, in]"),
        (
            lambda n: shape_at(n, 2) == shape_at(n, 3) == (2, *(shape_at(n, 0) or ())[-1:] * 2),
            "expected Gram matrices [2, in, in] of a weight [out, in]",
        ),
    ),
)


@dataclass(frozen=True)
class Retarget(ByInputs):
    """Replace every quantized weight W, unrounded yet, by the V of least |O x - V y|^2 + ridge |V - W|^2 over
    the calibration tokens: x is what its linear or expert reads in the original model, whose weight is O (W,
    unless an earlier pass rewrote it), y the same tokens as the quantized model hands them on, rounded. V
    undoes part of what earlier layers and its own inputs lose.

    The ridge of each weight is chosen by a fourth of the tokens that the others did not fit; with fewer than
    8 tokens an input a weight stays as it is. Needs `calibrate-max: {prefix: quantized}`.
    """

    name: ClassVar[str] = "retarget"
    expected: ClassVar[str] = "quantized weights"

    def is_decided(self, rounding: Node) -> bool:
        w = node_at(rounding, 0)
        return w.target is dialect.REWRITE and node_at(w, 1).target is RETARGET

    def decide(self, reader: Reader, statistics: InputStatistics) -> None:
        original = statistics.original(reader)
        split = dialect.SPLIT_GRAM, dialect.EXPERT_SPLIT_GRAM
        crosses = statistics.take(*split, reader, original, reader.x)
        grams = statistics.take(*split, reader, reader.x, reader.x)
        tokens = statistics.tokens(reader)
        for node, cross, gram, count in zip(reader.roundings, crosses, grams, tokens, strict=True):
            w = node_at(node, 0)
            before = strip(w, frozenset({dialect.REWRITE}))
            fitted = edit.call(w.graph, f"{w.name}_fitted", RETARGET, w, before, cross, gram, count)
            made = edit.call(w.graph, f"{w.name}_new", dialect.REWRITE, w, fitted)
            edit.replace(w, made, [u for u in w.users if u.target is dialect.AMAX or u is node])
