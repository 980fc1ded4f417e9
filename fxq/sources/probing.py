"""Probing of transformers' conversions: where the rows of what they make lie in what they are given.

A conversion is run on tensors that hold the number of each element. What comes out says where each element
came from, whatever operations it went through:

    query_key_value [3N, K]   0 1 2 ... 3NK-1
    k_proj          [N, K]    NK ... 2NK-1      rows [N, 2N) of query_key_value

Only the first few columns are given, since those of a layer's experts are gigabytes. A run on meta tensors of
full width must make the same calls of torch, with the same arguments but for the width, or the probe is not
believed; and what it says must explain a second run on other numbers, or values were computed.
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
Shape = tuple[int, ...]
# Columns that tell one from another, an odd number of them, so that halves of a width do not look alike.
WIDTH = 3


@dataclass(frozen=True, eq=False)
class Conversion:
    """transformers' operations on whole tensors of the checkpoint, from which they make the parameter `name`
    and perhaps others. model: the PreTrainedModel that they ask for shapes, or what stands for it."""

    name: str
    converter: WeightConverter
    sources: Sources
    model: Any

    @property
    def keys(self) -> list[str]:
        """The tensors that it is given."""
        return [key for keys in self.sources.values() for key in keys]

    @property
    def operations(self) -> str:
        """What it does, for messages."""
        return ", ".join(type(operation).__name__ for operation in self.converter.operations)

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


# What a conversion called of torch, and what came of it.
Calls = tuple[object, ...]
# The shape of each result, and where its rows lie, or the operations that do more than choose rows.
Results = list[tuple[Shape, _Rows | str]]
# What was found of conversions, by the shapes of what they are given and by their calls.
Known = dict[tuple[object, ...], Results]


def placed(conversion: Conversion, infos: Infos, known: Known) -> dict[str, tuple[Shape, Stored]]:
    """Parameter -> its shape, and where it lies in the checkpoint, for all that a conversion makes.

    known: what was found of others of the same checkpoint, which is added to. SourceError if it fails.
    """
    keys = conversion.keys
    shapes = tuple(infos[key].shape for key in keys)
    try:  # on one column: on meta tensors, stacking experts takes a hundred times as long
        made, calls = _recorded(_seen(conversion, shapes, 1), [torch.empty(s) for s in _narrow(shapes, 1)])
    except SourceError:
        made, calls = _recorded(_seen(conversion), _meta(shapes))
    if (shapes, calls) not in known:
        known[shapes, calls] = _probe(conversion, shapes)
    found = {}
    for target, (shape, rows) in zip(made, known[shapes, calls], strict=True):
        if isinstance(rows, str):
            parts = tuple(Part((key,), range(0)) for key in keys)
            found[target] = shape, Stored(parts, convert=_Converted(conversion, target, rows))
        else:
            found[target] = shape, rows.of(keys)
    return found


def _probe(conversion: Conversion, shapes: Sequence[Shape]) -> Results:
    """What a conversion of tensors of these shapes makes."""
    whole, calls = _recorded(_seen(conversion), _meta(shapes))
    rows = _rows(conversion, shapes, calls)
    sizes = [tuple(made.shape) for made in whole.values()]
    return list(zip(sizes, [rows] * len(sizes) if isinstance(rows, str) else rows, strict=True))


def _rows(conversion: Conversion, shapes: Sequence[Shape], calls: Calls) -> Sequence[_Rows] | str:
    """Where the rows of each result lie; the operations that do more than choose rows.

    calls: those at full width.
    """
    widths = {shape[-1] if len(shape) > 1 else 0 for shape in shapes}
    if len(widths) > 1:
        return conversion.operations
    given = _Numbered(_narrow(shapes, WIDTH))
    for turned in (False, True):
        seen = _seen(conversion, shapes, WIDTH, turned=turned)
        try:
            made, found = _recorded(seen, given.tensors(given.numbers))
        except SourceError:
            continue
        if _alike(calls, found, max(widths), WIDTH):
            others, _ = _recorded(seen, given.tensors(given.hashed(given.numbers)))
            rows = [given.rows(t, others[target]) for target, t in made.items()]
            if all(rows):
                return [found for found in rows if found is not None]
            return _first_that_does_more(seen, given)
    return conversion.operations


def _narrow(shapes: Sequence[Shape], width: int) -> list[Shape]:
    """Shapes of so many columns, or of as many as there are."""
    return [(*shape[:-1], min(shape[-1], width)) if len(shape) > 1 else shape for shape in shapes]


def _meta(shapes: Sequence[Shape]) -> list[Tensor]:
    return [torch.empty(shape, device="meta") for shape in shapes]


def _seen(
    conversion: Conversion, shapes: Sequence[Shape] = (), width: int = 0, *, turned: bool = False
) -> Conversion:
    """A conversion to be run on tensors of these shapes, but of so many columns."""
    narrowed = _narrow(shapes, width)
    columns = {
        shape[-1]: narrow[-1] for shape, narrow in zip(shapes, narrowed, strict=True) if len(shape) > 1
    }
    return replace(conversion, model=_Shapes(conversion.model, columns, -2 if turned else -1))


class _Shapes:
    """A model as a conversion sees it, whose parameters are shapes.

    columns: how many a size of `axis` is cut to, as what the conversion is given was; the axis is another one
    where parameters are the transposes of what the checkpoint holds.
    """

    def __init__(self, model: Any, columns: Mapping[int, int], axis: int) -> None:
        self._model, self._columns, self._axis = model, columns, axis

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of the parameter's shape, with as many columns as what was given."""
        shape = list(self._model.get_parameter(name).shape)
        if len(shape) > 1:
            shape[self._axis] = self._columns.get(shape[self._axis], shape[self._axis])
        return torch.empty(shape, device="meta")


