"""The graph as a page: every stage of the pipeline, folded, to be searched, walked and compared in a browser.

The page holds each distinct line of the stages' dumps once, compressed; a stage is the order of its lines and
how they fold. Everything else (inputs, users, which pass made or changed a node) follows from the lines, and
the page works it out.
"""

import base64
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph

from fxq.graph.text import format_node
from fxq.report.pages import page
from fxq.view.folded import NODE, NUMBER, Fold, folded
from fxq.view.select import select

# A list of nodes is alike whatever its length is made of: experts differ in how many reached a stack.
_LIST = re.compile(r"%(?:, %)+")


@dataclass
class Viewer:
    """Stages of one program, added as the pipeline reaches them; `only` and `cone` narrow each as
    `fxq.view.select.select` does, a stage without the cone's node to nothing."""

    only: str | None = None
    cone: str | None = None
    names: list[str] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    orders: list[list[int]] = field(default_factory=list)
    _keys: dict[str, int] = field(default_factory=dict)
    _key_of: list[int] = field(default_factory=list)

    def add(self, name: str, graph: Graph) -> None:
        """Take down the graph as it is now."""
        nodes = list(graph.nodes)
        if self.cone is not None and self.cone.removeprefix("%") not in {node.name for node in nodes}:
            nodes = []
        elif self.only is not None or self.cone is not None:
            nodes = select(graph, only=self.only, cone=self.cone)
        self.names.append(name)
        self.orders.append([self._line(format_node(node)) for node in nodes])

    def _line(self, text: str) -> int:
        number = self.lines.setdefault(text, len(self.lines))
        if number == len(self._key_of):
            self._key_of.append(self._keys.setdefault(_alike(text), len(self._keys)))
        return number

    def page(self, title: str, *, compared: str | None = None) -> str:
        """The HTML, showing the last stage; with `compared`, and what changed since that one."""
        data = {
            "lines": list(self.lines),
            "stages": [
                {
                    "name": name,
                    "runs": _runs(order),
                    "folds": _shape(folded([self._key_of[i] for i in order])),
                }
                for name, order in zip(self.names, self.orders, strict=True)
            ],
        }
        packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), compresslevel=6, mtime=0)
        content = {"title": title, "compared": compared, "packed": base64.b64encode(packed).decode()}
        return page("viewer", title, content)


def _alike(line: str) -> str:
    """Lines of one kind: without the names of nodes, and without numbers but those of types."""
    head, _, rest = line.partition(" = ")
    return NODE.sub("%", head) + " = " + NUMBER.sub("#", _LIST.sub("%", NODE.sub("%", rest)))


def _runs(order: Sequence[int]) -> list[int]:
    """Line numbers as first, length, first, length, ...: most follow one another."""
    runs: list[int] = []
    for number in order:
        if runs and runs[-2] + runs[-1] == number:
            runs[-1] += 1
        else:
            runs += [number, 1]
    return runs


def _shape(items: Sequence[Fold | int]) -> list[Any]:
    """How lines fold: a number of single lines, or [count, shape] for what repeats."""
    shape: list[Any] = []
    for item in items:
        if isinstance(item, Fold):
            shape.append([item.count, _shape(item.items)])
        elif shape and isinstance(shape[-1], int):
            shape[-1] += 1
        else:
            shape.append(1)
    return shape
