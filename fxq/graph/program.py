"""Program: a graph, where its parameters lie in the checkpoint, and what calibration found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import dialect
from fxq.graph.choices import Choice
from fxq.graph.hub import Hub
from fxq.graph.structure.views import statistics

Accepts = Callable[[int, int], str | None]


@dataclass(frozen=True, slots=True)
class Missed:
    """A miss as the pipeline keeps it: of which pass, at which node, and if that multiplies by a weight, by
    which parameter; `reason` and `decided` are the miss's own."""

    step: str
    node: str
    parameter: str | None
    reason: str
    decided: bool


@dataclass
class Program:
    """A graph under compilation.

    values: statistic of activations, or `fxq.value` of a pass -> what calibration found, a tensor of any
    shape on the CPU. An amax of -1 is that of an input which no token reached.
    tokens: fused weight name -> int64 [experts], the tokens each expert saw while calibrating.
    constants: small tensors the trace lifted out of the model, by the name of the node that reads them.
    accepts: (batch, length) -> None if the graph holds for inputs of that size, else why not.
    notes: what the user should know about decisions that passes took.
    left: weights that a pass was asked for and could not quantize, and was allowed to leave -> why.
    calibrated: the graph that was lowered, which simulates the deployed model; None until then.
    format: what the lowered program is written as. packs: rounding of a weight in `calibrated` -> what packs
    it in `graph`. untied: modules that shared a tensor in the source and are written one of their own.
    pending: of which model statistics are to be found while the program is written, "original" or
    "quantized"; None if they are found already. is_deferred: whether this run finds them, or an interrupted
    one found them, while it is written.
    choices: groups of weights for each of which a format is chosen.
    misses: where passes did not fire, in the order in which they looked.
    """

    graph: Graph
    hub: Hub = field(default_factory=Hub)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    calibrated: Graph | None = None
    format: str = "modelopt"
    packs: dict[Node, Node] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    pending: str | None = None
    is_deferred: bool = False
    accepts: Accepts = lambda batch, length: None
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    misses: list[Missed] = field(default_factory=list)

    def why_left(self) -> dict[str, str]:
        """Parameter -> why the passes that could have quantized it did not; the last to look has its say."""
        return {m.parameter: m.reason for m in self.misses if m.decided and m.parameter is not None}

    def known_values(self) -> dict[str, Tensor]:
        """`values`, and -1 for an amax that calibration did not look for: no batch brought a value."""
        unseen = torch.tensor(-1.0)
        amaxes = (n.name for n in statistics(self.calibrated or self.graph) if n.target is dialect.AMAX)
        return {**dict.fromkeys(amaxes, unseen), **self.values}

    def found(self) -> dict[str, dict[str, Tensor]]:
        """All that calibration found so far."""
        return {"values": dict(self.values), "tokens": dict(self.tokens)}

    def restore(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `found` gave, maybe in another process."""
        self.values.update(found["values"])
        self.tokens.update(found["tokens"])
