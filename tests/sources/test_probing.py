"""What conversions do to rows is found whatever their operations are, and those that do more are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from fxq.graph.hub import Part, Stored, TensorInfo, row_axis
from fxq.sources.probing import Conversion, Known, placed

NAME = "layers.0.w"


class Moved(ConversionOps):
    """One tensor into one by any function, as the code of a repository may have it."""

    def __init__(self, move: Callable[..., Tensor]) -> None:
        self.move = move

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors = [
            t for value in input_dict.values() for t in (value if isinstance(value, list) else [value])
        ]
        return {target_patterns[0]: self.move(*tensors)}


class Split(ConversionOps):
    """Rows in pieces as large as the parameters are."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        names = [kwargs["full_layer_name"].replace(target_patterns[0], target) for target in target_patterns]
        sizes = [kwargs["model"].get_parameter(name).shape[0] for name in names]
        (tensors,) = input_dict.values()
        return dict(zip(target_patterns, tensors[0].split(sizes), strict=True))


def _model(shapes: Mapping[str, Sequence[int]]) -> Any:
    """What a conversion sees of a model: its parameters and its config."""
    held = {name: nn.Parameter(torch.empty(tuple(shape), device="meta")) for name, shape in shapes.items()}
    return SimpleNamespace(get_parameter=held.__getitem__, config=SimpleNamespace(num_attention_heads=4))


def _conversion(
    operations: list[ConversionOps],
    tensors: Mapping[str, Sequence[Tensor]],
    targets: Sequence[str] = ("w",),
    parameters: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Conversion, dict[str, Tensor]]:
    keys = {pattern: [f"{pattern}.{i}" for i in range(len(list_))] for pattern, list_ in tensors.items()}
    given = {key: t for p, list_ in tensors.items() for key, t in zip(keys[p], list_, strict=True)}
    if any(isinstance(op, ErnieFuseAndSplitTextVisionExperts) for op in operations) or len(tensors) == 1:
        converter = WeightConverter(list(tensors), list(targets), operations)
    else:
        converter = WeightConverter(list(tensors), targets[0], operations)
    model = _model({f"layers.0.{name}": shape for name, shape in (parameters or {}).items()})
    return Conversion(f"layers.0.{targets[0]}", converter, keys, model), given


def _places(conversion: Conversion, given: Mapping[str, Tensor]) -> dict[str, Stored]:
    infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in given.items()}
    return {name: stored for name, (_, stored) in placed(conversion, infos, {}).items()}


def _read(stored: Stored, given: Mapping[str, Tensor]) -> Tensor:
    """The parameter, row by row as its place says."""

    def rows(part: Part, key: str) -> Tensor:
        t = given[key]
        return t.index_select(row_axis(t.shape), torch.tensor(list(part.rows))) if t.dim() else t

    if stored.stacked:
        experts = range(len(stored.parts[0].keys))
        whole = torch.stack([torch.cat([rows(p, p.keys[e]) for p in stored.parts]) for e in experts])
    else:
        pieces = [rows(part, part.keys[0]) for part in stored.parts]
        whole = torch.cat(pieces, row_axis(pieces[0].shape)) if pieces[0].dim() else pieces[0]
    return whole.mT if stored.transposed else whole


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


GATE_UP = {"gate.*.weight": [_random(6, 8)] * 4, "up.*.weight": [_random(6, 8)] * 4}
MOVES: dict[str, tuple[list[ConversionOps], Mapping[str, Sequence[Tensor]], Sequence[str]]] = {
    "chunk": ([Chunk(dim=0)], {"qkv": [_random(12, 8)]}, ("q", "k", "v")),
    "chunk of a vector": ([Chunk(dim=0)], {"qkv": [_random(12)]}, ("q", "k", "v")),
    "deinterleave": ([Interleave(dim=0), Chunk(dim=0)], {"w13": [_random(12, 8)]}, ("gate", "up")),
    "interleave": ([Interleave(dim=0, inverse=True)], {"w": [_random(12, 8)]}, ("w",)),
    "experts": ([MergeModulelist(0), Concatenate(1)], GATE_UP, ("w",)),
    "experts of one tensor": ([Interleave(dim=1)], {"w": [_random(4, 12, 8)]}, ("w",)),
    "experts turned": ([Transpose(1, 2)], {"w": [_random(4, 12, 8)]}, ("w",)),
    "experts by modality": (
        [ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1)],
        GATE_UP,
        ("text.w", "vision.w"),
    ),
    "rotary": ([PermuteForRope(permute_layer_names=["w"])], {"w": [_random(16, 8)]}, ("w",)),
    "rotary of a vector": ([PermuteForRope(permute_layer_names=["w"])], {"w": [_random(16)]}, ("w",)),
    "turned": ([Transpose(0, 1)], {"w": [_random(12, 8)]}, ("w",)),
    "turned, of one column": ([Transpose(0, 1)], {"w": [_random(12, 1)]}, ("w",)),
    "a square": ([Transpose(0, 1)], {"w": [_random(8, 8)]}, ("w",)),
    "heads in groups": (
        [Moved(lambda t: t.view(4, 3, 2, -1).transpose(0, 1).reshape(t.shape))],
        {"w": [_random(24, 8)]},
        ("w",),
    ),
    "rows backwards": ([Moved(lambda t: t.flip(0))], {"w": [_random(12, 8)]}, ("w",)),
    "rows without padding": ([Moved(lambda t: t[:10])], {"w": [_random(12, 8)]}, ("w",)),
    "joined": ([Concatenate(dim=0)], {"a": [_random(12, 8)], "b": [_random(4, 8)]}, ("w",)),
    "filled in place": (
        [Moved(lambda a, b: torch.cat([torch.zeros_like(a), b]).index_copy(0, torch.arange(8), a))],
        {"a": [_random(8, 8)], "b": [_random(4, 8)]},
        ("w",),
    ),
    "a scalar": ([Moved(lambda t: t.clone())], {"w": [_random()]}, ("w",)),
}


