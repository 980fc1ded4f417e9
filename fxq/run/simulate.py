"""Simulation: a program run as the deployed model computes, as the model was before, or both side by side.

%w_q : bf16[64,64] = fxq.quantize(%w, %w_amax, ...)   DEPLOYED: what the checkpoint decodes to; else %w
%w_new : bf16[64,64] = fxq.rewrite(%w, %scaled)        DEPLOYED, UNROUNDED: %scaled; ORIGINAL: %w
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxq.errors import VerifyError, and_more
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import statistics
from fxq.run.expressions import RunGraph, Variant
from fxq.run.streaming import Streaming
from fxq.run.work import Step, no_step

DEPLOYED = Variant()
UNROUNDED = Variant(roundings=False)
ORIGINAL = Variant(roundings=False, rewrites=False)


def simulation(
    program: Program,
    source: WeightSource,
    device: torch.device,
    variants: Sequence[Variant] = (DEPLOYED,),
    *,
    step: Step = no_step,
    reduce: Callable[[Any, int], Any] = lambda value, i: value,
) -> Streaming:
    """Runs a program's model; its output is that of the variant, or a list of those of several, which share
    every weight that is read. Statistics are those that calibration found; VerifyError if it did not keep
    them."""
    graph = program.calibrated or program.graph
    values = program.known_values()
    output = [node for node in graph.nodes if node.op == "output"]
    run = RunGraph(graph, output, variants, values=values)
    if unknown := [node.name for node in statistics(run.graph)]:
        raise VerifyError(
            f"{and_more([f'%{name}' for name in unknown])}: this program's calibration did not keep what it "
            "found; expected a program that is calibrated and not written yet. fxq.evaluate (fxq eval) runs "
            "what was written"
        )
    return Streaming(
        run.graph,
        source,
        device,
        constants=program.constants,
        values=values,
        origins=run.origins,
        step=step,
        reduce=reduce,
    )
