"""A spec is YAML and *is* the pipeline: a list of passes, each with its options; every mistake is named
by its line."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from fxq.errors import SpecError, choices
from fxq.pipeline.base import Pass
from fxq.pipeline.run import check_order

_KEYS = ("description", "passes")
_DEEPEST = 2
_LARGEST = 1 << 20  # characters
_TAG = "tag:yaml.org,2002:"
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SCALARS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int": lambda text: int(text, 0),
    "float": float,
    "bool": lambda text: _BOOLEANS[text.lower()],
    "null": lambda text: None,
}


@dataclass(frozen=True)
class Spec:
    """A named pipeline."""

    name: str
    description: str
    passes: tuple[Pass, ...]

    def with_flags(self, **flags: object) -> "Spec":
        """The spec with options set in every pass that declares them as `flags`; None leaves one as it is.

        Raises SpecError for a value that the option does not take.
        """
        passes = []
        for step in self.passes:
            hints = typing.get_type_hints(type(step))
            own = {
                name: _checked(value, hints[name], f"{step.name}: {name}")
                for name, value in flags.items()
                if value is not None and name in step.flags
            }
            passes.append(dataclasses.replace(cast(Any, step), **own))
        return dataclasses.replace(self, passes=tuple(passes))

    def as_mapping(self) -> dict[str, Any]:
        """What a YAML file of it would hold: each pass with the options that are not its defaults."""
        listed: list[Any] = []
        for step in self.passes:
            fields = dataclasses.fields(cast(Any, step))
            given = {f.name: getattr(step, f.name) for f in fields if getattr(step, f.name) != f.default}
            plain = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
            listed.append({step.name: plain} if plain else step.name)
        return {"description": self.description, "passes": listed}

    def with_settings(self, settings: Iterable[str]) -> "Spec":
        """The spec with options set as `PASS.OPTION=VALUE` says, in every pass of that name; VALUE is YAML,
        as in a spec.

        Raises SpecError for text of another form, a pass that the spec has not, an option that the pass has
        not, and a value that the option does not take.
        """
        given: dict[str, dict[str, Any]] = {}
        for setting in settings:
            at = "--set " + (setting if len(setting) <= 60 else f"{setting[:57]}...")
            name, option, value = _setting(setting, at)
            step = next((step for step in self.passes if step.name == name), None)
            if step is None:
                has = choices({step.name for step in self.passes})
                raise SpecError(f"{at}: {self.name} has no pass {name!r}; it has: {has}")
            given.setdefault(name, {}).update(_options(type(step), {option: (at, value)}))
        passes = []
        for step in self.passes:
            own = given.get(step.name, {})
            try:  # all at once: some options go together
                passes.append(dataclasses.replace(cast(Any, step), **own))
            except SpecError as error:
                raise SpecError(f"--set {step.name}.{next(iter(own))}: {error}") from error
        return dataclasses.replace(self, passes=tuple(passes))


def dump(spec: Spec) -> str:
    """The YAML of a spec, with the options that are not the defaults."""
    made = spec.as_mapping()
    return yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML without aliases, by which a small file can stand for one without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a spec has no aliases (*name)", problem_mark=mark)
        return super().compose_node(parent, index)


def shipped() -> dict[str, Path]:
    """The specs that come with fxq, by name."""
    folder = Path(__file__).parents[1] / "specs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: "str | Path | Mapping[str, Any] | Spec", table: Mapping[str, type[Pass]]) -> Spec:
    """The shipped spec called `name`, or the YAML file at that path, or what such a file holds as a mapping;
    SpecError names the file, line and choices."""
    if isinstance(name, Spec):
        return name
    if isinstance(name, Mapping):
        return _of_mapping(name, table)
    if not isinstance(name, (str, Path)):
        raise SpecError(
            "spec: expected the name of a shipped spec, a .yaml file or a mapping with "
            f"{choices(_KEYS)}, found {_short(name)}"
        )
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in shipped():
            raise SpecError(
                f"no spec is called {str(name)!r}; there are {choices(shipped())}; or give a .yaml file"
            )
        path = shipped()[str(name)]
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise SpecError(f"{_short(str(path))}: cannot read this spec: {error}") from error
    return parse(
        text,
        table,
        where=str(name) if path.suffix in (".yaml", ".yml") and str(path) == str(name) else path.name,
    )


def _of_mapping(content: Mapping[str, Any], table: Mapping[str, type[Pass]]) -> Spec:
    """The spec that a mapping says; its lines in errors are those that it has as YAML."""
    try:
        text = yaml.safe_dump(_as_lists(content), sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"spec: expected names, numbers, lists and mappings: {str(error)[:100]}") from error
    return parse(text, table, "spec")


def _as_lists(value: Any) -> Any:
    """Without tuples, which YAML does not have, and without one object in two places, which it writes as an
    alias."""
    if isinstance(value, Mapping):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def parse(text: str, table: Mapping[str, type[Pass]], where: str) -> Spec:
    """A spec from YAML text; `where` names it in errors."""
    if len(text) > _LARGEST:
        raise SpecError(f"{where}: expected a spec, found more than {_LARGEST:,} characters")
    try:
        return _parse(text, table, where)
    except RecursionError as error:
        raise SpecError(f"{where}: nested too deeply for a spec") from error


def _parse(text: str, table: Mapping[str, type[Pass]], where: str) -> Spec:
    try:
        tree = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise SpecError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not valid YAML: {type(error).__name__} {str(error)[:100]}") from error
    if not isinstance(tree, yaml.MappingNode) or tree.tag != _TAG + "map":
        line = f":{tree.start_mark.line + 1}" if tree is not None else ""
        raise SpecError(f"{where}{line}: expected a mapping with {choices(_KEYS)}")
    fields = _fields(tree, where)
    for name, (key, _) in fields.items():
        if name not in _KEYS:
            raise SpecError(f"{_at(where, key)}: a spec has no key {name!r}; it has: {choices(_KEYS)}")
    if "passes" not in fields:
        raise SpecError(f"{where}: expected `passes:`, a list of {choices(table)}")
    listed = fields["passes"][1]
    if not isinstance(listed, yaml.SequenceNode) or listed.tag != _TAG + "seq" or not listed.value:
        raise SpecError(f"{_at(where, listed)}: expected `passes:` to be a list of {choices(table)}")
    passes = tuple(_pass(node, table, where) for node in listed.value)
    check_order(passes, [_at(where, node) for node in listed.value])
    description = _scalar(fields["description"][1], where) if "description" in fields else ""
    return Spec(Path(where).stem, description, passes)


def _pass(node: yaml.Node, table: Mapping[str, type[Pass]], where: str) -> Pass:
    options: Mapping[str, tuple[yaml.Node, yaml.Node]] = {}
    name_node = node
    if isinstance(node, yaml.MappingNode):
        if len(node.value) != 1:
            raise SpecError(
                f"{_at(where, node)}: expected one pass an entry, as in `- lower: {{format: modelopt}}`"
            )
        name_node, body = node.value[0]
        if isinstance(body, yaml.MappingNode):
            options = _fields(body, where)
        elif (found := _plain(body, where)) is not None:
            raise SpecError(f"{_at(where, body)}: expected options in braces, found {_short(found)}")
    name = _scalar(name_node, where)
    if name not in table:
        raise SpecError(f"{_at(where, name_node)}: no pass is called {name!r}; there are {choices(table)}")
    cls = table[name]
    given = {option: (_at(where, key), _plain(value, where)) for option, (key, value) in options.items()}
    values: dict[str, Any] = _options(cls, given)
    try:
        return cls(**values)
    except SpecError as error:  # options that do not go together
        raise SpecError(f"{_at(where, name_node)}: {error}") from error


def _options(cls: type[Pass], given: Mapping[str, tuple[str, object]]) -> dict[str, Any]:
    """Options of a pass, checked; each is given as (where, value)."""
    fields, hints = {f.name for f in dataclasses.fields(cast(Any, cls))}, typing.get_type_hints(cls)
    found = {}
    for option, (at, value) in given.items():
        if option not in fields:
            raise SpecError(f"{at}: {cls.name} has no option {option!r}; it has: {choices(fields)}")
        found[option] = _checked(value, hints[option], f"{at}: {cls.name}: {option}")
    return found


def _setting(setting: str, at: str) -> tuple[str, str, object]:
    """(pass, option, value) of `PASS.OPTION=VALUE`."""
    target, equals, text = setting.partition("=")
    name, dot, option = target.strip().rpartition(".")
    if not (equals and dot and name and option):
        raise SpecError(f"{at}: expected PASS.OPTION=VALUE, as in calibrate-max.prefix=quantized")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError(f"{at}: cannot read the value as YAML: {_short(problem)}") from error
    except RecursionError as error:
        raise SpecError(f"{at}: nested too deeply for a value") from error
    if node is None:
        raise SpecError(f"{at}: expected a value after `=`, found nothing (`''` is an empty text)")
    return name, option, _plain(node, at)


def _fields(node: yaml.MappingNode, where: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key -> (key node, value node) of a mapping; a key that stands twice is a mistake."""
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        name = _scalar(key, where)
        if name in found:
            raise SpecError(f"{_at(where, key)}: {name!r} stands here for the second time")
        found[name] = (key, value)
    return found


