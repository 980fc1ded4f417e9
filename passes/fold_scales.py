"""fold-scales: channels of a norm's output are scaled where that makes rounding lose less: the norm's scale
is divided by what the columns of all linears behind it are multiplied by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.dialect import is_rounding, is_statistic, operator, shape_at, tensor_type
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.experts import PICKED
from fxq.graph.structure.matmuls import WeightMatmul, as_weight_matmul, input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, shape_of, strip
from fxq.numbers.folding import fold_scale
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import Fact, amaxes_filled

_ATEN = torch.ops.aten
_MUL, _ADD = _ATEN.mul.Tensor, _ATEN.add.Tensor
_COLUMNS = (_ATEN.linear.default, dialect.EXPERT_LINEAR)  # columns of their weights are the inputs
# Tokens that a fold is chosen by, and how many one batch gives.
ROWS, OF_BATCH = 1024, 128
_LOOKED_AT = 24  # matrices, of which experts have many


def _sample(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    step = max(1, -(-len(rows) // OF_BATCH))
    out = rows.new_zeros(ROWS, rows.shape[-1], dtype=torch.float32)
    taken = rows[::step][:OF_BATCH]
    out[: len(taken)] = taken
    return out


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The rows of a, then those of b, as many as there is place for."""
    rows = torch.cat([t[t.abs().amax(-1) > 0] for t in (a, b)])[:ROWS]
    out = torch.zeros_like(a)
    out[: len(rows)] = rows
    return out


# Some rows of x [..., K], evenly from every batch until there are 1,024, [1024, K], the rest zeros.
SAMPLE = operator(
    "sample(Tensor x) -> Tensor",
    run=_sample,
    shape=lambda x: tensor_type((ROWS, x.shape[-1]), torch.float32),
    rules=((lambda n: len(shape_at(n, 0) or ()) >= 2, "expected rows x [..., K]"),),
    fold=_joined,
)


# The scale of each column [K] of weights that multiply the rows: see fxq.numbers.folding.
FOLD_SCALE = operator(
    "fold_scale(Tensor rows, Tensor[] weights, *, bool inputs) -> Tensor",
    run=fold_scale,
    shape=lambda rows, weights, *, inputs: tensor_type(rows.shape[-1:], torch.float32),
    rules=((lambda n: bool(n.args[1]), "expected weights"),),
)


