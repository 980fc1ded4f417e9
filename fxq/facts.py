"""Facts that passes require and ensure: each answers None when it holds for a program, else why it does not."""

from collections.abc import Callable

from fxq import dialect
from fxq.program import Program
from fxq.structure import VIEWS, Frontiers, fused_by_engines, root, shape_of, strip, value_of, weight_matmuls

Fact = Callable[[Program], str | None]


def experts_fused(program: Program) -> str | None:
    """Every 3-D parameter that reaches a matmul does so through `fxq.expert_linear` or one `fxq.slice`."""
    for matmul in weight_matmuls(program.graph):
        is_slice = strip(matmul.w, VIEWS | {dialect.QUANTIZE}).target is dialect.SLICE
        if (
            len(shape_of(matmul.parameter)) == 3
            and matmul.node.target is not dialect.EXPERT_LINEAR
            and not is_slice
        ):
            return f"@{matmul.parameter.target} reaches %{matmul.node.name} ({matmul.node.target}), which no pattern knows"
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
    seen: dict[object, object] = {}
    for key, members in quantized_siblings(program).items():
        for position, what in ((0, "weight"), (1, "input")):
            for member in members:
                amax = member[position].args[1] if member[position] is not None else None
                if seen.setdefault((key, what), amax) is not amax:
                    return f"%{member[0].name} reads the same value as its siblings but has a {what} amax of its own"
    return None


def amaxes_filled(program: Program) -> str | None:
    """Every amax hole has a calibrated value."""
    for node in program.graph.nodes:
        if node.target is dialect.AMAX and node.name not in program.values:
            return f"%{node.name} has no value"
    return None


def is_weight_quantize(node) -> bool:  # type: ignore[no-untyped-def]
    """True for a quantize node whose operand is a parameter or a slice of one."""
    return node.target is dialect.QUANTIZE and root(node.args[0]) is not None


def quantized_siblings(program: Program):  # type: ignore[no-untyped-def]
    """(input value, expert or None) -> [(weight quantize, input quantize or None)] of the matmuls that read it."""
    siblings: dict[object, list[tuple[object, object]]] = {}
    for matmul in weight_matmuls(program.graph):
        x = strip(matmul.x, VIEWS)
        x_quantize = x if x.target is dialect.QUANTIZE else None
        w = strip(matmul.w, VIEWS)
        is_experts = matmul.node.target is dialect.EXPERT_LINEAR
        slices = w.args[0] if w.target is dialect.STACK else [w]
        for expert, quantize in enumerate(slices):  # type: ignore[arg-type]
            if quantize.target is dialect.QUANTIZE:
                key = (value_of(matmul.x), expert if is_experts else None)
                siblings.setdefault(key, []).append((quantize, x_quantize))
    return siblings
