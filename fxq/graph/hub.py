"""The checkpoint's view of a model: which tensors it holds, and where in them each parameter lies."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor of the checkpoint, known from its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

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

    def tensors(self, value: Tensor, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint that lie in the parameter, of this value, as a whole; infos: those
        that are wanted, and what they are."""
        start = 0
        for part in self.parts if self.convert is None else ():
            for expert, key in enumerate(part.keys):
                if key not in infos:
                    continue
                held = value[expert] if self.stacked else value
                held = held.mT if self.transposed else held
                if held.dim():
                    held = held.narrow(row_axis(held.shape), start, len(part.rows))
                if infos[key] == TensorInfo(tuple(held.shape), held.dtype):
                    yield key, held
            start += len(part.rows)


# A number in a dotted name: of a layer, of an expert.
NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key of dotted names by which layer 2 comes before layer 10. (natsort would also take apart what
    has a number at its end, such as `w10`.)"""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


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
    `lm_head`). encodings: tensors that the source holds quantized -> in what, FP8 or MXFP4, say.
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    names: Mapping[str, Stored] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    encodings: Mapping[str, str] = field(default_factory=dict)

    def encoding_of(self, parameter: str) -> str:
        """In what the source holds a parameter throughout; "" if in plain numbers, or not all alike."""
        stored = self.stored.get(parameter)
        keys = [parameter] if stored is None else [key for keys in stored.keys for key in keys]
        found = {self.encodings.get(key, "") for key in keys}
        return found.pop() if len(found) == 1 else ""


class WeightSource(Protocol):
    """Where tensors come from: a checkpoint directory read lazily, or a live model. Nothing is cached or
    written.

    concurrent: whether several threads may read at once; else reads come in order, on one thread at a time.
    bytes_read: bytes of tensors, as they decode, that were read so far.
    """

    hub: Hub
    concurrent: bool

    @property
    def bytes_read(self) -> int: ...

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A parameter or persistent buffer by its name in memory, on the CPU; SourceError if it cannot be
        read. Of one that the hub says is in FP8_BLOCKS, `name.codes` and `name.scales` too.

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
