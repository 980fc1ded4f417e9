"""What the passes work on: a graph, where its parameters lie in the hub's checkpoint, and what calibration found."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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

    `keys[p][e]` is the tensor that holds part `p` (gate, then up) of expert `e`; parts are concatenated along rows,
    experts stacked. `fused` says that the checkpoint holds the parameter in one piece, `keys == ((key,),)`.
    """

    keys: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] = ()
    fused: bool = True


@dataclass(frozen=True)
class Hub:
    """The checkpoint's view of the model, names and shapes only.

    stored: parameter or buffer name in memory -> where it lies. names: the same, under the names the hub gives this
    family, which is what gets written (they differ from `stored` only when the source holds experts fused).
    tensors: every tensor of the source in its order. extra: those the model class ignores (multi-token prediction
    layers, vision towers), carried through untouched. modules: names listed as unquantized even without a tensor
    of their own (a tied `lm_head`).
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    names: Mapping[str, Stored] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass
class Program:
    """A graph under compilation.

    values: amax node name -> calibrated float32 [], filled by the calibration passes.
    tokens: fused weight name -> int64 [experts], the tokens each expert saw while calibrating.
    constants: small tensors the trace lifted out of the model, by the name of the node that reads them.
    bootstrapped: names of the amax nodes that calibrate-bootstrap filled.
    """

    graph: Graph
    hub: Hub = field(default_factory=Hub)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    bootstrapped: set[str] = field(default_factory=set)
