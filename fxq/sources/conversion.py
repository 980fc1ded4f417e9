"""Conversion of a checkpoint's tensors to a model's parameters: transformers' own, read as rows of tensors.

What a conversion does to rows is found by probing it, so that one expert can be read and written alone. One
that does more runs as it is, on whole tensors.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from fxq.errors import SourceError, and_more
from fxq.graph.hub import Hub, Stored, TensorInfo
from fxq.sources.probing import Conversion, Infos, Known, Sources, placed


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
    stored, known = dict[str, Stored](), Known()
    for name, sources in found.items():
        if None in sources:
            key = _only(name, [key for keys in sources.values() for key in keys])
            stored[name] = Stored.whole(key, infos[key].shape)
            _check_shape(name, key, infos[key].shape, own[name].shape)
        else:
            patterns = {str(pattern): keys for pattern, keys in sources.items()}
            converter = by_pattern[next(iter(patterns))]
            stored |= _converted(name, converter, patterns, model, infos, own, known)
    return stored, tuple(extra)


def _only(name: str, keys: Sequence[str]) -> str:
    if len(keys) > 1:
        raise SourceError(f"{keys[1]}: expected one tensor for {name}, found {keys[0]} as well")
    return keys[0]


def _converted(
    name: str,
    converter: WeightConverter,
    sources: Sources,
    model: PreTrainedModel,
    infos: Infos,
    own: Infos,
    known: Known,
) -> dict[str, Stored]:
    """What one conversion makes; `name` is the first of its parameters."""
    _check_numbers(sources)
    conversion = Conversion(name, converter, sources, model)
    try:
        made = placed(conversion, infos, known)
    except SourceError:
        _check_alike(sources, infos)
        raise
    stored = {}
    for target, (shape, place) in made.items():
        if target in own:
            if shape != own[target].shape:
                _check_counts(name, converter, sources)
            _check_shape(target, conversion.keys[0], shape, own[target].shape)
            stored[target] = place
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


def _check_counts(name: str, converter: WeightConverter, sources: Sources) -> None:
    """Every projection has as many experts."""
    if len({len(keys) for keys in sources.values()}) > 1 or len(sources) < len(converter.source_patterns):
        counts = ", ".join(f"{len(keys)} like {keys[0]}" for keys in sources.values())
        raise SourceError(f"{name}: expected as many tensors of each projection, found {counts}")


def _check_alike(sources: Sources, infos: Infos) -> None:
    """Experts have one shape."""
    for first, *others in sources.values():
        for key in others:
            if infos[key].shape != infos[first].shape:
                expected, found = (list(infos[k].shape) for k in (first, key))
                raise SourceError(f"{key}: expected shape {expected} of {first}, found {found}")


def _check_numbers(sources: Sources) -> None:
    """Experts are numbered from 0 without a gap: they are stacked in the order of their numbers, so a gap
    would shift all that follow."""
    for keys in sources.values():
        columns = [
            column for column in zip(*(key.split(".") for key in keys), strict=False) if len(set(column)) > 1
        ]
        numbers = columns[0] if len(columns) == 1 and all(map(str.isdigit, columns[0])) else ()
        for number, (found, key) in enumerate(zip(numbers, keys, strict=False)):
            if found != str(number):
                raise SourceError(
                    f"{key}: expected expert {number} here, found {found}; is a tensor missing?"
                )
