"""cast-mxfp4: weights that the source holds in MXFP4 become NVFP4 of the same values: codes stay, powers of
two become block scales, under a power of two that the group shares."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxq.graph import dialect
from fxq.graph.dialect import is_rounding, rounding
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.views import parameter_name
from fxq.numbers import mxfp4
from fxq.numbers.formats import Measured
from fxq.pipeline.base import Pass, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_shared, is_weight_quantize


def _pack(t: Tensor, amax: Tensor, *, format: str) -> Measured:
    return mxfp4.cast(t, amax)


# A weight t [out, in] of MXFP4 values in NVFP4, all scales powers of two: see fxq.numbers.mxfp4.
CAST = rounding(
    "cast_mxfp4(Tensor t, Tensor amax, *, str format) -> Tensor",
    pack=_pack,
    rules=((lambda n: n.kwargs["format"] == "nvfp4", "cast_mxfp4 gives nvfp4"),),
)


@dataclass(frozen=True)
class CastMxfp4(Pass):
    """Give every NVFP4 weight that the source holds in MXFP4 the scales under which nothing is rounded.

    It follows from the weight and the amax of its group alone. Exact are all blocks whose power of two is at
    most 2^17 times smaller than the group's largest; the report counts the others, which are rounded to
    nearest under the smallest scale that there is. A weight that the source holds otherwise is left to other
    passes.
    """

    name: ClassVar[str] = "cast-mxfp4"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantize node; those of activations and of weights that the source holds otherwise miss."""
        for node in filter(is_rounding, program.graph.nodes):
            reason, depth = None, 0
            if not is_weight_quantize(node):
                reason = "its operand is an activation, which the source does not hold"
            elif node.target is CAST:
                reason, depth = "it is cast already", 1
            elif node.kwargs["format"] != "nvfp4":
                reason = f"it is to be {node.kwargs['format']}, which does not hold the codes of MXFP4"
            elif node.target is not dialect.QUANTIZE or node.kwargs["scale"] != "max":
                reason, depth = "another pass chose its scales", 2
            elif (held := program.hub.encoding_of(parameter_name(node))) != "MXFP4":
                reason, depth = f"the source holds it in {held or 'plain numbers'}, not in MXFP4", 2
            if reason is None:
                yield Match("MXFP4 weight", node, {"w": node.args[0]})
            else:
                yield Miss("MXFP4 weight", node, reason, depth=depth)

    def run(self, program: Program) -> int:
        if not any(isinstance(site, Match) or site.node.target is CAST for site in self.sites(program)):
            raise nothing_matched(self, program, "NVFP4 weights that the source holds in MXFP4")
        return super().run(program)

    def rewrite(self, site: Match) -> None:
        site.node.target = CAST
        site.node.kwargs = {"format": site.node.kwargs["format"]}
