"""A pass's unit test as a text file: a header, the graph before, and the graph after or the error.

    pass: quantize-linears
    options: {skip: ["*.router"]}
    --- before
    %x : bf16[2,32] = placeholder()
    ...
    --- after
    ...

Header keys (YAML): `pass`; `options`; `rewrites` (how many the pass reports); `hub` (`tensors` as
`name: bf16[2,3]`, `stored`, `names`, `extra`, `modules`, `encodings`); `values` (amax node -> number, known
before); `weights` (parameter -> values, broadcast from the left, else random); `inputs` (placeholder ->
values, else random); `batches` (calibration data: a list of token id batches, which opens a session).
Sections: `before`; `after`, the exact dump, with calibrated values as comments; `error`, a line `Class: part
of the message`, then more parts; `miss`, lines `node: part of the reason`, checked against `sites` of the
graph before.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxq import errors
from fxq.graph import dialect
from fxq.graph.hub import Hub, Part, Stored, TensorInfo, row_axis
from fxq.graph.program import Program
from fxq.graph.text import dump, parse, parse_type
from fxq.passes import PASSES
from fxq.pipeline.base import Pass, Session
from fxq.pipeline.run import run_passes
from fxq.trace import opaque_calls as _opaque_calls  # noqa: F401 (its operator can then be parsed)

FOLDER = Path(__file__).parent
KEYS = {"pass", "options", "rewrites", "hub", "values", "weights", "inputs", "batches"}
SECTIONS = {"before", "after", "error", "miss"}


@dataclass(frozen=True)
class Case:
    """One golden file."""

    path: Path
    header: Mapping[str, Any]
    sections: Mapping[str, str]

    @property
    def id(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def before(self) -> str:
        return self.sections["before"]

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: torch.tensor(float(v)) for name, v in self.header.get("values", {}).items()}

    def step(self) -> Pass:
        """The pass with the case's options."""
        options = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.header.get("options", {}).items()
        }
        return PASSES[self.header["pass"]](**options)

    def program(self, text: str | None = None) -> Program:
        """The program before the pass (or with another graph)."""
        return Program(
            parse(self.before if text is None else text), hub_of(self.header.get("hub", {})), self.values
        )

    def session(self, program: Program) -> Session | None:
        """What the case calibrates with; None unless it gives batches."""
        if "batches" not in self.header:
            return None
        batches = [torch.tensor(batch) for batch in self.header["batches"]]
        return Session(Tensors(self.weights(program)), batches=batches)

    def weights(self, program: Program) -> dict[str, Tensor]:
        """Every parameter of the graph: as the header says, else random but the same in each run."""
        given = self.header.get("weights", {})
        nodes = {str(n.target): n.meta["val"] for n in program.graph.nodes if n.op == "get_attr"}
        return {name: _filled(given.get(name), val, name) for name, val in nodes.items()}

    def inputs(self, program: Program) -> list[Tensor]:
        """A tensor for every placeholder."""
        given = self.header.get("inputs", {})
        nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
        return [_filled(given.get(n.name), n.meta["val"], n.name) for n in nodes]

    def rewrite(self, name: str, text: str) -> None:
        """Replace one section of the file."""
        parts = {**self.sections, name: text}
        head = self.path.read_text(encoding="utf-8").split("--- ", 1)[0]
        body = "".join(f"--- {section}\n{lines.rstrip()}\n" for section, lines in parts.items())
        self.path.write_text(head + body, encoding="utf-8")


@dataclass
class Tensors:
    """A WeightSource over tensors in memory."""

    held: Mapping[str, Tensor]
    hub: Hub = dataclasses.field(default_factory=Hub)

    concurrent: bool = False
    bytes_read: int = 0

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self.held[name] if out is None else out.copy_(self.held[name])

    def read_expert(self, name: str, expert: int, out: Tensor | None = None) -> Tensor:
        return self.held[name][expert] if out is None else out.copy_(self.held[name][expert])

    def read_hub(self, key: str, part: range | None = None) -> Tensor:
        return self.held[key] if part is None else self.held[key][part.start : part.stop]


class Evaluate(Interpreter):
    """Runs a graph on given weights, its values being zeros; with `exact`, roundings and rewrites pass their
    operand through."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor], *, exact: bool = False) -> None:
        super().__init__(nn.Module(), graph=program.graph)
        self.weights, self.exact = weights, exact

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target]

    def run_node(self, n: Node) -> Any:
        if self.exact and (dialect.is_rounding(n) or n.target is dialect.REWRITE):
            return self.env[n.args[0]]  # type: ignore[index]
        if n.target is dialect.VALUE:
            return torch.zeros_like(n.meta["val"], device="cpu")
        return super().run_node(n)


def load(path: Path) -> Case:
    """Read one file; ValueError says what is wrong with it."""
    head, *parts = re.split(r"^--- (\w+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    header = yaml.safe_load(head)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    unknown = (header.keys() - KEYS) | (sections.keys() - SECTIONS)
    if unknown or "pass" not in header or "before" not in sections or len(sections) < 2:
        raise ValueError(
            f"{path}: expected `pass:`, a `before` and an `after`, `error` or `miss`; unknown: {unknown}"
        )
    return Case(path, header, sections)


def all_cases() -> list[Case]:
    """Every golden file, in order."""
    return [load(path) for path in sorted(FOLDER.glob("*/*.fx"))]


def apply(case: Case, program: Program) -> tuple[str, int]:
    """Run the pass as the pipeline does; the dump with calibrated values, and the number of rewrites."""
    counts: list[int] = []
    run_passes(
        [case.step()], program, case.session(program), after=lambda step, stage, count: counts.append(count)
    )
    return dump(program.graph, {name: float(v) for name, v in program.values.items()}), counts[0]


def hub_of(fields: Mapping[str, Any]) -> Hub:
    """A Hub from a header."""
    tensors = {}
    for name, kind in fields.get("tensors", {}).items():
        val = parse_type(kind)
        assert isinstance(val, Tensor)
        tensors[name] = TensorInfo(tuple(val.shape), val.dtype)
    stored = {name: _stored(value, tensors) for name, value in fields.get("stored", {}).items()}
    names = {name: _stored(value, tensors) for name, value in fields.get("names", {}).items()} or stored
    extra, modules = tuple(fields.get("extra", ())), tuple(fields.get("modules", ()))
    return Hub(stored, names, tensors, extra, modules, fields.get("encodings", {}))


def error_class(name: str) -> type[errors.FxqError]:
    """The exception an `error` section names."""
    found = getattr(errors, name)
    assert issubclass(found, errors.FxqError)
    return found  # type: ignore[no-any-return]


def _stored(fields: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Stored:
    """`keys` by part; `rows` by part, a count or [start, stop, step], by default the whole tensor."""
    keys = tuple(map(tuple, fields["keys"]))
    rows = fields.get("rows") or [tensors[part[0]].shape[row_axis(tensors[part[0]].shape)] for part in keys]
    parts = tuple(
        Part(part, range(*r) if isinstance(r, list) else range(r)) for part, r in zip(keys, rows, strict=True)
    )
    return Stored(parts, fields.get("stacked", False), fields.get("transposed", False))


def _filled(given: Any, val: Tensor, name: str) -> Tensor:
    if given is not None:
        told = torch.tensor(given)
        told = told.reshape(*told.shape, *[1] * (val.dim() - told.dim()))
        return told.expand(val.shape).to(val.dtype).clone()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if val.is_floating_point():
        return torch.randn(val.shape, generator=generator).to(val.dtype)
    return torch.randint(0, 2, val.shape, generator=generator).to(val.dtype)
