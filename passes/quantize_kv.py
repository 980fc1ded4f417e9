"""quantize-kv: the keys and values that each attention reads, as its cache would hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from fxq import dialect, edit
from fxq.facts import Fact, amaxes_filled
from fxq.nvfp4 import E4M3_MAX
from fxq.pattern import Bind, Call, Match, Miss, Rule
from fxq.pipeline import nothing_matched
from fxq.program import Program
from fxq.structure import ATTENTIONS

ATTENTION = Rule("attention", Call(ATTENTIONS, Bind("q", rank=4), Bind("k", rank=4), Bind("v", rank=4)))


@dataclass(frozen=True)
class QuantizeKv:
    """FP8 keys and values, one scale each an attention.

    scale: `calibrate` takes amax / 448 from data; `cast` fixes it at 1.0, which engines assume when none is stored.
    """

    format: Literal["fp8"] = "fp8"
    scale: Literal["calibrate", "cast"] = "calibrate"

    name: ClassVar[str] = "quantize-kv"
    requires: ClassVar[tuple[Fact, ...]] = ()
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every attention; one whose keys are quantized already misses."""
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target in ATTENTIONS:
                site = ATTENTION.match(node)
                if isinstance(site, Match) and site["k"].target is dialect.QUANTIZE:
                    site = Miss(ATTENTION.name, node, "its keys are quantized already", depth=4)
                yield site

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        if not sites:
            raise nothing_matched(self, program, "an attention (scaled_dot_product_attention)")
        count = 0
        for site in sites:
            if isinstance(site, Match):
                for operand in ("k", "v"):
                    self._quantize(site, operand)
                    count += 1
        return count

    def _quantize(self, site: Match, operand: str) -> None:
        node, t = site.node, site[operand]
        name = f"{node.name}_{operand}"
        if self.scale == "cast":
            amax = edit.call(
                node.graph,
                f"{name}_amax",
                torch.ops.aten.scalar_tensor.default,
                E4M3_MAX,
                dtype=torch.float32,
            )
        else:
            amax = edit.call(node.graph, f"{name}_amax", dialect.AMAX, t)
        q: Node = edit.call(
            node.graph, f"{name}_q", dialect.QUANTIZE, t, amax, format=self.format, scale="max"
        )
        position = {"k": 1, "v": 2}[operand]
        node.args = (*node.args[:position], q, *node.args[position + 1 :])
