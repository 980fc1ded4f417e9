"""quantize-kv: the keys and values that each attention reads, as its cache would hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.dialect import is_rounding
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.attention import Attention, attentions, latent_projection, other_softmaxes
from fxq.graph.structure.matmuls import Frontiers, quantizes_input
from fxq.graph.structure.views import VIEWS, strip
from fxq.numbers.formats import FORMATS, CacheFormat
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """FP8 keys and values, one scale each an attention.

    format: that of the cache.
    scale: `calibrate` takes amax / 448 from data; `cast` fixes it at 1.0, which engines assume when none is
    stored.
    required: whether a model without attention is an error.
    """

    format: CacheFormat = "fp8"
    scale: Literal["calibrate", "cast"] = "calibrate"
    required: bool = True

    name: ClassVar[str] = "quantize-kv"
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every attention; one whose cache is quantized already misses."""
        frontiers = Frontiers(program.graph)
        for attention in attentions(program.graph):
            if _is_cached(attention, frontiers):
                yield Miss("attention", attention.node, "its keys are quantized already", depth=1)
            else:
                yield Match(
                    "attention", attention.node, {"q": attention.q, "k": attention.k, "v": attention.v}
                )
        for node, reason in other_softmaxes(program.graph):
            yield Miss("attention", node, reason)

    def run(self, program: Program) -> int:
        found, frontiers = list(attentions(program.graph)), Frontiers(program.graph)
        if not found and self.required:
            raise nothing_matched(self, program, "an attention (softmax of a product of activations)")
        if not found:
            program.notes.append("no attention was found: there is no KV cache to quantize")
        fresh = [attention for attention in found if not _is_cached(attention, frontiers)]
        count = 0
        for attention in fresh:
            latent = latent_projection(frontiers, attention)
            if latent is not None:
                self._quantize_latent(attention.node, frontiers.matmuls[latent].x, program)
                count += 1
            else:
                count += self._quantize(attention.node, "k", *attention.k_at)
                count += self._quantize(attention.node, "v", *attention.v_at)
        return count

    def _quantize(self, attention: Node, operand: str, node: Node, position: int) -> int:
        t = node_at(node, position)
        shared = next((user for user in t.users if _is_cache(user)), None)
        if shared is not None:  # another attention reads the same cache
            node.args = (*node.args[:position], shared, *node.args[position + 1 :])
            return 0
        name = f"{attention.name}_{operand}"
        amax = self._cast_amax(node, name) if self.scale == "cast" else None
        q = edit.quantize(t, name, format=self.format, scale="max", amax=amax)
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
        latent = node_at(reader, 0) if is_rounding(reader) else x
        name = f"{node.name}_latent"
        amax = self._cast_amax(node, name)
        q = edit.quantize(latent, name, format=self.format, scale="max", amax=amax)
        edit.replace(latent, q, [user for user in latent.users if user not in (q, amax)])

    def _cast_amax(self, node: Node, name: str) -> Node:
        """The amax whose scale is 1.0."""
        scalar, largest = torch.ops.aten.scalar_tensor.default, FORMATS[self.format].largest
        return edit.call(node.graph, f"{name}_amax", scalar, largest, dtype=torch.float32)


def _is_cached(attention: Attention, frontiers: Frontiers) -> bool:
    """Whether an attention's keys, or its latent, are quantized already."""
    latent = latent_projection(frontiers, attention)
    cached = attention.k if latent is None else frontiers.matmuls[latent].x
    while not _is_cache(cached) and (cached.target in VIEWS or is_rounding(cached)):
        cached = node_at(cached, 0)
    return _is_cache(cached)


def _is_cache(node: Node) -> bool:
    """Whether a node quantizes keys or values, and not the input of a linear."""
    if node.target is not dialect.QUANTIZE or quantizes_input(node):
        return False
    return FORMATS[str(node.kwargs["format"])].caches
