"""Program: a graph, where its parameters lie in the checkpoint, and what calibration found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fxq.graph.hub import Hub

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

    values: amax node name -> calibrated float32 [], filled by the calibration passes.
    tokens: fused weight name -> int64 [experts], the tokens each expert saw while calibrating.
    constants: small tensors the trace lifted out of the model, by the name of the node that reads them.
    bootstrapped: names of the amax nodes that data did not reach: filled from the weights, or left to the
    writer.
    accepts: (batch, length) -> None if the graph holds for inputs of that size, else why not.
    notes: what the user should know about decisions that passes took.
    left: weights that a pass was asked for and could not quantize, and was allowed to leave -> why.
    calibrated: the graph that was lowered, which simulates the deployed model; None until then.
    format: what the lowered program is written as.
    misses: where passes did not fire, in the order in which they looked.
    """

    graph: Graph
    hub: Hub = field(default_factory=Hub)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    bootstrapped: set[str] = field(default_factory=set)
    calibrated: Graph | None = None
    format: str = "modelopt"
    accepts: Accepts = lambda batch, length: None
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    misses: list[Missed] = field(default_factory=list)

    def why_left(self) -> dict[str, str]:
        """Parameter -> why the passes that could have quantized it did not; the last to look has its say."""
        return {m.parameter: m.reason for m in self.misses if m.decided and m.parameter is not None}

    def is_later(self, name: str) -> bool:
        """Whether the amax of that name is its own weight's, and found when that is read to be packed."""
        return name in self.bootstrapped and name not in self.values

    def found(self) -> dict[str, Any]:
        """All that calibration found so far, in JSON; float32 survives exactly."""
        return {
            "values": {name: float(value) for name, value in self.values.items()},
            "tokens": {name: counts.tolist() for name, counts in self.tokens.items()},
            "bootstrapped": sorted(self.bootstrapped),
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Take over what `found` gave, maybe in another process."""
        for name, value in found["values"].items():
            self.values[name] = torch.tensor(value, dtype=torch.float32)
        for name, counts in found["tokens"].items():
            self.tokens[name] = torch.tensor(counts, dtype=torch.int64)
        self.bootstrapped.update(found["bootstrapped"])