@pytest.mark.parametrize("what", MOVES)
def test_rows_are_found(what: str) -> None:
    conversion, given = _conversion(*MOVES[what])
    made = conversion.run(given.__getitem__)
    stored = _places(conversion, given)
    assert stored.keys() == made.keys()
    for name, tensor in made.items():
        assert stored[name].convert is None
        assert torch.equal(_read(stored[name], given), tensor), name


def test_pieces_as_large_as_parameters_are_found() -> None:
    sizes = {"q": (8, 16), "k": (4, 16), "v": (4, 16)}
    conversion, given = _conversion([Split()], {"qkv": [_random(16, 16)]}, tuple(sizes), sizes)
    assert {name: stored.parts for name, stored in _places(conversion, given).items()} == {
        "layers.0.q": (Part(("qkv.0",), range(8)),),
        "layers.0.k": (Part(("qkv.0",), range(8, 12)),),
        "layers.0.v": (Part(("qkv.0",), range(12, 16)),),
    }


@pytest.mark.parametrize(("held", "is_turned"), [((4, 12, 8), False), ((4, 8, 12), True)])
def test_what_is_turned_by_shape_is_found(held: tuple[int, ...], is_turned: bool) -> None:
    turn = Transpose(1, 2, check_dims=True)
    conversion, given = _conversion([turn], {"w": [_random(*held)]}, ("w",), {"w": (4, 12, 8)})
    stored = _places(conversion, given)[NAME]
    assert stored.transposed is is_turned
    assert _read(stored, given).shape == (4, 12, 8)


MORE: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "negated": (lambda t: -t, [_random(12, 8)]),
    "scaled": (lambda t: t * 2, [_random(12, 8)]),
    "with one added": (lambda t: t + 1, [_random(12, 8)]),
    "the largest": (torch.maximum, [_random(12, 8), _random(12, 8)]),
    "a mean": (lambda a, b: (a + b) / 2, [_random(12, 8), _random(12, 8)]),
    "sorted": (lambda t: t.sort(0).values, [_random(12, 8)]),
    "rounded": (lambda t: t.to(torch.float16), [_random(12, 600)]),
    "columns backwards": (lambda t: t.flip(1), [_random(12, 8)]),
    "halves of columns": (lambda t: t.roll(t.shape[1] // 2, 1), [_random(12, 8)]),
    "columns by number": (lambda t: torch.cat([t[:, 4:8], t[:, :4], t[:, 8:]], 1), [_random(12, 16)]),
    "some columns": (lambda t: t[:, :4], [_random(12, 8)]),
    "columns joined": (lambda a, b: torch.cat([a, b], 1), [_random(12, 8), _random(12, 8)]),
    "columns as rows": (lambda t: t.reshape(24, 4), [_random(12, 8)]),
    "columns of other widths joined": (lambda a, b: torch.cat([a, b], 1), [_random(12, 8), _random(12, 4)]),
}


@pytest.mark.parametrize("what", MORE)
def test_what_does_more_is_named_and_still_converts(what: str) -> None:
    move, tensors = MORE[what]
    operations: list[ConversionOps] = [Moved(move)]
    patterns = {name: [t] for name, t in zip("ab", tensors, strict=False)}
    conversion, given = _conversion(operations, patterns)
    convert = _places(conversion, given)[NAME].convert
    assert convert is not None
    assert convert.operations == "Moved"
    assert torch.equal(convert(given.__getitem__), move(*tensors))


def test_of_several_operations_the_one_that_does_more_is_named() -> None:
    operations = [Transpose(0, 1), Moved(lambda t: t * 2), Transpose(0, 1)]
    conversion, given = _conversion(operations, {"w": [_random(12, 8)]})
    convert = _places(conversion, given)[NAME].convert
    assert convert is not None
    assert convert.operations == "Moved"


class MovedByLayer(Moved):
    """What is moved in layer 1 alone."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        if kwargs["full_layer_name"].startswith("layers.1."):
            return super().convert(input_dict, source_patterns, target_patterns)
        return {target_patterns[0]: input_dict[source_patterns[0]][0].clone()}


def test_layers_that_are_converted_otherwise_are_told_apart() -> None:
    conversion, _ = _conversion([MovedByLayer(lambda t: t.flip(0))], {"w": [_random(4, 8)]})
    other = Conversion("layers.1.w", conversion.converter, conversion.sources, conversion.model)
    infos, known = {"w.0": TensorInfo((4, 8), torch.bfloat16)}, Known()
    first, second = (placed(each, infos, known) for each in (conversion, other))
    assert len(first[NAME][1].parts) == 1
    assert len(second["layers.1.w"][1].parts) == 4
