"""quantize-experts: one quantize node per expert slice, and one per projection input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from fxq import dialect, edit
from fxq.errors import VerifyError
from fxq.facts import Fact, amaxes_filled, amaxes_shared, experts_fused, is_weight_quantize
from fxq.nodes import node_at
from fxq.nvfp4 import BLOCK
from fxq.pattern import Bind, Call, Match, Miss, Rule, Weight
from fxq.pipeline import nothing_matched
from fxq.program import Program
from fxq.structure import VIEWS, is_expert, root, shape_of, strip, weight_matmuls

EXPERTS = Rule(
    "expert_linear", Call(dialect.EXPERT_LINEAR, Bind("x", rank=2), Weight("w", rank=3), Bind("ids"))
)
ONE_EXPERT = Rule(
    "linear of a slice",
    Call(torch.ops.aten.linear.default, Bind("x"), Call(dialect.SLICE, Weight("w", rank=3))),
)
RULES = EXPERTS + ONE_EXPERT


@dataclass(frozen=True)
class QuantizeExperts:
    """Quantize every slice of every fused expert weight (2 x experts nodes in a gated layer) and what
    multiplies them.

    weights: their format. inputs: the activations' format, or none for weight-only. required: whether a
    model without experts is an error.
    """

    weights: Literal["nvfp4"] = "nvfp4"
    inputs: Literal["nvfp4", "none"] = "nvfp4"
    required: bool = True

    name: ClassVar[str] = "quantize-experts"
    requires: ClassVar[tuple[Fact, ...]] = (experts_fused,)
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by a parameter; those that are no experts miss."""
        for matmul in list(weight_matmuls(program.graph)):
            if strip(matmul.w, VIEWS).target not in (dialect.STACK, dialect.QUANTIZE):
                yield RULES.match(matmul.node)

    def run(self, program: Program) -> int:
        matches = [site for site in self.sites(program) if isinstance(site, Match)]
        already = any(is_weight_quantize(n) and is_expert(node_at(n, 0)) for n in program.graph.nodes)
        if not matches and self.required and not already:
            raise nothing_matched(self, program, "fused expert weights (a 3-D parameter in a matmul)")
        count = 0
        for site in matches:
            _check_blocks(site["w"])
            slices = _quantized_slices(site, self.weights)
            if self.inputs != "none":
                _quantize_input(site, self.inputs)
            count += slices
        return count


def _check_blocks(w: Node) -> None:
    width = shape_of(w)[-1]
    if width % BLOCK:
        parameter = root(w) or w
        raise VerifyError(
            f"{parameter.target}: each expert's input dimension is {width}; NVFP4 needs a multiple of {BLOCK}"
        )


def _quantized_slices(site: Match, format: str) -> int:
    graph, w = site.node.graph, site["w"]
    if site.rule == ONE_EXPERT.name:
        piece = site.node.args[1]
        assert isinstance(piece, Node)
        edit.replace(piece, _quantize(piece, format), [site.node])
        return 1
    pieces = [
        _quantize(edit.call(graph, f"{w.name}_e{e}", dialect.SLICE, w, e), format)
        for e in range(shape_of(w)[0])
    ]
    edit.replace(w, edit.call(graph, f"{w.name}_q", dialect.STACK, pieces), [site.node])
    return len(pieces)


def _quantize(piece: Node, format: str) -> Node:
    amax = edit.call(piece.graph, f"{piece.name}_amax", dialect.AMAX, piece)
    return edit.call(
        piece.graph, f"{piece.name}_q", dialect.QUANTIZE, piece, amax, format=format, scale="max"
    )


def _quantize_input(site: Match, format: str) -> None:
    graph, x, name = site.node.graph, site["x"], f"{site['w'].name}_input"
    if site.rule == ONE_EXPERT.name:
        name = f"{node_at(node_at(site.node, 1), 0).name}_input"
    amax = edit.call(graph, f"{name}_amax", dialect.AMAX, x)
    q = edit.call(graph, f"{name}_q", dialect.QUANTIZE, x, amax, format=format, scale="dynamic")
    edit.replace(x, q, [site.node])
