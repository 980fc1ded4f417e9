"""tune-norms: the weights of norms follow gradients of how far the quantized model's predictions lie from
those of the original one."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SpecError
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.norms import norm_weights
from fxq.pipeline.base import CalibrationPass, Session, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_shared
from fxq.run.blocks import Block, Blocks
from fxq.run.likelihood import divergence
from fxq.run.simulate import DEPLOYED, ORIGINAL
from fxq.run.training import NormWeight, free_memory, give_norms, lots_of, train, untrained_norms

TOKENS = 2048  # of a step, if there are as many
TUNED = "_tuned"  # the end of names under which norms are kept


@dataclass(frozen=True)
class TuneNorms(CalibrationPass):
    """Tune the weights of all norms, of the model quantized as it is by now, to the least KL divergence of
    its predictions from the original model's: the most that what is not rounded can make up for. What does
    best on text held back is kept, the start included.

    The whole model has to fit, with what one sample leaves behind for gradients; if it does not, that is an
    error. Takes statistics of activations that are not known yet.

    steps: how many, of about 2,048 tokens each.
    """

    steps: int = 100

    name: ClassVar[str] = "tune-norms"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared,)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SpecError(f"tune-norms: expected steps of 1 or more, found {self.steps}")

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every norm."""
        fires = untrained_norms(program, TUNED)
        for node in norm_weights(program.graph, program.constants):
            if node in fires:
                yield Match("norm", node, {"scale": node})
            else:
                yield Miss("norm", node, "it is tuned already", depth=1)

    def run(self, program: Program) -> int:
        if not any(True for _ in self.sites(program)):
            raise nothing_matched(self, program, "weights that scale activations")
        return 0

    def finish(self, program: Program) -> int:
        """Let every norm read its weight from `program.values`."""
        norms = untrained_norms(program, TUNED)
        give_norms(program, norms, TUNED)
        return len(norms)

    def calibrate(self, program: Program, session: Session) -> int:
        norms = untrained_norms(program, TUNED)
        batches = [row for batch in session.batches or () for row in batch.split(1)]
        batches, lots = lots_of(batches, TOKENS, self.name)
        blocks = Blocks(program, session.source, session.device, whole=True)
        self._check_room(blocks.bytes_of(max(batch.numel() for batch in batches)), session.device)
        with closing(blocks.run(batches)) as each:
            for block in each:
                found = [NormWeight(norm, block) for norm in norms]

                def lost(batch: int, now: Mapping[Node, Tensor], block: Block = block) -> tuple[Tensor, int]:
                    (wanted,), (made,) = (
                        block.outputs(batch, variant, replaced).values()
                        for variant, replaced in ((ORIGINAL, {}), (DEPLOYED, now))
                    )
                    return divergence(wanted, made), batches[batch].numel()

                train(found, lots, lost, self.steps)
                program.values |= {f"{own.node.name}{TUNED}": own.best.cpu() for own in found}
        return len(norms)

    def _check_room(self, needed: int, device: torch.device) -> None:
        free = free_memory(device)
        if free is None:
            return
        if needed > free:
            raise SpecError(
                f"tune-norms: the whole model and one sample's gradients take about {needed / 2**30:.1f} "
                f"GiB, found {free / 2**30:.1f} GiB free on {device}; expected a smaller model, shorter "
                "samples (--seq-len), or a spec without tune-norms"
            )
