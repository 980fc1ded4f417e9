"""What the passes work on: a graph, where its parameters lie in the hub's checkpoint, and what
calibration found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Graph


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor of the checkpoint, known from its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """Where one parameter of the model lies in the hub's checkpoint.

    `keys[p][e]` is the tensor that holds part `p` (gate, then up) of expert `e`; parts have `rows[p]` rows
    each and are concatenated along them, experts stacked if `stacked`. `fused` says that the checkpoint
    holds the parameter in one piece: `keys == ((key,),)`.
    """

    keys: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] = ()
    fused: bool = True
    stacked: bool = False


@dataclass(frozen=True)
class Hub:
    """The checkpoint's view of the model, names and shapes only.

    stored: parameter or buffer name in memory -> where it lies. names: the same, under the names the hub
    gives this family, which is what gets written (they differ from `stored` only when the source holds
    experts fused). tensors: every tensor of the source in its order. extra: those the model class ignores
    (multi-token prediction layers, vision towers), carried through untouched. modules: names listed as
    unquantized even without a tensor of their own (a tied `lm_head`).
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    names: Mapping[str, Stored] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


Accepts = Callable[[int, int], str | None]


@dataclass
class Program:
    """A graph under compilation.

    values: amax node name -> calibrated float32 [], filled by the calibration passes.
    tokens: fused weight name -> int64 [experts], the tokens each expert saw while calibrating.
    constants: small tensors the trace lifted out of the model, by the name of the node that reads them.
    bootstrapped: names of the amax nodes that calibrate-bootstrap filled.
    accepts: (batch, length) -> None if the graph holds for inputs of that size, else why not.
    notes: what the user should know about decisions that passes took.
    calibrated: the graph that was lowered, which simulates the deployed model; None until then.
    """

    graph: Graph
    hub: Hub = field(default_factory=Hub)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    bootstrapped: set[str] = field(default_factory=set)
    calibrated: Graph | None = None
    accepts: Accepts = lambda batch, length: None
    notes: list[str] = field(default_factory=list)


class WeightSource(Protocol):
    """Where tensors come from: a checkpoint directory read lazily, or a live model. Nothing is cached or
    written."""

    hub: Hub

    def read(self, name: str) -> Tensor:
        """A parameter or persistent buffer by its name in memory, on the CPU; SourceError if it cannot be
        read."""
        ...

    def read_expert(self, name: str, expert: int) -> Tensor:
        """`read(name)[expert]` without building the rest of a fused weight."""
        ...

    def read_hub(self, key: str) -> Tensor:
        """A tensor of the checkpoint under the hub's name, exactly as stored."""
        ...
