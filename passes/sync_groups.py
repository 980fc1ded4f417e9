"""sync-groups: quantized weights that read the same value, or lie in one tensor of the checkpoint, share one
weight amax and one input amax; experts that are linears share an input amax a layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxq.errors import VerifyError
from fxq.graph import dialect, edit
from fxq.graph.arguments import joined, node_at, nodes_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import (
    Fact,
    amaxes_shared,
    quantized_siblings,
    routed_inputs,
    tensor_siblings,
    tensors_whole,
    weights_placed,
    weights_quantized,
)


@dataclass(frozen=True)
class SyncGroups(Pass):
    """Join the amaxes of siblings (q/k/v, gate/up, MLA's q_a/kv_a, ...) and of what the checkpoint holds in
    one tensor (all experts of a fused weight) *before* any block scale is chosen."""

    name: ClassVar[str] = "sync-groups"
    ensures: ClassVar[tuple[Fact, ...]] = (amaxes_shared, tensors_whole, weights_placed)
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every quantized weight: with the value or the tensor it shares, or alone."""
        in_one_tensor = [siblings for siblings in tensor_siblings(program).values() if len(siblings) > 1]
        together = {quantize for siblings in in_one_tensor for quantize, _ in siblings}
        for (value, *_), siblings in quantized_siblings(program).items():
            for quantize, _ in siblings:
                if len(siblings) > 1 or quantize in together:
                    yield Match("sibling", quantize, {"value": value})
                else:
                    reason = f"nothing else that is quantized reads %{value.name}"
                    yield Miss("sibling", quantize, reason, depth=1)

    def run(self, program: Program) -> int:
        if (reason := weights_quantized(program)) is not None:
            raise VerifyError(
                f"sync-groups: {reason}: expected quantize-linears or quantize-experts to have fired before"
            )
        groups = [*quantized_siblings(program).values(), *tensor_siblings(program).values()]
        names: dict[Node, str] = {}
        for quantize, x in (sibling for siblings in groups for sibling in siblings):
            names.setdefault(quantize, f"{node_at(quantize, 0).name}_group_amax")
            if x is not None:
                names.setdefault(x, f"{node_at(quantize, 0).name}_group_input_amax")
        weights = joined([quantize for quantize, _ in siblings] for siblings in groups)
        inputs = joined(
            [*([x for _, x in siblings if x is not None] for siblings in groups), *routed_inputs(program)]
        )
        return sum(_share(nodes, names[nodes[0]]) for nodes in (*weights, *inputs))


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
        quantize.args = (quantize.args[0], shared, *quantize.args[2:])
    return 1