@dataclass(frozen=True)
class FoldScales(Pass):
    """Divide the channels of a norm's output by s, and multiply the columns of all linears, routers and
    experts that read it by s, which is the same function, wherever those that are rounded then lose less of
    their output: s is chosen by trial on calibration tokens, and judged on others.

    A norm folds if matmuls alone read it; one that adds 1 to its parameter goes on doing so.
    """

    name: ClassVar[str] = "fold-scales"
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)
    only_values: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every vector of parameters that multiplies activations; what else reads the product misses."""
        for node in list(program.graph.nodes):
            for factor in node.all_input_nodes if node.target is _MUL else ():
                scale = _parameter(factor)
                if scale is not None and str(scale.target) not in program.constants:
                    yield _site(node, factor, scale)

    def rewrite(self, site: Match) -> None:
        product, factor, scale = site.node, site["factor"], site["scale"]
        graph, matmuls, users = product.graph, _matmuls(product), list(scale.users)
        weights = {w: _is_rounded(m.w) for m in matmuls for w in _matrices(m.w)}
        inputs = any(input_quantize(m.x) is not None for m in matmuls)
        before = _again(factor, scale)
        operands = [before if x is factor else x for x in product.args]
        plain = edit.call(graph, f"{product.name}_unfolded", _MUL, *operands)
        rows = edit.call(graph, f"{product.name}_sample", SAMPLE, plain)
        rounded = [w for w, is_rounded in weights.items() if is_rounded]
        s = edit.call(
            graph, f"{product.name}_fold", FOLD_SCALE, rows, rounded[:: _step(rounded)], inputs=inputs
        )
        for w in weights:
            readers = [user for user in w.users if user is not s]
            scaled = edit.call(graph, f"{w.name}_scaled", _MUL, w, s)
            edit.replace(w, edit.call(graph, f"{w.name}_folded", dialect.REWRITE, w, scaled), readers)
        new = edit.call(graph, f"{scale.name}_divided", _ATEN.div.Tensor, before, s)
        if strip(factor, VIEWS).target is _ADD:
            new = edit.call(graph, f"{scale.name}_less", _ATEN.sub.Tensor, new, 1.0)
        edit.replace(scale, edit.call(graph, f"{scale.name}_folded", dialect.REWRITE, scale, new), users)


def _site(product: Node, factor: Node, scale: Node) -> Match | Miss:
    if any(len(step.users) > 1 for step in _steps(factor)):
        return Miss("norm", product, f"@{scale.target} has other readers", 1)
    if shape_of(factor) != shape_of(scale):
        return Miss("norm", product, f"@{scale.target} is shaped anew before it multiplies", 1)
    own = _readers(product)
    for reader in own:
        matmul = as_weight_matmul(reader)
        if matmul is None or reader.target not in _COLUMNS or shape_of(matmul.w)[-1] != shape_of(scale)[0]:
            return Miss("norm", product, f"%{reader.name} reads it, which is no linear", 2)
    matmuls = _matmuls(product)
    if not any(_is_rounded(m.w) for m in matmuls):
        return Miss("norm", product, "nothing that reads it is rounded in blocks", 2)
    for parameter in dict.fromkeys(m.parameter for m in matmuls):
        others = [m for m in weight_matmuls(product.graph) if m.parameter is parameter and m.node not in own]
        if others:
            return Miss("norm", product, f"%{others[0].node.name} multiplies by @{parameter.target} too", 3)
    return Match("norm", product, {"factor": factor, "scale": scale})


def _parameter(factor: Node) -> Node | None:
    """The vector of parameters that a factor is, maybe cast, maybe with 1 added."""
    node = strip(factor, VIEWS)
    if node.target is _ADD and node.args[1] == 1 and not node.kwargs:
        node = strip(node_at(node, 0), VIEWS)
    return node if node.op == "get_attr" and len(shape_of(node)) == 1 else None


def _steps(factor: Node) -> Iterator[Node]:
    """A factor, and what it is computed from, down to the parameter."""
    while True:
        yield factor
        if factor.op == "get_attr":
            return
        factor = node_at(factor, 0)


def _again(factor: Node, scale: Node) -> Node:
    """What a factor is, computed from the parameter a second time."""
    if factor is scale:
        return scale
    args = (_again(node_at(factor, 0), scale), *factor.args[1:])
    target = cast(Callable[..., object], factor.target)
    return edit.call(factor.graph, f"{factor.name}_unfolded", target, *args, **factor.kwargs)


def _readers(node: Node) -> list[Node]:
    """What computes with a value, or with rows of it; views and roundings looked through."""
    found: list[Node] = []
    for user in (user for user in node.users if not is_statistic(user)):
        is_passed = user.target in VIEWS or is_rounding(user) or user.target in PICKED
        found += _readers(user) if is_passed and user.args[0] is node else [user]
    return found


def _matmuls(product: Node) -> list[WeightMatmul]:
    found = (as_weight_matmul(reader) for reader in _readers(product))
    return [matmul for matmul in found if matmul is not None]


def _matrices(w: Node) -> list[Node]:
    """The weights, unrounded, that an operand is made of: one, or one an expert."""
    w = strip(w, VIEWS)
    parts = nodes_at(w, 0) if w.target is dialect.STACK else [w]
    return [node_at(part, 0) if is_rounding(part) else part for part in parts]


def _is_rounded(w: Node) -> bool:
    """Whether a weight operand is rounded to a format whose blocks share a scale."""
    w = strip(w, VIEWS)
    first = nodes_at(w, 0)[0] if w.target is dialect.STACK else w
    return is_rounding(first) and FORMATS[str(first.kwargs["format"])].block is not None


def _step(weights: Sequence[Node]) -> int:
    """Of many experts, every so manieth is looked at."""
    return max(1, len(weights) // _LOOKED_AT)
