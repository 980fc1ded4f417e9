"""Perplexity of a calibrated program: as the model was, and as it will be served."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.pipeline.base import Progress
from fxq.run import likelihood
from fxq.run.simulate import DEPLOYED, ORIGINAL, simulation
from fxq.run.work import total


def perplexities(
    program: Program,
    source: WeightSource,
    device: torch.device,
    batches: Sequence[Tensor],
    progress: Progress,
) -> tuple[float, float]:
    """(original, simulated deployed) perplexity per token of batches int64 [B, S], in one reading of the
    weights."""

    def losses(logits: list[Tensor], i: int) -> list[Tensor]:
        return [likelihood.losses(each, batches[i]) for each in logits]

    run = simulation(program, source, device, (ORIGINAL, DEPLOYED), reduce=losses)
    with progress("perplexity", total(run.graph, batches)) as step:
        run.step = step
        before, after = zip(*run.run_batches(batches), strict=True)
    return likelihood.perplexity(torch.cat(before)), likelihood.perplexity(torch.cat(after))
