"""Patterns over a graph: values that match a node's inputs, bind names, and say why when they do not match.

    BATCHED = Rule("index > bmm", Call(BMM, Call(INDEX, Weight("w", rank=3), Listed(Bind("ids"))), Bind("x")))

Rules compose with `+`; a `Rules` tries each in turn and, if none fires, reports the miss that got furthest.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import Node

from fxq.graph.structure.views import VIEWS, root, shape_of, strip
from fxq.graph.text import format_argument, format_target


@dataclass(frozen=True)
class Match:
    """A rule that fired at `node`; `match["x"]` is what the pattern bound."""

    rule: str
    node: Node
    bound: Mapping[str, Node]

    def __getitem__(self, name: str) -> Node:
        return self.bound[name]


@dataclass(frozen=True)
class Miss:
    """Why nothing fired at `node`. `depth` counts how many parts of the pattern matched before the reason.

    decided: whether this is what the pass is there to take, so that its reason is why the weight stays.
    """

    rule: str
    node: Node
    reason: str
    depth: int = 0
    decided: bool = False

    def __str__(self) -> str:
        return f"%{self.node.name}: {self.rule}: {self.reason}"


class Pattern(Protocol):
    """Anything that can look at a node argument and bind names; returns None, or the reason it does not
    fit."""

    def fit(self, value: object, attempt: "Attempt") -> str | None: ...


@dataclass
class Attempt:
    """The state of one try: what is bound so far, and how far it got."""

    bound: dict[str, Node] = field(default_factory=dict)
    depth: int = 0

    def bind(self, name: str, node: Node) -> str | None:
        if self.bound.setdefault(name, node) is not node:
            return f"`{name}` is both %{self.bound[name].name} and %{node.name}"
        self.depth += 1
        return None


@dataclass(frozen=True)
class Bind:
    """Any node (of the given rank); binds it."""

    name: str
    rank: int | None = None

    def fit(self, value: object, attempt: Attempt) -> str | None:
        if not isinstance(value, Node):
            return f"`{self.name}`: expected a node, found {format_argument(value)}"
        if self.rank is not None and len(shape_of(value)) != self.rank:
            found = f"{list(shape_of(value))} at %{value.name}"
            return f"`{self.name}`: expected {self.rank} dimensions, found {found}"
        return attempt.bind(self.name, value)


@dataclass(frozen=True)
class Weight:
    """A parameter of the given rank, seen through views only; binds the node as it is used."""

    name: str
    rank: int

    def fit(self, value: object, attempt: Attempt) -> str | None:
        if not isinstance(value, Node) or root(value) is None:
            return f"`{self.name}`: expected a parameter, found {format_argument(value)}"
        if len(shape_of(value)) != self.rank:
            found = f"{list(shape_of(value))} at %{value.name}"
            return f"`{self.name}`: expected a {self.rank}-D parameter, found {found}"
        return attempt.bind(self.name, value)


@dataclass(frozen=True)
class Const:
    """One of these literal values."""

    values: tuple[object, ...]

    def fit(self, value: object, attempt: Attempt) -> str | None:
        if isinstance(value, Node) or value not in self.values:
            return f"expected {' or '.join(map(repr, self.values))}, found {format_argument(value)}"
        attempt.depth += 1
        return None


class Listed:
    """A list argument of exactly these items."""

    def __init__(self, *items: Pattern) -> None:
        self.items = items

    def fit(self, value: object, attempt: Attempt) -> str | None:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.items):
            return f"expected a list of {len(self.items)}, found {format_argument(value)}"
        return _all_fit(self.items, value, attempt)


class Call:
    """A call of one of `targets` whose first arguments fit."""

    def __init__(
        self, targets: Callable[..., object] | Iterable[Callable[..., object]], *args: Pattern
    ) -> None:
        self.targets = frozenset(targets) if isinstance(targets, Iterable) else frozenset({targets})
        self.args = args

    def fit(self, value: object, attempt: Attempt) -> str | None:
        wanted = " or ".join(sorted(map(format_target, self.targets)))
        if not isinstance(value, Node):
            return f"expected {wanted}, found {format_argument(value)}"
        if value.op != "call_function" or value.target not in self.targets:
            found = format_target(value.target) if value.op == "call_function" else value.op
            return f"expected {wanted}, found {found} at %{value.name}"
        attempt.depth += 1
        if len(value.args) < len(self.args):
            return (
                f"expected {len(self.args)} arguments of {wanted}, found {len(value.args)} at %{value.name}"
            )
        return _all_fit(self.args, value.args, attempt)


@dataclass(frozen=True)
class PastViews:
    """`inner`, behind any number of views and dtype casts."""

    inner: Pattern

    def fit(self, value: object, attempt: Attempt) -> str | None:
        return self.inner.fit(strip(value, VIEWS) if isinstance(value, Node) else value, attempt)


def _all_fit(patterns: Iterable[Pattern], values: Iterable[object], attempt: Attempt) -> str | None:
    for pattern, value in zip(patterns, values, strict=False):
        if (reason := pattern.fit(value, attempt)) is not None:
            return reason
    return None


@dataclass(frozen=True)
class Rule:
    """A named pattern; the name is what matches and misses are reported under."""

    name: str
    pattern: Pattern

    def match(self, node: Node) -> Match | Miss:
        attempt = Attempt()
        reason = self.pattern.fit(node, attempt)
        if reason is None:
            return Match(self.name, node, attempt.bound)
        return Miss(self.name, node, reason, attempt.depth)

    def __add__(self, other: "Rule | Rules") -> "Rules":
        return Rules((self,)) + other


@dataclass(frozen=True)
class Rules:
    """Rules in order of preference."""

    rules: tuple[Rule, ...]

    def __add__(self, other: "Rule | Rules") -> "Rules":
        return Rules(self.rules + (other.rules if isinstance(other, Rules) else (other,)))

    def match(self, node: Node) -> Match | Miss:
        """The first rule that fires, else the deepest miss."""
        misses = []
        for rule in self.rules:
            result = rule.match(node)
            if isinstance(result, Match):
                return result
            misses.append(result)
        return max(misses, key=lambda miss: miss.depth)
