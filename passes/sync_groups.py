"""sync-groups: quantized weights that read the same value share one weight amax and one input amax."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxq import dialect, edit
from fxq.errors import VerifyError
from fxq.facts import Fact, amaxes_shared, quantized_siblings, weights_quantized
from fxq.nodes import node_at, nodes_at
from fxq.pattern import Match, Miss
from fxq.program import Program


@dataclass(frozen=True)
class SyncGroups:
    """Join the amaxes of siblings (q/k/v, gate/up, MLA's q_a/kv_a, ...) *before* any block scale is
    chosen."""

    name: ClassVar[str] = "sync-groups"
    requires: ClassVar[tuple[Fact, ...]] = ()
    ensures: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)
    breaks: ClassVar[tuple[Fact, ...]] = ()

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantized weight: with the value it shares, or alone."""
        for (value, _), members in quantized_siblings(program).items():
            for quantize, _ in members:
                if len(members) > 1:
                    yield Match("sibling", quantize, {"value": value})
                else:
                    reason = f"nothing else that is quantized reads %{value.name}"
                    yield Miss("sibling", quantize, reason, depth=1)

    def run(self, program: Program) -> int:
        if (reason := weights_quantized(program)) is not None:
            raise VerifyError(
                f"sync-groups: {reason}: expected quantize-linears or quantize-experts to have fired before"
            )
        count = 0
        for members in quantized_siblings(program).values():
            weights = [quantize for quantize, _ in members]
            inputs = [x for _, x in members if x is not None]
            name = node_at(weights[0], 0).name
            count += _share(weights, f"{name}_group_amax")
            count += _share(inputs, f"{name}_group_input_amax")
        return count


def _share(quantizes: list[Node], name: str) -> int:
    """Give all of `quantizes` one sync of their amaxes; 0 if they have one already."""
    amaxes = list(dict.fromkeys(node_at(q, 1) for q in quantizes))
    if len(amaxes) < 2:
        return 0
    holes: dict[Node, None] = {}
    for amax in amaxes:
        holes.update(dict.fromkeys(nodes_at(amax, 0) if amax.target is dialect.SYNC else [amax]))
    shared = edit.call(quantizes[0].graph, name, dialect.SYNC, list(holes))
    for quantize in dict.fromkeys(quantizes):
        quantize.args = (quantize.args[0], shared)
    return 1
