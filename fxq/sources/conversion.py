"""Conversion of a checkpoint's tensors to a model's parameters: transformers' own, read as rows of tensors.

Every operation that stacks, joins, splits, deinterleaves or transposes is followed symbolically, so that one
expert can be read and written alone. Whatever else a conversion does runs as it is, on whole tensors.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from fxq.errors import SourceError, and_more
from fxq.graph.hub import Hub, Part, Stored, TensorInfo, row_axis

Infos = Mapping[str, TensorInfo]
Sources = Mapping[str, Sequence[str]]  # pattern of a conversion -> the tensors it matched, in order


def hub_of(model: PreTrainedModel, infos: Infos, where: str) -> Hub:
    """How the tensors of a checkpoint make up the parameters of `model`, by transformers' own conversion
    of that family; SourceError if a parameter has none."""
    own = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    stored, extra = _stored(model, infos, own)
    for name, place in stored.items():
        _check_kind(name, own[name], [key for keys in place.keys for key in keys], infos)
    held = set(stored)
    aliases = _aliases(model)
    for alias, name in aliases.items():
        if alias in stored and name not in stored:
            stored[name] = stored[alias]
    tied = set(model.all_tied_weights_keys)
    missing = [
        name for name in own if name not in stored and aliases.get(name, name) == name and name not in tied
    ]
    if missing:
        raise SourceError(f"{where}: no tensor for {and_more(missing)}")
    unnamed = [alias for alias in aliases if alias not in stored and aliases[alias] in stored]
    stored |= {alias: stored[aliases[alias]] for alias in unnamed}
    modules = sorted(
        alias.removesuffix(".weight")
        for alias in stored.keys() - held
        if alias.endswith(".weight")
        and len(own[alias].shape) > 1
        and not isinstance(_owner(model, alias), torch.nn.Embedding)
    )
    return Hub(
        stored, {**stored, **_expert_by_expert(model, stored, own)}, dict(infos), extra, tuple(modules)
    )


def revert(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors that the given parameters make up, as `save_pretrained` would write them."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def kept_turned(model: PreTrainedModel, keys: Sequence[str]) -> list[str]:
    """Of a checkpoint's weights those of linears that this model keeps as [in, out]."""
    modules = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    prefix = f"{model.base_model_prefix}."
    return [key for key in keys if modules & {key, prefix + key, key.removeprefix(prefix)}]


def own_names(model: PreTrainedModel) -> list[str]:
    """The names of the state dict, a tensor that has several only under its first."""
    aliases = _aliases(model)
    return [name for name in model.state_dict() if aliases.get(name, name) == name]


