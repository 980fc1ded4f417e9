"""Format groups: quantized weights that have one format, because one kernel of an engine multiplies them.

%q : bf16[8,64] = aten.linear(%x_q, %wq_q)              q/k/v, gate/up and whatever else reads one value share
%k : bf16[8,32] = aten.linear(%x_q, %wk_q)              their scales, and run as one
%h : bf16[16,96] = fxq.expert_linear(%r_q, %up_q, %ids)   all experts of a layer, up and down
"""

from collections.abc import Iterator

from torch.fx import Node

from fxq.graph import dialect
from fxq.graph.arguments import joined, node_at, nodes_at
from fxq.graph.dialect import is_rounding
from fxq.graph.program import Program
from fxq.graph.structure.experts import expert_lists, multiplies_experts
from fxq.graph.structure.groups import fused_by_engines
from fxq.graph.structure.matmuls import Frontiers, WeightMatmul
from fxq.graph.structure.views import VIEWS, strip, value_of
from fxq.pipeline.facts import holders


def roundings(matmul: WeightMatmul) -> list[Node]:
    """The roundings of a matmul's weight, one an expert; [] if it is not quantized."""
    w = strip(matmul.w, VIEWS)
    found = list(nodes_at(w, 0)) if w.target is dialect.STACK else [w]
    return found if all(map(is_rounding, found)) else []


def format_groups(program: Program) -> list[list[WeightMatmul]]:
    """The matmuls by quantized weights, in groups that must have one format: those whose weights share an
    amax (they read one value, or lie in one tensor of the checkpoint) or are one, those that engines fuse,
    and all by experts of a layer."""
    frontiers = Frontiers(program.graph)
    quantized = {node: matmul for node, matmul in frontiers.matmuls.items() if roundings(matmul)}
    sets: list[list[object]] = [[node, *_shared(matmul, program)] for node, matmul in quantized.items()]
    for _, fused in fused_by_engines(program.graph, frontiers):
        sets.append([node for node in fused if node in quantized])
    sets += _experts(program, frontiers, quantized)
    groups = joined(found for found in sets if found)
    members = [[quantized[n] for n in group if isinstance(n, Node) and n in quantized] for group in groups]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    in_order = (sorted(group, key=lambda matmul: order[matmul.node]) for group in members if group)
    return sorted(in_order, key=lambda group: order[group[0].node])


def _shared(matmul: WeightMatmul, program: Program) -> Iterator[object]:
    """What a matmul has in common with others of its group: amaxes, parameter, tensors of the checkpoint."""
    yield from (node_at(rounding, 1) for rounding in roundings(matmul))
    name = str(matmul.parameter.target)
    yield name
    if (stored := program.hub.names.get(name)) is not None:
        yield from holders(stored)


def _experts(
    program: Program, frontiers: Frontiers, quantized: dict[Node, WeightMatmul]
) -> Iterator[list[object]]:
    """Matmuls by experts: those that read the same, or one of which feeds the other."""
    # What experts that are linears of their own multiply -> its layer's number.
    together: dict[Node, int] = {}
    for number, listed in enumerate(expert_lists(program.graph)):
        together.update((value_of(matmul.x), number) for matmul in listed)
    experts = {
        node: matmul
        for node, matmul in quantized.items()
        if value_of(matmul.x) in together or multiplies_experts(matmul)
    }
    for node, matmul in experts.items():
        x = value_of(matmul.x)
        yield [node, ("inputs", together.get(x, x))]
        feeding = frontiers.of(matmul.x, most=len(experts))
        if feeding and all(other in experts for other in feeding):
            yield [node, *feeding]
