"""The JSON schema of specs, made from the passes themselves: an option is a field, its choices the field's
type, its description a line of the class's docstring."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, cast

from fxq.pipeline.base import Pass

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-07/schema#"  # the one that editors' YAML servers know best
_KINDS: dict[object, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema(table: Mapping[str, type[Pass]]) -> Schema:
    """What a spec of these passes may hold, as JSON schema (draft 7). The order of passes, and options that
    do not go together, are beyond it: `fxq.pipeline.spec.parse` checks them, and all the rest."""
    passes = {name: _pass(cls) for name, cls in table.items()}
    names = [{"const": name, "description": made["description"]} for name, made in passes.items()]
    with_options = {
        "type": "object",
        "properties": passes,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {
        "$schema": _DRAFT,
        "title": "fxq spec",
        "description": "A pipeline that turns a model into a quantized checkpoint.",
        "type": "object",
        "properties": {
            "description": {"type": "string", "description": "What the spec does, for people."},
            "passes": {
                "type": "array",
                "description": "The passes in the order in which they run.",
                "minItems": 1,
                "items": {"anyOf": [{"oneOf": names}, with_options]},
            },
        },
        "required": ["passes"],
        "additionalProperties": False,
    }


def _pass(cls: type[Pass]) -> Schema:
    hints, (about, texts) = typing.get_type_hints(cls), described(cls)
    options = {
        field.name: {
            "description": texts.get(field.name, ""),
            **_values(hints[field.name]),
            "default": list(field.default) if isinstance(field.default, tuple) else field.default,
        }
        for field in dataclasses.fields(cast(Any, cls))  # every option has a default: see `Pass`
    }
    return {
        "description": about,
        "type": ["object", "null"],
        "properties": options,
        "additionalProperties": False,
    }


def described(cls: type[Pass]) -> tuple[str, dict[str, str]]:
    """(what a pass does, option -> what it means), from its docstring: text, then lines `option: text`."""
    fields = "|".join(field.name for field in dataclasses.fields(cast(Any, cls))) or "(?!)"
    about, *pairs = re.split(rf"^({fields}): ", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    options = {name: _line(text) for name, text in zip(pairs[::2], pairs[1::2], strict=True)}
    return _line(about), options


def _line(text: str) -> str:
    return " ".join(text.split())


def _values(hint: Any) -> Schema:
    """The values that `fxq.pipeline.spec` takes for a field of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": [*arguments, *([None] if "none" in arguments else [])]}
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
    kinds: Iterable[object] = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    return {"type": [_KINDS.get(kind, "null") for kind in kinds] if arguments else _KINDS[hint]}
