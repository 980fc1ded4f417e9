"""A spec is YAML and *is* the pipeline: a list of passes, each with its options; every mistake is named
by its line."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from fxq.errors import SpecError, choices
from fxq.pipeline import Pass, check_order

_KEYS = ("description", "passes")


@dataclass(frozen=True)
class Spec:
    """A named pipeline."""

    name: str
    description: str
    passes: tuple[Pass, ...]


def shipped() -> dict[str, Path]:
    """The specs that come with fxq, by name."""
    folder = Path(__file__).parent / "specs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str | Path, table: Mapping[str, type[Pass]]) -> Spec:
    """The shipped spec called `name`, or the YAML file at that path; SpecError names the file, line and
    choices."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in shipped():
            raise SpecError(
                f"no spec is called {str(name)!r}; there are {choices(shipped())}; or give a .yaml file"
            )
        path = shipped()[str(name)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot read this spec: {error}") from error
    return parse(
        text,
        table,
        where=str(name) if path.suffix in (".yaml", ".yml") and str(path) == str(name) else path.name,
    )


def parse(text: str, table: Mapping[str, type[Pass]], where: str) -> Spec:
    """A spec from YAML text; `where` names it in errors."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise SpecError(f"{where}: expected a mapping with {choices(_KEYS)}")
    fields = {_scalar(key, where): value for key, value in tree.value}
    for key, _ in tree.value:
        if _scalar(key, where) not in _KEYS:
            raise SpecError(
                f"{_at(where, key)}: a spec has no key {_scalar(key, where)!r}; it has: {choices(_KEYS)}"
            )
    listed = fields.get("passes")
    if not isinstance(listed, yaml.SequenceNode) or not listed.value:
        raise SpecError(f"{where}: expected `passes:`, a list of {choices(table)}")
    passes = tuple(_pass(node, table, where) for node in listed.value)
    check_order(passes, where)
    description = _plain(fields["description"], where) if "description" in fields else ""
    return Spec(Path(where).stem, str(description), passes)


def _pass(node: yaml.Node, table: Mapping[str, type[Pass]], where: str) -> Pass:
    options: dict[str, yaml.Node] = {}
    keys: dict[str, yaml.Node] = {}
    name_node = node
    if isinstance(node, yaml.MappingNode):
        if len(node.value) != 1:
            raise SpecError(
                f"{_at(where, node)}: expected one pass an entry, as in `- quantize-experts: "
                f"{{weights: nvfp4}}`"
            )
        name_node, body = node.value[0]
        if isinstance(body, yaml.MappingNode):
            keys = {_scalar(k, where): k for k, _ in body.value}
            options = {_scalar(k, where): v for k, v in body.value}
        elif _plain(body, where) is not None:
            raise SpecError(f"{_at(where, body)}: expected options in braces, found {_plain(body, where)!r}")
    name = _scalar(name_node, where)
    if name not in table:
        raise SpecError(f"{_at(where, name_node)}: no pass is called {name!r}; there are {choices(table)}")
    cls = table[name]
    fields = {f.name for f in dataclasses.fields(cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in fields:
            raise SpecError(
                f"{_at(where, keys[option])}: {name} has no option {option!r}; it has: {choices(fields)}"
            )
        values[option] = _checked(
            _plain(value, where), hints[option], f"{_at(where, value)}: {name}: {option}"
        )
    return cls(**values)


def _checked(value: object, hint: Any, at: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value is None and "none" in arguments:
            return "none"
        if value not in arguments:
            raise SpecError(f"{at} is one of {', '.join(map(str, arguments))}; found {value!r}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise SpecError(f"{at} is a list of globs; found {value!r}")
        return tuple(items)
    expected = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise SpecError(f"{at} is {' or '.join(t.__name__ for t in expected)}; found {value!r}")
    return value


def _scalar(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise SpecError(f"{_at(where, node)}: expected a name")
    return str(node.value)


def _plain(node: yaml.Node, where: str) -> object:
    try:
        loader = yaml.SafeLoader("")
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise SpecError(f"{_at(where, node)}: {' '.join(str(error).split())[:200]}") from error


def _at(where: str, node: yaml.Node) -> str:
    return f"{where}:{node.start_mark.line + 1}"


def options_of(step: Pass) -> Sequence[tuple[str, object]]:
    """(option, value) of a pass, in order of its fields."""
    return [(f.name, getattr(step, f.name)) for f in dataclasses.fields(cast(Any, step))]
