"""fuse-experts: a 3-D weight reaching a matmul, in whatever form it was traced, becomes
`fxq.expert_linear`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.errors import VerifyError
from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at, node_at
from fxq.graph.pattern import Bind, Call, Const, Listed, Match, Miss, PastViews, Rule, Weight
from fxq.graph.program import Program
from fxq.graph.structure.experts import multiplies_experts
from fxq.graph.structure.matmuls import as_weight_matmul, weight_matmuls
from fxq.graph.structure.views import shape_of, weight_of
from fxq.pipeline.base import Pass
from fxq.pipeline.facts import Fact, experts_fused

aten = torch.ops.aten
GROUPED = (aten._grouped_mm.default,)
PICKED = Call(aten.index.Tensor, Weight("w", rank=3), Listed(Bind("ids", rank=1)))
OFFSETS = Call(aten.cumsum.default, PastViews(Call(aten.histc.default, PastViews(Bind("ids", rank=1)))))

# Storage [E, out, in]: the picked weight multiplies a column.
COLUMN = Rule(
    "index > bmm, [E, out, in]",
    Call(aten.bmm.default, PICKED, Call(aten.unsqueeze.default, Bind("x", rank=2), Const((-1, 2)))),
)
# Storage [E, in, out]: a row multiplies the picked weight.
ROW = Rule(
    "index > bmm, [E, in, out]",
    Call(aten.bmm.default, Call(aten.unsqueeze.default, Bind("x", rank=2), Const((1, -2))), PICKED),
)
# Tokens already sorted by expert; the operand is [E, in, out], usually a transposed view of [E, out, in].
SORTED = Rule("_grouped_mm", Call(GROUPED, Bind("x", rank=2), Weight("w", rank=3), OFFSETS))
# Every expert sees every token: x [E, T, in], w [E, in, out].
DENSE = Rule("bmm over all experts", Call(aten.bmm.default, Bind("x", rank=3), Weight("w", rank=3)))
# One linear an expert, unrolled in python: linear(x_e, w[e]).
UNROLLED = Rule(
    "select > linear",
    Call(aten.linear.default, Bind("x"), Call(aten.select.int, Weight("w", rank=3), Const((0,)))),
)
# The same over storage [E, in, out].
UNROLLED_ROW = Rule(
    "select > t > linear",
    Call(
        aten.linear.default,
        Bind("x"),
        Call(aten.t.default, Call(aten.select.int, Weight("w", rank=3), Const((0,)))),
    ),
)

RULES = COLUMN + ROW + SORTED + DENSE + UNROLLED + UNROLLED_ROW


@dataclass(frozen=True)
class FuseExperts(Pass):
    """Make every expert's weight visible as `w[e]` of an `expert_linear(x, w, expert_ids)` with w [E,
    out, in].

    partial: leave a weight that is used in a form no pattern knows, instead of failing.
    """

    partial: bool = False

    name: ClassVar[str] = "fuse-experts"
    ensures: ClassVar[tuple[Fact, ...]] = (experts_fused,)
    flags: ClassVar[tuple[str, ...]] = ("partial",)
    same_function: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by a parameter that is, or was picked from, a stack of matrices."""
        for matmul in list(weight_matmuls(program.graph)):
            is_slice = weight_of(matmul.w).target is dialect.SLICE
            if (
                multiplies_experts(matmul)
                and matmul.node.target is not dialect.EXPERT_LINEAR
                and not is_slice
            ):
                yield RULES.match(matmul.node)

    def run(self, program: Program) -> int:
        count = 0
        for site in list(self.sites(program)):
            # Matched again: the rewrite before may have replaced what this one reads.
            fresh = RULES.match(site.node)
            if isinstance(fresh, Match):
                REWRITES[fresh.rule](fresh)
                count += 1
            elif self.partial:
                program.left[_parameter(fresh.node)] = f"experts used in a form no pattern knows: {fresh}"
            else:
                where = f"@{_parameter(fresh.node)}\n  {fresh}"
                raise VerifyError(
                    f"fuse-experts: a 3-D weight reaches a matmul in a form no pattern knows: {where}"
                )
        return count


def _column(site: Match) -> None:
    _expert_linear(site, site["w"], unsqueezed=-1)


def _row(site: Match) -> None:
    _expert_linear(site, edit.transposed(site["w"]), unsqueezed=1)


def _sorted(site: Match) -> None:
    node = site.node
    y = edit.call(
        node.graph,
        f"{node.name}_experts",
        dialect.EXPERT_LINEAR,
        site["x"],
        edit.transposed(site["w"]),
        site["ids"],
    )
    edit.replace(node, y)


def _dense(site: Match) -> None:
    node, x, w = site.node, site["x"], edit.transposed(site["w"])
    graph, experts = node.graph, shape_of(w)[0]
    tokens = edit.call(graph, f"{node.name}_tokens", aten.sym_size.int, x, 1)
    each = edit.call(graph, f"{node.name}_each", aten.arange.default, experts, device=torch.device("cpu"))
    ids = edit.call(graph, f"{node.name}_ids", aten.repeat_interleave.self_int, each, tokens)
    flat = edit.call(graph, f"{node.name}_x", aten.reshape.default, x, [-1, shape_of(x)[2]])
    y = edit.call(graph, f"{node.name}_experts", dialect.EXPERT_LINEAR, flat, w, ids)
    edit.replace(
        node, edit.call(graph, f"{node.name}_y", aten.view.default, y, [experts, tokens, shape_of(w)[1]])
    )


def _unrolled(site: Match) -> None:
    _slice(site, node_at(site.node, 1), site["w"])


def _unrolled_row(site: Match) -> None:
    _slice(site, node_at(node_at(site.node, 1), 0), edit.transposed(site["w"]))


def _slice(site: Match, pick: Node, w: Node) -> None:
    """Replace the weight of a linear by the expert that `pick` selects from w [E, out, in]."""
    index = int_at(pick, 2) % shape_of(w)[0]
    piece = edit.call(pick.graph, f"{w.name}_e{index}", dialect.SLICE, w, index)
    edit.replace(node_at(site.node, 1), piece, [site.node])


REWRITES = {
    COLUMN.name: _column,
    ROW.name: _row,
    SORTED.name: _sorted,
    DENSE.name: _dense,
    UNROLLED.name: _unrolled,
    UNROLLED_ROW.name: _unrolled_row,
}


def _expert_linear(site: Match, w: Node, *, unsqueezed: int) -> None:
    """Replace bmm and the squeeze after it."""
    node = site.node
    y = edit.call(node.graph, f"{node.name}_experts", dialect.EXPERT_LINEAR, site["x"], w, site["ids"])
    dim = unsqueezed % 3
    squeezes = [u for u in node.users if u.target is aten.squeeze.dim and u.args[1] in (dim, dim - 3)]
    for squeeze in squeezes:
        edit.replace(squeeze, y)
    if len(squeezes) < len(node.users):
        edit.replace(node, edit.call(node.graph, f"{node.name}_y", aten.unsqueeze.default, y, dim))


def _parameter(node: Node) -> str:
    matmul = as_weight_matmul(node)
    assert matmul is not None
    return str(matmul.parameter.target)
