"""Passes that rewrite weights, as third parties write them: `--passes tests/audit/rewriting.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at
from fxq.graph.pattern import Match
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import as_weight_matmul
from fxq.graph.structure.views import VIEWS, shape_of
from fxq.pipeline.base import Pass

_MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class HalveNorms(Pass):
    """Every norm scale becomes half of it, so that the model computes something else."""

    name: ClassVar[str] = "halve-norms"

    def sites(self, program: Program) -> Iterator[Match]:
        """Every vector of parameters that multiplies activations."""
        for node in program.graph.nodes:
            for scale in node.all_input_nodes if node.target is _MUL else ():
                if scale.op == "get_attr" and len(shape_of(scale)) == 1:
                    yield Match("norm", node, {"scale": scale})

    def rewrite(self, site: Match) -> None:
        """Of one norm."""
        _scale(site["scale"], 0.5, site.node)


@dataclass(frozen=True)
class MoveHalves(HalveNorms):
    """The same, and what reads a norm has its weights doubled: the model computes what it did, to the bit."""

    name: ClassVar[str] = "move-halves"

    def sites(self, program: Program) -> Iterator[Match]:
        """Norms that weights alone read."""
        for site in super().sites(program):
            if all(as_weight_matmul(reader) is not None for reader in _readers(site.node)):
                yield site

    def rewrite(self, site: Match) -> None:
        """Of one norm and its readers."""
        for reader in list(_readers(site.node)):
            matmul = as_weight_matmul(reader)
            assert matmul is not None
            _scale(matmul.w, 2.0, reader)
        super().rewrite(site)


@dataclass(frozen=True)
class DoubleExpert(Pass):
    """The weights of one expert a layer doubled, once experts are slices of their own.

    expert: which.
    """

    expert: int = 3
    name: ClassVar[str] = "double-expert"

    def sites(self, program: Program) -> Iterator[Match]:
        """That slice of every stack."""
        for node in program.graph.nodes:
            if node.target is dialect.SLICE and int_at(node, 1) == self.expert:
                yield Match("expert", node, {"w": node})

    def rewrite(self, site: Match) -> None:
        """Of one stack."""
        _scale(site["w"], 2.0, *site["w"].users)


def _scale(w: Node, factor: float, *readers: Node) -> None:
    """Let readers of a weight read its multiple, which the checkpoint is to hold."""
    scaled = edit.call(w.graph, f"{w.name}_scaled", _MUL, w, factor)
    edit.replace(w, edit.call(w.graph, f"{w.name}_new", dialect.REWRITE, w, scaled), readers)


def _readers(node: Node) -> Iterator[Node]:
    """What reads a value, views looked through."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _readers(user)
        else:
            yield user
