"""learn: codes and block scales of NVFP4 weights, and norm weights, follow gradients, one block of the model
after the other, until the block's output is nearest to that of the original model."""

import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.errors import SpecError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.inputs import Reader, readers
from fxq.graph.structure.views import shape_of, statistics
from fxq.numbers.formats import FORMATS
from fxq.numbers.learning import LearnedWeights, relative_error
from fxq.numbers.nvfp4 import Packed, dequantize
from fxq.pipeline.base import CalibrationPass, Session, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared
from fxq.run.blocks import Block, Blocks
from fxq.run.simulate import DEPLOYED, ORIGINAL
from fxq.run.training import NormWeight, Part, give_norms, lots_of, train, untrained_norms

TOKENS = 4096  # of a step, if there are as many
# What Adam moves in a step at first: codes by shares of the width of what rounds to them, block scales by
# shares of themselves.
CODES_RATE, SCALES_RATE = 3e-3, 1e-3
FOUND = "_found"  # the end of names under which amaxes and norms are kept


@dataclass(frozen=True)
class Learn(CalibrationPass):
    """Learn the codes and block scales of every NVFP4 weight, from those that its rounding decides, and the
    weights of norms: by gradients of what the block of the model that they are in loses of its output. A
    block sees what the quantized model before it makes of the text, and is to give what it gives in the
    original model. Of all that was tried, a block keeps what does best on text held back, its start included.

    Takes the statistics of activations on its way, each of the model whose earlier blocks are learned.

    steps: how many a block is given, of about 4,096 tokens each.
    codes: whether codes are learned.
    scales: whether block scales are.
    norms: whether the weights of norms are.
    """

    steps: int = 200
    codes: bool = True
    scales: bool = True
    norms: bool = True

    name: ClassVar[str] = "learn"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_filled,)

    def __post_init__(self) -> None:
        if self.steps < 1 or not (self.codes or self.scales or self.norms):
            raise SpecError(
                "learn: expected steps of 1 or more and codes, scales or norms to be learned, found steps: "
                f"{self.steps}, codes: {self.codes}, scales: {self.scales}, norms: {self.norms}"
            )

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by quantized weights, and every norm; a weight that several multiply is learned in the
        first block."""
        seen: set[Node] = set()
        for reader in readers(program.graph):
            first = reader.roundings[0]
            format = first.kwargs["format"]
            if format != "nvfp4":
                yield Miss(self.name, reader.node, f"{format} has no block scales to learn")
            elif first in seen or first.target is dialect.ROUNDED:
                yield Miss(self.name, reader.node, "the codes of its weight are decided", depth=1)
            else:
                seen.add(first)
                yield Match(self.name, reader.node, {"x": reader.x, "w": first})
        for norm in self._norms(program):
            yield Match("norm", norm, {"scale": norm})

    def run(self, program: Program) -> int:
        is_done = any(site.depth for site in self.sites(program) if isinstance(site, Miss))
        if not is_done and not self._readers(program):
            raise nothing_matched(self, program, "NVFP4 weights")
        return 0

    def finish(self, program: Program) -> int:
        """Let every weight read its codes, block scales and amax from `program.values`, and every norm."""
        found, norms = self._readers(program), self._norms(program)
        lost = _following(program.graph, _needless(program.graph, found))
        amaxes: dict[Node, Node] = {}
        for reader in found:
            _decided(reader, lost, amaxes)
        give_norms(program, norms, FOUND)
        return len(found) + len(norms)

    def calibrate(self, program: Program, session: Session) -> int:
        found, norms = self._readers(program), self._norms(program)
        gone = _needless(program.graph, found)
        lost, names = _following(program.graph, gone), {node.name for node in gone}
        batches, lots = lots_of(session.batches or (), TOKENS, self.name)
        blocks = Blocks(program, session.source, session.device, keep=lambda name: name not in names)
        with closing(blocks.run(batches)) as each, session.progress(self.name, len(found)) as step:
            for block in each:
                own = [reader for reader in found if reader.roundings[0] in block.roundings]
                weights = [_Weights(reader, block, self, lost) for reader in own]
                vectors = [NormWeight(norm, block) for norm in norms if block.reads(norm)]
                alone = [vector for vector in vectors if block.reads_alone(vector.node)]
                if weights:
                    parts: list[Part] = [*weights, *alone]
                    train(parts, lots, functools.partial(_lost, block), self.steps)
                    block.decide({part.node: part.best for part in parts})
                program.values |= {f"{own.node.name}{FOUND}": own.best.cpu() for own in vectors}
                for weight in weights:
                    program.values |= weight.found()
                    step(1)
        for name in names & program.values.keys():
            del program.values[name]  # counts, which are kept as single numbers are
        return len(found)

    def _readers(self, program: Program) -> list[Reader]:
        fires = {site.node for site in self.sites(program) if isinstance(site, Match)}
        return [reader for reader in readers(program.graph) if reader.node in fires]

    def _norms(self, program: Program) -> dict[Node, list[Node]]:
        """Weights of norms that are not learned yet -> what reads them."""
        return untrained_norms(program, FOUND) if self.norms else {}


class _Weights:
    """The weights of one matmul [out, in], or of its experts [n, out, in]. lost: what cannot be computed
    later."""

    def __init__(self, reader: Reader, block: Block, options: Learn, lost: Container[Node]) -> None:
        parts = [block.packed[key] for key in block.packed if key[0] in reader.roundings]
        w = torch.cat([part[0] for part in parts])
        amaxes = zip(reader.roundings, torch.cat([part[1] for part in parts]), strict=True)
        known = ((node_at(rounding, 1), value) for rounding, value in amaxes)
        self.amaxes = {_name_of(amax): value.cpu() for amax, value in known if amax in lost}
        start = (torch.cat([getattr(part[2], n) for part in parts]) for n in ("weight", "scale", "scale_2"))
        self.node, self.reader, self.dtype, self.packed = reader.w, reader, w.dtype, Packed(*start)
        self.learned = LearnedWeights(w, self.packed, codes=options.codes, scales=options.scales)

    def groups(self) -> list[dict[str, object]]:
        moved = (self.learned.v, CODES_RATE), (self.learned.r, SCALES_RATE)
        return [{"params": [t], "lr": rate} for t, rate in moved if t is not None]

    def values(self) -> Tensor:
        return self._shaped(self.learned.values().to(self.dtype))

    def limit(self) -> None:
        self.learned.limit()

    def keep(self) -> None:
        self.packed = Packed(*self.learned.packed(), self.packed.scale_2)

    @property
    def best(self) -> Tensor:
        """What they are rounded to, of the dtype and shape of the node."""
        return self._shaped(dequantize(self.packed).to(self.dtype))

    def found(self) -> dict[str, Tensor]:
        values = (self._shaped(part).cpu() for part in (self.packed.weight, self.packed.scale))
        return dict(zip(_names(self.reader), values, strict=True)) | self.amaxes

    def _shaped(self, values: Tensor) -> Tensor:
        return values if self.node.target is dialect.STACK else values[0]


def _lost(block: Block, batch: int, now: Mapping[Node, Tensor]) -> tuple[Tensor, int]:
    """(what a block loses of its outputs for a batch, the batch's rows)."""
    wanted, found = block.outputs(batch, ORIGINAL), block.outputs(batch, DEPLOYED, now)
    names = [n for n, t in found.items() if n in wanted and t.is_floating_point() and t.dim() > 1]
    lost = torch.stack([relative_error(found[name], wanted[name]) for name in names]).sum()
    return lost, max(found[name].shape[:-1].numel() for name in names)


def _names(reader: Reader) -> tuple[str, str]:
    return f"{reader.w.name}_codes", f"{reader.w.name}_scales"


def _name_of(node: Node) -> str:
    """The name under which an amax is kept."""
    return f"{node.name}{FOUND}"


def _decided(reader: Reader, lost: set[Node], amaxes: dict[Node, Node]) -> None:
    """Let the roundings of one matmul be what `program.values` says, of the weights as far as no statistic
    that is gone rewrote them."""
    graph, is_stack = reader.node.graph, reader.w.target is dialect.STACK
    shape = (*((len(reader.roundings),) if is_stack else ()), *shape_of(reader.roundings[0]))
    types = [
        dialect.tensor_type(p.shape(shape), p.dtype) for p in FORMATS["nvfp4"].parts if p.per is not None
    ]
    values = [edit.value(graph, name, t) for name, t in zip(_names(reader), types, strict=True)]
    for e, rounding in enumerate(reader.roundings):
        w, amax = node_at(rounding, 0), node_at(rounding, 1)
        while w in lost:
            w = node_at(w, 0)
        if amax not in amaxes:
            is_lost = amax in lost
            amaxes[amax] = edit.value(graph, _name_of(amax), amax.meta["val"]) if is_lost else amax
        own = [edit.call(graph, f"{v.name}_e{e}", dialect.SLICE, v, e) if is_stack else v for v in values]
        rounding.target, rounding.args = dialect.ROUNDED, (w, amaxes[amax], *own)
        rounding.kwargs = {"format": rounding.kwargs["format"]}


def _needless(graph: Graph, found: Sequence[Reader]) -> set[Node]:
    """The statistics of activations that nothing needs but roundings that are decided otherwise now."""
    decided = {rounding for reader in found for rounding in reader.roundings}
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(() if node in decided else node.all_input_nodes)
    return {node for node in statistics(graph) if node not in needed}


def _following(graph: Graph, statistics: set[Node]) -> set[Node]:
    """Nodes that statistics decide."""
    found = set(statistics)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