class _Numbered:
    """Tensors of these shapes, all of one width, which hold a number for each of their elements: 0 1 2 ...
    over all of them.

    Numbers are floating point, since conversions may ask whether a weight is; exact up to 2^24 and 2^53.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        self.width = shapes[0][-1] if len(shapes[0]) > 1 else 1
        count = sum(self.sizes)
        self.numbers = torch.arange(count, dtype=torch.float32 if count <= 2**24 else torch.float64)

    def hashed(self, numbers: Tensor) -> Tensor:
        """Other numbers in their place, in no order, so that no arithmetic leads from these to those."""
        return (numbers.long() * 40503 & 0xFFFF).to(self.numbers.dtype)

    def tensors(self, numbers: Tensor) -> list[Tensor]:
        """The tensors, which hold these numbers."""
        return [t.view(shape) for t, shape in zip(numbers.split(self.sizes), self.shapes, strict=True)]

    def rows(self, found: Tensor, hashed: Tensor) -> _Rows | None:
        """Which rows of the tensors a result is, of the numbers and of others; None if it is no rows."""
        if found.dtype != self.numbers.dtype or not torch.equal(self.hashed(found), hashed):
            return None
        if (rows := self._row_numbers(found)) is not None:
            return self._parts(rows, transposed=False)
        if found.dim() > 1 and (rows := self._row_numbers(found.mT)) is not None:
            return self._parts(rows, transposed=True)
        return None

    def _row_numbers(self, numbers: Tensor) -> Tensor | None:
        """Of a result [..., N, width] the number of each row, int64 [..., N], counted over all tensors; None
        if its rows are no whole ones."""
        if len(self.shapes[0]) < 2:
            return numbers.long()
        first = numbers[..., :1]
        whole = torch.equal(numbers, first + torch.arange(self.width)) and not (first % self.width).any()
        return first[..., 0].long() // self.width if whole else None

    def _parts(self, numbers: Tensor, *, transposed: bool) -> _Rows | None:
        """The parts of tensors that rows of these numbers, [N] or [experts, N], are."""
        if numbers.dim() > 2:
            return None
        table = numbers.reshape(-1, numbers.shape[-1] if numbers.dim() else 1)
        heights = torch.tensor([shape[row_axis(shape)] if shape else 1 for shape in self.shapes])
        counts = torch.tensor(self.sizes) // self.width
        ends = counts.cumsum(0)
        tensors = torch.bucketize(table, ends, right=True)
        places = table - (ends - counts)[tensors]
        matrices, rows = places // heights[tensors], places % heights[tensors]
        stacks = {self.shapes[number][:-2] for number in tensors[0].tolist()}
        by_expert = numbers.dim() == 2 and stacks == {()}
        experts = torch.arange(len(table))[:, None]
        if (
            (stacks != {tuple(numbers.shape[:-1])} and not by_expert)
            or (matrices != (0 if by_expert else experts)).any()
            or (rows != rows[:1]).any()
        ):
            return None
        parts = []
        for start, run in _runs(tensors[0].tolist(), rows[0].tolist()):
            owners = tensors[:, start : start + len(run)]
            if (owners != owners[:, :1]).any() or not (by_expert or (owners == owners[0]).all()):
                return None
            parts.append((tuple(owners[:, 0].tolist() if by_expert else owners[0, :1].tolist()), run))
        return _Rows(tuple(parts), by_expert, transposed)


def _runs(tensors: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Rows of tensors as the longest ranges that follow one another -> where each begins, and its rows."""
    start = 0
    while start < len(rows):
        end = start + 1
        step = rows[end] - rows[start] if end < len(rows) else 1
        while end < len(rows) and tensors[end] == tensors[start] and rows[end] - rows[end - 1] == step > 0:
            end += 1
        yield start, range(rows[start], rows[end - 1] + 1, step if end > start + 1 else 1)
        start = end


