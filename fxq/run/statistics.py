"""Statistics: runs a program over batches and keeps what its statistics show.

The order of work follows from the graph: what reads a statistic runs when all batches have passed it.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.errors import SourceError, SpecError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at
from fxq.graph.hub import WeightSource
from fxq.graph.program import Program
from fxq.graph.structure.views import is_quantized, parameter_name, shape_of, statistics
from fxq.run.expressions import RunGraph, Variant
from fxq.run.streaming import Resident, Sink, Streaming
from fxq.run.weights import check_parameters
from fxq.run.work import Step, no_step, total

# What a linear's statistics are taken of: activations of the model before it, as it was, or already rounded.
Prefix = Literal["original", "quantized"]


class Calibration:
    """Fills `program.values` and `program.tokens`.

    prefix: whether statistics are those of the unquantized model (rewrites done), or each those of the model
    whose earlier weights and activations are rounded already. sink: takes what weights are packed as on the
    way, with a quantized prefix. hold: whether `segments` gives all parameters of a segment, or may lack
    those that were used up. keep: whether a statistic of this name, if it is no single number, is of use
    after the run. Raises SourceError for a statistic that is NaN or infinite.
    """

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        device: torch.device,
        *,
        prefix: Prefix = "original",
        sink: Sink | None = None,
        hold: bool = False,
        keep: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.program = program
        graph = program.calibrated or program.graph
        wanted = [node for node in statistics(graph) if node.name not in program.values]
        ids = [node_at(linear, 2) for linear in _expert_linears(graph).values()]
        variant = Variant(roundings=prefix == "quantized")
        compared = next((node for node in graph.nodes if node.target is dialect.ORIGINAL), None)
        if compared is not None and prefix == "original":
            raise SpecError(
                f"%{compared.name} compares the quantized model with the original one: expected "
                "calibrate-max: {prefix: quantized}, found prefix: original, in which they are the same"
            )
        run = RunGraph(graph, [*wanted, *ids], [variant], values=program.values)
        self.taken = Taken(program, run, run.copies[0], keep)
        self.streaming = Streaming(
            run.graph,
            source,
            device,
            constants=program.constants,
            values=program.values,
            origins=run.origins,
            sink=sink,
            hold=hold,
        )

    def work(self, batches: Sequence[Tensor]) -> int:
        """What a run costs, as `step` counts it."""
        return total(self.streaming.graph, batches)

    def run(self, batches: Sequence[Tensor], step: Step = no_step) -> int:
        """Calibrate on batches int64 [B, S]; returns how many statistics were found."""
        self.streaming.step = step
        for _ in self.segments(batches):
            pass
        return self.taken.count

    def segments(self, batches: Sequence[Tensor]) -> Generator[Resident]:
        """`run`, a segment at a time, whose statistics are known by then: its parameters, by name."""
        run = self.streaming
        for event in run.walk(batches):
            if not isinstance(event, int):
                self.taken.take(run.complete(), event)
                yield event
            del event  # parameters that are used up


class Taken:
    """The statistics that a run of a program takes, and the tokens that it counts for each expert.

    copy: node of the program -> its counterpart in the run, whose graph it adds the counting to. keep:
    whether a statistic of this name, if it is no single number, is of use after the run. count: how many
    were found.
    """

    def __init__(
        self,
        program: Program,
        run: RunGraph,
        copy: Mapping[Node, Node],
        keep: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.program, self.keep, self.count = program, keep, 0
        graph = program.calibrated or program.graph
        known = program.values
        self.names = {copy[n]: n for n in statistics(graph) if n in copy and n.name not in known}
        self.tokens: dict[Node, str] = {}
        for name, linear in _expert_linears(graph).items():
            counted = copy[node_at(linear, 2)]
            with run.graph.inserting_after(counted):
                count = shape_of(node_at(linear, 1))[0]
                made = edit.call(
                    run.graph, f"{linear.name}_tokens", dialect.EXPERT_TOKENS, counted, experts=count
                )
            self.tokens[made] = name

    @torch.no_grad()
    def take(self, complete: Mapping[Node, Tensor], resident: Mapping[str, Tensor]) -> None:
        """Give the program the statistics that are complete; SourceError for a broken one, or the parameter
        at hand that broke it."""
        for made in [n for n in complete if n in self.names]:
            node, value = self.names.pop(made), complete[made]
            if not all(bool(torch.isfinite(end)) for end in torch.aminmax(value)):
                check_parameters(self.program, resident)
                kind = "NaN" if bool(value.isnan().any()) else "Inf"
                raise SourceError(
                    f"%{node.name}: calibration produced {kind} in an activation; is the model or the text "
                    "broken?"
                )
            self.count += 1
            if not value.dim() or self.keep(node.name):
                self.program.values[node.name] = value.cpu()
        for made in [n for n in complete if n in self.tokens]:
            self.program.tokens[self.tokens.pop(made)] = complete[made].cpu()


def _expert_linears(graph: Graph) -> dict[str, Node]:
    """Fused weight -> the call that multiplies tokens by its experts, for those that are quantized."""
    return {
        parameter_name(node_at(n, 1)): n
        for n in graph.nodes
        if n.target is dialect.EXPERT_LINEAR and is_quantized(node_at(n, 1))
    }
