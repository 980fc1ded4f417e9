"""Probing of transformers' conversions: where the rows of what they make lie in what they are given.

A conversion is run on tensors that hold the number of each element. What comes out says where each element
came from, whatever operations it went through:

    query_key_value [3N, K]   0 1 2 ... 3NK-1
    k_proj          [N, K]    NK ... 2NK-1      rows [N, 2N) of query_key_value

Only the first few columns are given, since those of a layer's experts are gigabytes. A run on meta tensors of
full width makes the same calls of torch, with the same arguments but for the width, or the probe is not
believed; and what it says must also explain a second run on other numbers, or values were computed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import ConversionOps, WeightConverter

from fxq.errors import SourceError
from fxq.graph.hub import Part, Stored, TensorInfo, row_axis

Infos = Mapping[str, TensorInfo]
Sources = Mapping[str, Sequence[str]]  # pattern of a conversion -> the tensors it matched, in order
# Enough to tell columns apart, and odd, so that halves of a width do not look alike.
WIDTH = 3


@dataclass(frozen=True, eq=False)
class Conversion:
    """transformers' operations on whole tensors of the checkpoint, from which they make the parameter `name`
    and perhaps others."""

    name: str
    converter: WeightConverter
    sources: Sources
    model: Any  # PreTrainedModel, or what stands for one

    @property
    def keys(self) -> list[str]:
        """The tensors that it is given."""
        return [key for keys in self.sources.values() for key in keys]

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """All that it makes, as transformers' loader runs it."""
        fresh = copy.deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                fresh.add_tensor(self.name, key, pattern, lambda key=key: read(key))  # type: ignore[arg-type, misc]
        try:
            made = fresh.convert(self.name, model=self.model, config=self.model.config)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(
                f"{self.name}: transformers' conversion of {self.keys[0]} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}


@dataclass(frozen=True)
class _Converted:
    """A `Convert` by what is more than a choice of rows. operations: those that do more."""

    conversion: Conversion
    target: str
    operations: str

    def __call__(self, read: Callable[[str], Tensor]) -> Tensor:
        return self.conversion.run(read)[self.target]


@dataclass(frozen=True)
class _Rows:
    """A `Stored` that has for the names of tensors their numbers, in the order in which they are given."""

    parts: tuple[tuple[tuple[int, ...], range], ...]
    stacked: bool = False
    transposed: bool = False

    def of(self, keys: Sequence[str]) -> Stored:
        parts = (Part(tuple(keys[number] for number in numbers), rows) for numbers, rows in self.parts)
        return Stored(tuple(parts), self.stacked, self.transposed)


# What a conversion called of torch, and what it made.
Calls = tuple[object, ...]
# Calls -> where the rows of each result lie, or the operations that do more than choose rows.
Known = dict[Calls, tuple[_Rows, ...] | str]


def placed(conversion: Conversion, infos: Infos, known: Known) -> dict[str, tuple[tuple[int, ...], Stored]]:
    """Parameter -> its shape, and where it lies in the checkpoint, for all that a conversion makes.

    known: what equal conversions of the same checkpoint were found to do, which is added to. SourceError if
    the conversion fails.
    """
    keys = conversion.keys
    seen = replace(conversion, model=_Shapes(conversion.model))
    made, calls = _recorded(seen, {key: _meta(infos[key]) for key in keys})
    if calls not in known:
        known[calls] = _probe(conversion, [infos[key].shape for key in keys], calls)
    found = known[calls]
    if isinstance(found, str):
        whole = Stored(tuple(Part((key,), range(0)) for key in keys))
        stored = [replace(whole, convert=_Converted(conversion, target, found)) for target in made]
    else:
        stored = [rows.of(keys) for rows in found]
    return {
        target: (tuple(tensor.shape), place)
        for (target, tensor), place in zip(made.items(), stored, strict=True)
    }


def _probe(
    conversion: Conversion, shapes: Sequence[tuple[int, ...]], calls: Calls
) -> tuple[_Rows, ...] | str:
    """Where the rows of each result lie; the names of the operations that do more than choose rows.

    calls: what the conversion calls at full width.
    """
    names = ", ".join(type(operation).__name__ for operation in conversion.converter.operations)
    widths = {shape[-1] if len(shape) > 1 else None for shape in shapes}
    if len(widths) > 1:
        return names
    wide = widths.pop() or 1
    width = min(wide, WIDTH)
    given = _Numbered([(*shape[:-1], width) if len(shape) > 1 else shape for shape in shapes])
    for turned in (False, True):
        narrow = replace(conversion, model=_Shapes(conversion.model, wide, width, turned=turned))
        try:
            made, found = _recorded(narrow, given.tensors(conversion.keys, given.numbers))
        except SourceError:
            continue
        if _alike(calls, found, wide, width):
            again = narrow.run(given.tensors(conversion.keys, given.others).__getitem__)
            rows = [row for target in made if (row := given.rows(made[target], again[target]))]
            return tuple(rows) if len(rows) == len(made) else _first_that_does_more(narrow, given) or names
    return names


class _Shapes:
    """A model as a conversion sees it: its parameters are shapes.

    wide, width: a conversion is given tensors of `width` columns where the checkpoint's have `wide`. turned:
    whether the parameters hold the transpose of them.
    """

    def __init__(self, model: Any, wide: int = 0, width: int = 0, *, turned: bool = False) -> None:
        self._model, self._wide, self._width, self._axis = model, wide, width, -2 if turned else -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of the parameter's shape, as wide as the tensors that were given."""
        shape = list(self._model.get_parameter(name).shape)
        if len(shape) > 1 and shape[self._axis] == self._wide:
            shape[self._axis] = self._width
        return torch.empty(shape, device="meta")


class _Numbered:
    """Tensors of these shapes, which hold a number for each of their elements: 0 1 2 ... over all of them.

    Numbers are float64, since conversions may ask whether a weight is floating point; exact up to 2^53.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        self.numbers = torch.arange(sum(self.sizes), dtype=torch.float64)
        shuffled = torch.randperm(len(self.numbers), generator=torch.Generator().manual_seed(0))
        self.others = shuffled.to(torch.float64)

    def tensors(self, keys: Sequence[str], numbers: Tensor) -> dict[str, Tensor]:
        """The tensors, which hold these numbers, by their keys."""
        pieces = numbers.split(self.sizes)
        return {key: t.view(shape) for key, t, shape in zip(keys, pieces, self.shapes, strict=True)}

    def rows(self, found: Tensor, other: Tensor) -> _Rows | None:
        """Which rows of the tensors a result is, of these numbers and of others; None if it is no rows."""
        ids = found.long()
        if not bool(((ids >= 0) & (ids < len(self.numbers))).all()) or not torch.equal(
            self.others[ids], other
        ):
            return None
        if (rows := self._row_numbers(ids)) is not None:
            return self._parts(rows, transposed=False)
        if ids.dim() > 1 and (rows := self._row_numbers(ids.mT)) is not None:
            return self._parts(rows, transposed=True)
        return None

    def _row_numbers(self, ids: Tensor) -> Tensor | None:
        """The number of each row [..., N] of a result [..., N, width], counted over all tensors; None if its
        rows are not whole ones."""
        if len(self.shapes[0]) < 2:
            return ids
        width = self.shapes[0][-1]
        first = ids[..., :1]
        whole = torch.equal(ids, first + torch.arange(width)) and not bool((first % width).any())
        return first[..., 0] // width if whole else None

    def _parts(self, numbers: Tensor, *, transposed: bool) -> _Rows | None:
        """The parts that rows are of which these are the numbers, [N] or [experts, N]."""
        if numbers.dim() > 2:
            return None
        table = numbers.reshape(-1, numbers.shape[-1] if numbers.dim() else 1)
        heights = torch.tensor([shape[row_axis(shape)] if shape else 1 for shape in self.shapes])
        counts = torch.tensor(self.sizes) // (self.shapes[0][-1] if len(self.shapes[0]) > 1 else 1)
        ends = counts.cumsum(0)
        tensors = torch.bucketize(table, ends, right=True)
        places = table - (ends - counts)[tensors]
        matrices, rows = places // heights[tensors], places % heights[tensors]
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            return None
        stacks = {self.shapes[number][:-2] for number in tensors[0].tolist()}
        by_expert = numbers.dim() == 2 and stacks == {()}
        experts = torch.arange(len(table))[:, None]
        if not by_expert and (stacks != {tuple(numbers.shape[:-1])} or (tensors != tensors[:1]).any()):
            return None
        if (matrices != (0 if by_expert else experts)).any():
            return None
        parts = []
        for start, run in _runs(tensors[0].tolist(), rows[0].tolist()):
            owners = tensors[:, start : start + len(run)]
            if (owners != owners[:, :1]).any():
                return None
            parts.append((tuple(owners[:, 0].tolist()) if by_expert else (int(owners[0, 0]),), run))
        return _Rows(tuple(parts), by_expert, transposed)


def _runs(tensors: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Rows of tensors as the longest ranges that follow one another -> where each begins, and its rows."""
    start = 0
    while start < len(rows):
        end = start + 1
        step = rows[end] - rows[start] if end < len(rows) else 1
        while end < len(rows) and tensors[end] == tensors[start] and rows[end] - rows[end - 1] == step > 0:
            end += 1
        step = step if end > start + 1 else 1
        yield start, range(rows[start], rows[end - 1] + 1, step)
        start = end


def _first_that_does_more(conversion: Conversion, given: _Numbered) -> str | None:
    """The first of its operations of which a result is no rows."""
    steps: list[list[tuple[str, list[Tensor]]]] = []
    for numbers in (given.numbers, given.others):
        steps.append([])
        watched = copy.copy(conversion.converter)
        watched.operations = [_Watched(op, steps[-1]) for op in watched.operations]  # type: ignore[misc]
        replace(conversion, converter=watched).run(given.tensors(conversion.keys, numbers).__getitem__)
    for (name, found), (_, other) in zip(*steps, strict=True):
        if not all(given.rows(*pair) for pair in zip(found, other, strict=True)):
            return name
    return None


class _Watched:
    """An operation whose results are kept, with its name."""

    def __init__(self, operation: ConversionOps, kept: list[tuple[str, list[Tensor]]]) -> None:
        self._operation, self._kept = operation, kept

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        made = self._operation.convert(*args, **kwargs)
        lists = [value if isinstance(value, list) else [value] for value in made.values()]
        self._kept.append((type(self._operation).__name__, [t.clone() for list_ in lists for t in list_]))
        return made


class _Recorder(TorchFunctionMode):
    """The calls of torch while this is entered: what was called, with which arguments, for which result.

    A tensor is its number, in the order of first appearance, and its shape; what types and devices are is
    left out, since the runs that are compared have others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[object] = []
        self._seen: dict[int, tuple[str, Tensor]] = {}  # by identity, kept so that none is used again

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append((func, self.plain(args), self.plain(kwargs or {}), self.plain(result)))
        return result

    def plain(self, value: Any) -> object:
        """A value as it is recorded."""
        if isinstance(value, Tensor):
            name, _ = self._seen.setdefault(id(value), (f"%{len(self._seen)}", value))
            return name, tuple(value.shape)
        if isinstance(value, (list, tuple)):
            return tuple(map(self.plain, value))
        if isinstance(value, dict):
            return tuple((key, self.plain(item)) for key, item in value.items())
        if isinstance(value, slice):
            return "slice", value.start, value.stop, value.step
        return value if isinstance(value, (int, float, str, type(None), type(...))) else type(value)


def _recorded(conversion: Conversion, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Calls]:
    """All that a conversion makes of the tensors it is given, and what it called to do so."""
    with _Recorder() as calls:
        known = calls.plain(list(given.values()))
        made = conversion.run(given.__getitem__)
    return made, (known, *calls.made, calls.plain(list(made.values())))


def _alike(full: object, narrow: object, wide: int, width: int) -> bool:
    """Whether two runs made the same calls, but for sizes that are in proportion to the width."""
    if isinstance(full, tuple) and isinstance(narrow, tuple):
        return len(full) == len(narrow) and all(
            _alike(a, b, wide, width) for a, b in zip(full, narrow, strict=True)
        )
    if type(full) is type(narrow) is int:
        return full == narrow or full * width == narrow * wide
    return full == narrow


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
