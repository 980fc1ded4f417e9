"""quantize-kv: the keys and values that each attention reads, as its cache would hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from fxq import dialect, edit
from fxq.facts import Fact, amaxes_filled
from fxq.nodes import node_at
from fxq.nvfp4 import E4M3_MAX
from fxq.pattern import Bind, Call, Match, Miss, Rule
from fxq.pipeline import nothing_matched
from fxq.program import Program
from fxq.structure import ATTENTIONS, VIEWS, Frontiers, latent_projection, strip

ATTENTION = Rule("attention", Call(ATTENTIONS, Bind("q", rank=4), Bind("k", rank=4), Bind("v", rank=4)))


@dataclass(frozen=True)
class QuantizeKv:
    """FP8 keys and values, one scale each an attention.

    scale: `calibrate` takes amax / 448 from data; `cast` fixes it at 1.0, which engines assume when none is
    stored.
    """

    format: Literal["fp8"] = "fp8"
    scale: Literal["calibrate", "cast"] = "calibrate"

    name: ClassVar[str] = "quantize-kv"
    requires: ClassVar[tuple[Fact, ...]] = ()
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every attention; one whose cache is quantized already misses."""
        done = _done(program)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target in ATTENTIONS:
                site = ATTENTION.match(node)
                if isinstance(site, Match) and node in done:
                    site = Miss(ATTENTION.name, node, "its keys are quantized already", depth=4)
                yield site

    def run(self, program: Program) -> int:
        sites = list(self.sites(program))
        if not sites:
            raise nothing_matched(self, program, "an attention (scaled_dot_product_attention)")
        frontiers = Frontiers(program.graph)
        count = 0
        for site in sites:
            if isinstance(site, Match):
                latent = latent_projection(frontiers, site.node)
                if latent is not None:
                    self._quantize_latent(site.node, frontiers.matmuls[latent].x, program)
                    count += 1
                else:
                    count += self._quantize(site, "k", 1) + self._quantize(site, "v", 2)
        return count

    def _quantize(self, site: Match, operand: str, position: int) -> int:
        node, t = site.node, site[operand]
        shared = next(
            (u for u in t.users if u.target is dialect.QUANTIZE and u.kwargs["format"] == self.format), None
        )
        if shared is not None:  # another attention reads the same cache
            node.args = (*node.args[:position], shared, *node.args[position + 1 :])
            return 0
        name = f"{node.name}_{operand}"
        amax = (
            _cast_amax(node, name)
            if self.scale == "cast"
            else edit.call(node.graph, f"{name}_amax", dialect.AMAX, t)
        )
        q = edit.call(node.graph, f"{name}_q", dialect.QUANTIZE, t, amax, format=self.format, scale="max")
        node.args = (*node.args[:position], q, *node.args[position + 1 :])
        return 1

    def _quantize_latent(self, node: Node, x: Node, program: Program) -> None:
        """Engines cache the latent that keys and values are expanded from, and read no stored scale for
        it: cast."""
        note = (
            "attentions cache a latent, for which engines load no scale: its FP8 scale is 1.0, not calibrated"
        )
        if self.scale == "calibrate" and note not in program.notes:
            program.notes.append(note)
        reader = strip(x, VIEWS)
        latent = node_at(reader, 0) if reader.target is dialect.QUANTIZE else x
        amax = _cast_amax(node, f"{node.name}_latent")
        name = f"{node.name}_latent_q"
        q = edit.call(node.graph, name, dialect.QUANTIZE, latent, amax, format=self.format, scale="max")
        edit.replace(latent, q, [user for user in latent.users if user not in (q, amax)])


def _cast_amax(node: Node, name: str) -> Node:
    """The amax whose FP8 scale is 1.0."""
    scalar = torch.ops.aten.scalar_tensor.default
    return edit.call(node.graph, f"{name}_amax", scalar, E4M3_MAX, dtype=torch.float32)


def _done(program: Program) -> set[Node]:
    """Attentions whose keys, or whose latent, are quantized already."""
    frontiers = Frontiers(program.graph)
    done = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in ATTENTIONS:
            latent = latent_projection(frontiers, node)
            cached = node_at(node, 1) if latent is None else frontiers.matmuls[latent].x
            while cached.target in VIEWS or (
                cached.target is dialect.QUANTIZE and cached.kwargs["format"] != "fp8"
            ):
                cached = node_at(cached, 0)
            if cached.target is dialect.QUANTIZE:
                done.add(node)
    return done
