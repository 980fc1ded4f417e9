"""The spec that says by name what `choose-formats` chose: made once, it can be read, changed and reused."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from fxq.graph.hub import NUMBER
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.graph.structure.views import parameter_name, shape_of
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import Pass
from fxq.pipeline.choosing import NONE, average_bits, is_chosen, pair_of
from fxq.pipeline.spec import Spec

CHOOSING, RESOLVING = "choose-formats", "resolve-choices"
_QUANTIZING = ("quantize-experts", "quantize-linears")
_SELECTING = ("skip", "skip_first", "skip_last", "stored", "head")  # what names make superfluous
_OF_BLOCKS = ("calibrate-mse", "calibrate-hessian", "gptq")  # what fails where no weight has scales to search


def chosen_spec(spec: Spec, program: Program) -> Spec | None:
    """A spec without choices that does what `spec` did to a program; None if it chose nothing (yet)."""
    if not is_chosen(program):
        return None
    places = [choice.place(program.values) for choice in program.choices]
    formats = {
        name: choice.formats[place]
        for choice, place in zip(program.choices, places, strict=True)
        for name in choice.parameters
    }
    matmuls = list(weight_matmuls(program.calibrated or program.graph))
    names = {
        parameter_name(m.w): "quantize-experts" if len(shape_of(m.parameter)) == 3 else "quantize-linears"
        for m in matmuls
    }
    steps: list[Pass] = []
    last = max(i for i, step in enumerate(spec.passes) if step.name == CHOOSING)
    for i, step in enumerate(spec.passes):
        replaced = i < last and step.name in _QUANTIZING
        if replaced and all(other.name != step.name for other in spec.passes[:i]):
            named = [name for name, kind in names.items() if kind == step.name]
            steps += _by_format(step, {n: f for n, f in formats.items() if n in named}, named, spec)
        elif not replaced and step.name not in (CHOOSING, RESOLVING):
            steps.append(step)
    used = {pair_of(format)[0] for format in formats.values()} - {NONE}
    if not any("mse" in FORMATS[format].scales for format in used):
        steps = [step for step in steps if step.name not in _OF_BLOCKS]
    bits = average_bits(program.choices, places)
    return Spec("chosen", f"{spec.name} as chosen: {bits:.2f} bits a weight", tuple(steps))


def _by_format(step: Pass, formats: dict[str, str], names: Sequence[str], spec: Spec) -> Iterator[Pass]:
    """A pass for each format, whose globs fit what has it."""
    exact = {glob for step in spec.passes for glob in getattr(step, "only", ()) if not set("*?[") & set(glob)}
    modules = [name.removesuffix(".weight") for name in names]
    for format in dict.fromkeys(formats.values()):
        if format != NONE:
            own = [name.removesuffix(".weight") for name, f in formats.items() if f == format]
            weights, inputs = pair_of(format)
            options = {"weights": weights, "inputs": inputs, "only": _globs(own, modules, exact)}
            plain = {f.name: f.default for f in dataclasses.fields(cast(Any, step)) if f.name in _SELECTING}
            yield dataclasses.replace(cast(Any, step), **{**plain, **options})


def _globs(own: Sequence[str], names: Sequence[str], exact: Collection[str]) -> tuple[str, ...]:
    """Globs that fit some of the names and no other: a `*` for all numbers of a name, or for those after its
    first, wherever that parts nothing; names that a spec has to spell out as they are."""
    others = set(names) - set(own)

    def glob(name: str) -> str:
        first = NUMBER.search(name)
        if name in exact or first is None:
            return name
        tries = (NUMBER.sub("*", name), name[: first.end()] + NUMBER.sub("*", name[first.end() :]))
        fitting = (t for t in tries if not any(fnmatchcase(other, t) for other in others))
        return next(fitting, name)

    return tuple(dict.fromkeys(map(glob, own)))