def _owner(model: PreTrainedModel, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    first: dict[int, str] = {}
    return {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}


def _expert_by_expert(model: PreTrainedModel, stored: Mapping[str, Stored], own: Infos) -> dict[str, Stored]:
    """Parameters that this source holds fused, but the family's own checkpoints as a tensor an expert."""
    fused = [n for n, s in stored.items() if n in own and len(own[n].shape) == 3 and not s.stacked]
    if not fused:
        return {}
    meta = {n: torch.empty(own[n].shape, dtype=own[n].dtype, device="meta") for n in fused}
    infos = {key: TensorInfo.of(tuple(t.shape), t.dtype) for key, t in revert(model, meta).items()}
    theirs, _ = _stored(model, infos, own)
    return {name: theirs[name] for name in fused if name in theirs and theirs[name].stacked}


def _stored(model: PreTrainedModel, infos: Infos, own: Infos) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """(parameter -> where it lies, tensors that no parameter takes)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, names = model.base_model_prefix, dict(own)
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    extra = []
    for key in sorted(infos, key=dot_natural_key):
        # The base-model prefix is tried against a plain dict of names: only membership is asked for.
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name in own:
            found[name][pattern].append(key)
        else:
            extra.append(key)
    stored: dict[str, Stored] = {}
    for name, sources in found.items():
        if None in sources:
            key = _only(name, [key for keys in sources.values() for key in keys])
            stored[name] = Stored.whole(key, infos[key].shape)
            _check_shape(name, key, infos[key].shape, own[name].shape)
        else:
            patterns = {str(pattern): keys for pattern, keys in sources.items()}
            converter = by_pattern[next(iter(patterns))]
            stored |= _converted(name, converter, patterns, model, infos, own)
    return stored, tuple(extra)


def _only(name: str, keys: Sequence[str]) -> str:
    if len(keys) > 1:
        raise SourceError(f"{keys[1]}: expected one tensor for {name}, found {keys[0]} as well")
    return keys[0]


def _converted(
    name: str, converter: WeightConverter, sources: Sources, model: PreTrainedModel, infos: Infos, own: Infos
) -> dict[str, Stored]:
    """What one conversion makes; `name` is the first of its parameters."""
    try:
        made = _follow(name, converter, sources, model, infos, own)
    except _NotRows:
        return _on_whole_tensors(name, converter, sources, model, infos, own)
    stored = {}
    for target, rows in zip(_full_names(name, converter), made, strict=True):
        if target in own:
            _check_shape(target, rows.parts[0].keys[0], rows.shape, own[target].shape)
            stored[target] = Stored(rows.parts, rows.stacked, rows.transposed)
    return stored


def _check_shape(name: str, key: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        shape = f"shape {list(expected)}{_of(name, key)}, as config.json has it"
        raise SourceError(f"{key}: expected {shape}, found {list(found)}")


def _of(name: str, key: str) -> str:
    """Which parameter a tensor makes, where it is called otherwise."""
    return "" if name == key else f" of parameter {name}"


def _check_kind(name: str, own: TensorInfo, keys: Sequence[str], infos: Infos) -> None:
    """A weight is no integer, whatever its shape."""
    for key in keys:
        if infos[key].dtype.is_floating_point != own.dtype.is_floating_point:
            expected, found = (str(dtype).removeprefix("torch.") for dtype in (own.dtype, infos[key].dtype))
            raise SourceError(f"{key}: expected {expected}{_of(name, key)}, found {found}")


def _full_names(name: str, converter: WeightConverter) -> list[str]:
    """The names of all parameters that a conversion makes, from the first one's."""
    targets = converter.target_patterns
    before, _, after = name.partition(targets[0])
    return [name] if len(targets) == 1 else [before + target + after for target in targets]


class _NotRows(Exception):
    """An operation whose result is no rows of the checkpoint's tensors."""


@dataclass(frozen=True)
class _Rows:
    """A tensor on its way through a conversion, said as rows of the checkpoint's tensors."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    stacked: bool = False
    transposed: bool = False

    @property
    def axis(self) -> int:
        """The dimension along which the rows lie."""
        return 1 + row_axis(self.shape[1:]) if self.stacked else row_axis(self.shape)

    def with_rows(self, parts: Sequence[Part]) -> "_Rows":
        shape = list(self.shape)
        shape[self.axis] = sum(len(part.rows) for part in parts)
        return _Rows(tuple(parts), tuple(shape), self.stacked)


def _follow(
    name: str, converter: WeightConverter, sources: Sources, model: PreTrainedModel, infos: Infos, own: Infos
) -> list[_Rows]:
    """The conversion's results in the order of its targets; _NotRows if they are more than rows."""
    values = [
        [_Rows(Stored.whole(key, infos[key].shape).parts, infos[key].shape) for key in sources[pattern]]
        for pattern in converter.source_patterns
        if pattern in sources
    ]
    targets = len(converter.target_patterns)
    for operation in converter.operations:
        match operation:
            case MergeModulelist(dim=0):
                _check_counts(name, values, len(converter.source_patterns))
                values = [[_stack(list_)] for list_ in values]
            case Concatenate():
                values = [[_concatenate(operation, [rows for list_ in values for rows in list_])]]
            case Chunk(num_shards_attribute=None):
                values = [[rows] for rows in _chunk(operation, _single(values), targets)]
            case Interleave(inverse=False):
                values = [[_deinterleave(operation, _single(values))]]
            case Transpose():
                values = [[_transpose(operation, _single(values), own[name].shape)]]
            case ErnieFuseAndSplitTextVisionExperts(stack_dim=0):
                _check_counts(name, values, len(converter.source_patterns))
                values = [[rows] for rows in _split_experts(operation, values, targets)]
            case _:
                raise _NotRows
    if len(values) != targets or any(len(list_) != 1 for list_ in values):
        raise _NotRows
    return [list_[0] for list_ in values]


def _single(values: Sequence[Sequence[_Rows]]) -> _Rows:
    if len(values) != 1 or len(values[0]) != 1:
        raise _NotRows
    return values[0][0]


def _stack(experts: Sequence[_Rows]) -> _Rows:
    keys = tuple(expert.parts[0].keys[0] for expert in experts)
    first = experts[0]
    for key, expert in zip(keys, experts, strict=True):
        if expert.shape != first.shape:
            raise SourceError(
                f"{key}: expected shape {list(first.shape)} of {keys[0]}, found {list(expert.shape)}"
            )
    return _Rows((Part(keys, first.parts[0].rows),), (len(experts), *first.shape), stacked=True)


def _concatenate(operation: Concatenate, tensors: Sequence[_Rows]) -> _Rows:
    first = tensors[0]
    others = [[n for i, n in enumerate(t.shape) if i != first.axis] for t in tensors]
    alike = all(t.stacked == first.stacked and not t.transposed for t in tensors)
    if operation.dim != first.axis or not alike:
        raise _NotRows
    for tensor, sizes in zip(tensors, others, strict=True):
        if sizes != others[0]:
            raise SourceError(
                f"{tensor.parts[0].keys[0]}: expected a shape that joins {list(first.shape)} of "
                f"{first.parts[0].keys[0]}, found {list(tensor.shape)}"
            )
    return first.with_rows([part for tensor in tensors for part in tensor.parts])


def _chunk(operation: Chunk, tensor: _Rows, count: int) -> list[_Rows]:
    total = tensor.shape[operation.dim]
    if operation.dim != tensor.axis or tensor.transposed or total % count:
        raise _NotRows
    size = total // count
    return [tensor.with_rows(_cut(tensor.parts, i * size, (i + 1) * size)) for i in range(count)]


def _cut(parts: Sequence[Part], start: int, end: int) -> list[Part]:
    """Rows [start, end) of the parts' rows laid end to end."""
    cut, offset = [], 0
    for part in parts:
        rows = part.rows[max(start - offset, 0) : max(end - offset, 0)]
        if len(rows):
            cut.append(Part(part.keys, rows))
        offset += len(part.rows)
    return cut


def _deinterleave(operation: Interleave, tensor: _Rows) -> _Rows:
    """Even rows, then odd rows."""
    rows = tensor.parts[0].rows
    if operation.dim != tensor.axis or tensor.transposed or len(tensor.parts) != 1 or len(rows) % 2:
        raise _NotRows
    return tensor.with_rows([Part(tensor.parts[0].keys, rows[start::2]) for start in (0, 1)])


def _transpose(operation: Transpose, tensor: _Rows, expected: tuple[int, ...]) -> _Rows:
    last = len(tensor.shape)
    if {operation.dim0 % last, operation.dim1 % last} != {last - 2, last - 1}:
        raise _NotRows
    if operation.check_dims and tensor.shape == expected:
        return tensor
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return _Rows(tensor.parts, shape, tensor.stacked, not tensor.transposed)


def _split_experts(
    operation: ErnieFuseAndSplitTextVisionExperts, values: Sequence[Sequence[_Rows]], count: int
) -> list[_Rows]:
    """Every projection's experts in `count` runs; of each run the projections joined."""
    size = -(-len(values[0]) // count)
    runs = [[_stack(experts[i * size : (i + 1) * size]) for experts in values] for i in range(count)]
    return [_concatenate(Concatenate(dim=operation.concat_dim), run) for run in runs]


def _check_counts(name: str, values: Sequence[Sequence[_Rows]], expected: int) -> None:
    """Every projection has as many experts, numbered from 0 without a gap: they are stacked in the order of
    their numbers, so a gap would shift all that follow."""
    keys = [[rows.parts[0].keys[0] for rows in experts] for experts in values]
    if len({len(experts) for experts in keys}) != 1 or len(keys) != expected:
        counts = ", ".join(f"{len(experts)} like {experts[0]}" for experts in keys)
        raise SourceError(f"{name}: expected as many tensors of each projection, found {counts}")
    for experts in keys:
        columns = list(zip(*(key.split(".") for key in experts), strict=True))
        numbers = next((column for column in columns if len(set(column)) > 1), ("0",))
        for number, (found, key) in enumerate(zip(numbers, experts, strict=False)):
            if found != str(number):
                raise SourceError(
                    f"{key}: expected expert {number} here, found {found}; is a tensor missing?"
                )


@dataclass(frozen=True, eq=False)
class _Conversion:
    """A `Convert`: transformers' operations, run on whole tensors for the parameter `target`."""

    name: str
    target: str
    converter: WeightConverter
    sources: Sources
    model: PreTrainedModel

    @property
    def operations(self) -> str:
        return ", ".join(type(operation).__name__ for operation in self.converter.operations)

    def __call__(self, read: Callable[[str], Tensor]) -> Tensor:
        return _run(self.name, self.converter, self.sources, self.model, read)[self.target]


def _run(
    name: str,
    converter: WeightConverter,
    sources: Sources,
    model: PreTrainedModel,
    read: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """All that one conversion makes, as transformers' loader runs it."""
    fresh = copy.deepcopy(converter)
    for pattern, keys in sources.items():
        for key in keys:
            fresh.add_tensor(name, key, pattern, lambda key=key: read(key))  # type: ignore[arg-type, misc]
    try:
        made = fresh.convert(name, model=model, config=model.config)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{name}: transformers' conversion of {next(iter(sources.values()))[0]} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}


def _on_whole_tensors(
    name: str, converter: WeightConverter, sources: Sources, model: PreTrainedModel, infos: Infos, own: Infos
) -> dict[str, Stored]:
    made = _run(name, converter, sources, model, lambda key: _meta(infos[key]))
    parts = tuple(Part((key,), range(0)) for keys in sources.values() for key in keys)
    stored = {}
    for target, tensor in made.items():
        if target in own:
            _check_shape(target, parts[0].keys[0], tensor.shape, own[target].shape)
            convert = _Conversion(name, target, converter, sources, model)
            stored[target] = Stored(parts, convert=convert)
    return stored


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")
