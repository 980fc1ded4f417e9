"""Perplexity of a calibrated program: as the model was, and as it will be served."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.pipeline.base import Progress
from fxq.run import likelihood
from fxq.run.simulate import Simulate, Unquantized
from fxq.run.streaming import Streaming


def perplexities(
    program: Program,
    source: WeightSource,
    device: torch.device,
    batches: Sequence[Tensor],
    progress: Progress,
) -> tuple[float, float]:
    """(unquantized, simulated deployed) perplexity per token of batches int64 [B, S]."""

    def run(kind: type[Streaming], label: str) -> float:
        graph = program.calibrated or program.graph
        with progress(label, len(graph.nodes)) as step:
            one = kind(
                program,
                source,
                device,
                step=step,
                reduce=lambda logits, i: likelihood.losses(logits, batches[i]),
            )
            return likelihood.perplexity(torch.cat(one.run_batches(batches)))

    return run(Unquantized, "perplexity before"), run(Simulate, "perplexity after")
