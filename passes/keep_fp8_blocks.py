"""keep-fp8-blocks: weights that the source holds in FP8 with a scale for 128 x 128 stay as they are, byte for
byte."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxq.graph import dialect, edit
from fxq.graph.dialect import is_rounding
from fxq.graph.hub import Hub
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.views import parameter_name, shape_of
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import is_weight_quantize

FORMAT = "fp8_blocks"


@dataclass(frozen=True)
class KeepFp8Blocks(Pass):
    """Let every weight that goes to fp8_blocks, and is held so by the source, have the source's codes and
    scales.

    They are parameters of their own, `<name>.codes` and `<name>.scales`. What the source holds otherwise is
    rounded as before.
    """

    name: ClassVar[str] = "keep-fp8-blocks"
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every weight in fp8_blocks; one that the source holds otherwise misses."""
        for node in filter(is_weight_quantize, program.graph.nodes):
            if node.kwargs["format"] != FORMAT:
                yield Miss("FP8 in blocks", node, f"it is to be {node.kwargs['format']}")
            elif node.target is dialect.ROUNDED:
                yield Miss("FP8 in blocks", node, "it has the source's codes already", depth=1)
            elif (held := program.hub.encoding_of(parameter_name(node))) != FORMAT.upper():
                reason = f"the source holds it in {held or 'plain numbers'}, not in FP8_BLOCKS"
                yield Miss("FP8 in blocks", node, reason, depth=2)
            elif not _is_whole(program.hub, parameter_name(node)):
                yield Miss("FP8 in blocks", node, "it is not all of one tensor of the source", depth=2)
            else:
                yield Match("FP8 in blocks", node, {"w": node.args[0]})

    def run(self, program: Program) -> int:
        kept = [n for n in program.graph.nodes if is_rounding(n) and n.target is dialect.ROUNDED]
        if not kept and not any(isinstance(site, Match) for site in self.sites(program)):
            raise nothing_matched(self, program, "weights in fp8_blocks that the source holds so")
        return super().run(program)

    def rewrite(self, site: Match) -> None:
        w, graph, name = site["w"], site.node.graph, parameter_name(site["w"])
        of_codes, of_scales = FORMATS[FORMAT].parts
        codes = edit.parameter(graph, f"{name}.codes", shape_of(w), of_codes.dtype)
        scales = edit.parameter(graph, f"{name}.scales", of_scales.shape(shape_of(w)), torch.float32)
        site.node.target = dialect.ROUNDED
        site.node.args = (*site.node.args[:2], codes, scales)
        site.node.kwargs = {"format": FORMAT}


def _is_whole(hub: Hub, parameter: str) -> bool:
    """Whether a parameter is one tensor of the source, as it is."""
    stored = hub.stored.get(parameter)
    if stored is None:
        return True
    (*others, part) = stored.parts
    rows = part.rows == range(hub.tensors[part.keys[0]].shape[0]) if part.keys[0] in hub.tensors else True
    return rows and not others and not stored.stacked and not stored.transposed and stored.convert is None