def _checked(value: object, hint: Any, at: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value is None and "none" in arguments:
            return "none"
        if value not in arguments:
            raise SpecError(f"{at} is one of {', '.join(map(str, arguments))}; found {_short(value)}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise SpecError(f"{at} is a list of texts, such as globs; found {_short(value)}")
        return tuple(items)
    expected = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    takes_float = float in expected and int not in expected
    if takes_float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if takes_float and str not in expected and _is_float(value):
        return float(cast(str, value))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        kinds = ("null" if kind is types.NoneType else kind.__name__ for kind in expected)
        raise SpecError(f"{at} is {' or '.join(kinds)}; found {_short(value)}")
    return value


def _is_float(value: object) -> bool:
    """Whether text is a number, such as 1e-3, which YAML 1.1 takes for text."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) or len(value) < 20 else f"{len(value)} entries"
    return text if len(text) <= 60 else text[:57] + "..."


def _scalar(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _TAG + "str":
        kind = node.tag.removeprefix(_TAG)
        found = _short(node.value) if isinstance(node, yaml.ScalarNode) and kind in _SCALARS else node.tag
        raise SpecError(f"{_at(where, node)}: expected a name, found {found}")
    return str(node.value)


def _plain(node: yaml.Node, where: str, depth: int = 0) -> object:
    """The value of a node of YAML's core types; other tags (`!!python/...`, timestamps) are refused."""
    if depth > _DEEPEST:
        raise SpecError(f"{_at(where, node)}: nested too deeply for a spec")
    kind = node.tag.removeprefix(_TAG)
    try:
        match node:
            case yaml.SequenceNode() if kind == "seq":
                return [_plain(item, where, depth + 1) for item in node.value]
            case yaml.MappingNode() if kind == "map":
                return {_scalar(key, where): _plain(value, where, depth + 1) for key, value in node.value}
            case yaml.ScalarNode() if kind in _SCALARS:
                return _SCALARS[kind](node.value)
    except (ValueError, KeyError) as error:
        raise SpecError(f"{_at(where, node)}: {_short(node.value)} is no {kind}") from error
    raise SpecError(f"{_at(where, node)}: a spec holds text, numbers, lists and mappings; found {node.tag}")


def _at(where: str, node: yaml.Node) -> str:
    return f"{where}:{node.start_mark.line + 1}"