def _first_that_does_more(conversion: Conversion, given: _Numbered) -> str:
    """The first of a conversion's operations of which a result is no rows; all of them if none is at fault
    alone."""
    runs: list[list[_Watched]] = []
    for numbers in (given.numbers, given.hashed(given.numbers)):
        converter = copy.copy(conversion.converter)
        runs.append([_Watched(operation) for operation in converter.operations])
        converter.operations = list(runs[-1])  # type: ignore[arg-type]
        watched = replace(conversion, converter=converter)
        watched.run(dict(zip(watched.keys, given.tensors(numbers), strict=True)).__getitem__)
    for one, other in zip(*runs, strict=True):
        if not all(map(given.rows, one.made, other.made)):
            return type(one.operation).__name__
    return conversion.operations


class _Watched:
    """An operation that keeps what it makes."""

    def __init__(self, operation: ConversionOps) -> None:
        self.operation, self.made = operation, list[Tensor]()

    def __deepcopy__(self, memo: object) -> "_Watched":
        return self

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        """As the operation."""
        made = self.operation.convert(*args, **kwargs)
        for value in made.values():
            self.made += value if isinstance(value, list) else [value]
        return made


class _Recorder(TorchFunctionMode):
    """The calls of torch while this is entered: what was called, with which arguments, for which result.

    A tensor is its number, in the order of first appearance, and its shape; what types and devices are is
    left out, since the runs that are compared have others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []
        self._seen: dict[int, tuple[str, Tensor]] = {}  # by identity, kept so that none is used again

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, self.plain(args), self.plain(kwargs), self.plain(result)))
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


def _recorded(conversion: Conversion, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], Calls]:
    """All that a conversion makes of tensors, in the order of its keys, and what it called to do so."""
    recorder = _Recorder()
    known = recorder.plain(given)
    with given[0].device, recorder:  # what it makes of nothing goes where these are
        made = conversion.run(dict(zip(conversion.keys, given, strict=True)).__getitem__)
    return made, (known, *recorder.calls, recorder.plain(list(made.values())))


def _alike(full: object, narrow: object, wide: int, width: int) -> bool:
    """Whether two runs made the same calls, but for sizes that are in proportion to the width."""
    if isinstance(full, tuple) and isinstance(narrow, tuple):
        return len(full) == len(narrow) and all(
            _alike(a, b, wide, width) for a, b in zip(full, narrow, strict=True)
        )
    if type(full) is type(narrow) is int:
        return full == narrow or full * width == narrow * wide
    return full == narrow
