"""Facts that passes require and ensure: each answers None when it holds for a program, else why it does
not."""

from collections.abc import Callable

from torch.fx import Node

from fxq import dialect
from fxq.nodes import node_at, nodes_at
from fxq.program import Program
from fxq.structure import (
    VIEWS,
    Frontiers,
    fused_by_engines,
    input_quantize,
    is_expert,
    root,
    strip,
    value_of,
    weight_matmuls,
)
from fxq.text import format_target

Fact = Callable[[Program], str | None]


def experts_fused(program: Program) -> str | None:
    """Every stacked parameter that reaches a matmul does so through `fxq.expert_linear` or one
    `fxq.slice`."""
    for matmul in weight_matmuls(program.graph):
        is_slice = strip(matmul.w, VIEWS | {dialect.QUANTIZE}).target is dialect.SLICE
        if is_expert(matmul.w) and matmul.node.target is not dialect.EXPERT_LINEAR and not is_slice:
            return (
                f"@{matmul.parameter.target} reaches %{matmul.node.name} "
                f"({format_target(matmul.node.target)}) "
                "in a form that no pattern knows"
            )
    return None


def weights_quantized(program: Program) -> str | None:
    """Some weight goes through a quantize node."""
    return None if any(is_weight_quantize(node) for node in program.graph.nodes) else "no weight is quantized"


def groups_whole(program: Program) -> str | None:
    """Of the linears that engines fuse, all are quantized or none (engines refuse a mixture)."""
    frontiers = Frontiers(program.graph)
    for kind, group in fused_by_engines(program.graph, frontiers):
        names: dict[bool, list[str]] = {True: [], False: []}
        for node in group:
            matmul = frontiers.matmuls[node]
            names[strip(matmul.w, VIEWS).target is dialect.QUANTIZE].append(str(matmul.parameter.target))
        if names[True] and names[False]:
            return (
                f"engines fuse {kind}, so all or none must be quantized: "
                f"{', '.join(names[True])} would be, {', '.join(names[False])} not; change `only` or `skip`"
            )
    return None


def amaxes_shared(program: Program) -> str | None:
    """Quantized weights that read one value have one weight amax and one input amax."""
    for members in quantized_siblings(program).values():
        first = members[0]
        for member in members[1:]:
            for what, mine, theirs in zip(("a weight", "an input"), member, first, strict=True):
                if mine is not None and theirs is not None and mine.args[1] is not theirs.args[1]:
                    return (
                        f"%{mine.name} reads the same value as %{theirs.name} but has {what} amax of its own"
                    )
    return None


def amaxes_filled(program: Program) -> str | None:
    """Every amax hole has a calibrated value."""
    for node in program.graph.nodes:
        if node.target is dialect.AMAX and node.name not in program.values:
            return f"%{node.name} has no value"
    return None


def is_weight_quantize(node: Node) -> bool:
    """True for a quantize node whose operand is a parameter or a slice of one."""
    return node.target is dialect.QUANTIZE and root(node_at(node, 0)) is not None


Siblings = dict[tuple[Node, int | None], list[tuple[Node, Node | None]]]


def quantized_siblings(program: Program) -> Siblings:
    """(input value, expert or None) -> (weight quantize, input quantize or None) of what reads it."""
    siblings: Siblings = {}
    for matmul in weight_matmuls(program.graph):
        w, x_quantize = strip(matmul.w, VIEWS), input_quantize(matmul.x)
        slices = nodes_at(w, 0) if w.target is dialect.STACK else [w]
        for expert, quantize in enumerate(slices):
            if quantize.target is dialect.QUANTIZE:
                key = (value_of(matmul.x), expert if matmul.node.target is dialect.EXPERT_LINEAR else None)
                siblings.setdefault(key, []).append((quantize, x_quantize))
    return siblings
