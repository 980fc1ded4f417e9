"""What a pass is, and what it runs with."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxq.errors import VerifyError
from fxq.graph.hub import WeightSource
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.facts import Fact

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@contextmanager
def no_progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows nothing."""
    yield lambda: None


@dataclass
class Session:
    """What calibration passes run with: where weights come from, the calibration batches, the device.

    batches: int64 [B, S] each, every row a whole sample (no padding); None when only the graph is wanted.
    progress: `with progress(label, total) as step` shows a bar that `step()` advances. found: calibration
    pass -> what it found (`Program.found`); one that is there already is not run again. writes: whether the
    program is written at once, and no pass looks at amaxes before: one that nothing but its own weight needs
    is then left until that is read to be packed.
    """

    source: WeightSource
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: Sequence[Tensor] | None = None
    progress: Progress = field(default_factory=lambda: no_progress)
    found: MutableMapping[str, Any] = field(default_factory=dict)
    writes: bool = False


@runtime_checkable
class Pass(Protocol):
    """One step over a graph: a frozen dataclass whose fields, each with a default, are its YAML options."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Fact, ...]]
    ensures: ClassVar[tuple[Fact, ...]]
    breaks: ClassVar[tuple[Fact, ...]]

    def sites(self, program: Program) -> Iterable[Match | Miss]:
        """Every place the pass looks at: where it fires, and where it does not and why."""
        ...

    def run(self, program: Program) -> int:
        """Rewrite the graph; returns how many rewrites were made."""
        ...


@runtime_checkable
class CalibrationPass(Pass, Protocol):
    """A pass that fills values by interpreting the graph; without a session it leaves the graph as it is."""

    needs_data: ClassVar[bool]

    def calibrate(self, program: Program, session: Session) -> int:
        """Fill `program.values`; returns how many were filled."""
        ...


def nothing_matched(step: Pass, program: Program, expected: str, hint: str = "") -> VerifyError:
    """The error for a pass that the spec asked for and that found nothing, with its near misses."""
    misses = sorted((s for s in step.sites(program) if isinstance(s, Miss)), key=lambda miss: -miss.depth)
    near = "; ".join(f"%{miss.node.name}: {miss.reason}" for miss in misses[:2])
    found = f"near misses: {near}" if near else "no candidate in the graph"
    return VerifyError(f"{step.name} rewrote nothing: expected {expected}, found none; {found}{hint}")
