"""What the passes work on: a graph, where its parameters lie in the hub's checkpoint, and what
calibration found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.fx import Graph

from fxq.rest import Kept


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor of the checkpoint, known from its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> "TensorInfo":
        """The same object for equal arguments: ten thousands of tensors are alike."""
        return TensorInfo(shape, dtype)


class Convert(Protocol):
    """transformers' own conversion of whole tensors into a parameter."""

    @property
    def operations(self) -> str:
        """What it does, for messages."""
        ...

    def __call__(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, from the tensors of the checkpoint that `read` gives."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows of one tensor of the checkpoint, or of one tensor an expert.

    keys: the tensor; if the parameter is stacked, `keys[e]` holds expert e alone. rows: which rows of it,
    counted along the second to last dimension (the only one of a vector); a range may have a step.
    """

    keys: tuple[str, ...]
    rows: range


@dataclass(frozen=True)
class Stored:
    """Where one parameter of the model lies in the hub's checkpoint.

    The rows of its parts follow one another (gate, then up); experts that are tensors of their own are
    `stacked`; then the last two dimensions are swapped if `transposed`. With `convert` no rows describe the
    parameter: its parts name every tensor that it is made of.
    """

    parts: tuple[Part, ...]
    stacked: bool = False
    transposed: bool = False
    convert: Convert | None = None

    @classmethod
    def whole(cls, key: str, shape: Sequence[int]) -> Self:
        """A parameter that is one tensor of the checkpoint, as it is."""
        return cls((Part((key,), range(shape[row_axis(shape)] if shape else 1)),))

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The tensors of each part."""
        return tuple(part.keys for part in self.parts)


def row_axis(shape: Sequence[int]) -> int:
    """The dimension that rows are counted along: the second to last, or the only one."""
    return max(len(shape) - 2, 0)


@dataclass(frozen=True)
class Hub:
    """The checkpoint's view of the model, names and shapes only.

    stored: parameter or buffer name in memory -> where it lies. names: the same, under the names the hub
    gives this family, which is what gets written (they differ from `stored` only when the source holds
    fused what the family's own checkpoints hold expert by expert). tensors: every tensor of the source in
    its order. extra: those the model class ignores (multi-token prediction layers, vision towers), carried
    through untouched. modules: names listed as unquantized even without a tensor of their own (a tied
    `lm_head`).
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    names: Mapping[str, Stored] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


Accepts = Callable[[int, int], str | None]
_GRAPH, _CALIBRATED = Kept[Graph](), Kept[Graph | None](None)


@dataclass
class Program:
    """A graph under compilation.

    values: amax node name -> calibrated float32 [], filled by the calibration passes.
    tokens: fused weight name -> int64 [experts], the tokens each expert saw while calibrating.
    constants: small tensors the trace lifted out of the model, by the name of the node that reads them.
    bootstrapped: names of the amax nodes that calibrate-bootstrap filled, or left to the writer.
    accepts: (batch, length) -> None if the graph holds for inputs of that size, else why not.
    notes: what the user should know about decisions that passes took.
    left: weights that a pass was asked for and could not quantize, and was allowed to leave -> why.
    calibrated: the graph that was lowered, which simulates the deployed model; None until then.
    format: what the lowered program is written as.
    """

    graph: Kept[Graph] = _GRAPH
    hub: Hub = field(default_factory=Hub)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    bootstrapped: set[str] = field(default_factory=set)
    calibrated: Kept[Graph | None] = _CALIBRATED
    format: str = "modelopt"
    accepts: Accepts = lambda batch, length: None
    notes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def is_later(self, name: str) -> bool:
        """Whether the amax of that name is its own weight's, and found when that is read to be packed."""
        return name in self.bootstrapped and name not in self.values

    def rest(self) -> None:
        """Keep the graphs as text until one is asked for: only their parts are needed while weights
        stream."""
        _CALIBRATED.rest(self)
        _GRAPH.rest(self, apart=True)

    def parts(self) -> Iterator[Graph]:
        """The lowered program in graphs that have nothing to do with each other, one at a time, if it is at
        rest; else as it is."""
        return _GRAPH.graphs(self)

    def found(self) -> dict[str, Any]:
        """All that calibration found so far, in JSON; float32 survives exactly."""
        return {
            "values": {name: float(value) for name, value in self.values.items()},
            "tokens": {name: counts.tolist() for name, counts in self.tokens.items()},
            "bootstrapped": sorted(self.bootstrapped),
        }

    def forget(self) -> None:
        """Be without what `found` gave."""
        for kept in (self.values, self.tokens, self.bootstrapped):
            kept.clear()

    def restore(self, found: Mapping[str, Any]) -> None:
        """Take over what `found` gave, maybe in another process."""
        for name, value in found["values"].items():
            self.values[name] = torch.tensor(value, dtype=torch.float32)
        for name, counts in found["tokens"].items():
            self.tokens[name] = torch.tensor(counts, dtype=torch.int64)
        self.bootstrapped.update(found["bootstrapped"])


class WeightSource(Protocol):
    """Where tensors come from: a checkpoint directory read lazily, or a live model. Nothing is cached or
    written.

    concurrent: whether several threads may read at once; else reads come in order, on one thread at a time.
    """

    hub: Hub
    concurrent: bool

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A parameter or persistent buffer by its name in memory, on the CPU; SourceError if it cannot be
        read.

        out: where to put it, of the parameter's shape and dtype (pinned memory, say); new memory by default.
        """
        ...

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        """`read(name)[expert]` without building the rest of a fused weight."""
        ...

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        """A tensor of the checkpoint under the hub's name, as `hub.tensors` has it.

        part: which consecutive indices of its first dimension, so that one larger than memory can be copied.
        """
        ...
