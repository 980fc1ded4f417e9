"""What a pass is, and what it runs with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxq.errors import SpecError, VerifyError
from fxq.graph.hub import WeightSource
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.pipeline.facts import Fact

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda done: None


@dataclass
class Session:
    """What calibration passes run with: where weights come from, the calibration batches, the device.

    batches: int64 [B, S] each, every row a whole sample (no padding); None when only the graph is wanted.
    progress: `with progress(label, total) as step` shows a bar that `step(done)` advances by that much of the
    total, which is in units of its own. found: calibration pass -> what it found (`Program.found`); one that
    is there already is not run again. writes: whether the program is written at once. values_are_read:
    whether a pass after the present one looks at values. place: the calibration pass that runs, or ran last,
    as `found` knows it.
    """

    source: WeightSource
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: Sequence[Tensor] | None = None
    progress: Progress = field(default_factory=lambda: no_progress)
    found: MutableMapping[str, Any] = field(default_factory=dict)
    writes: bool = False
    values_are_read: bool = True
    place: str = ""

    @property
    def is_deferred(self) -> bool:
        """Whether what calibration finds can wait until the program is written, so that one reading of each
        weight serves both: it is written at once, and no pass looks at it before."""
        return self.writes and not self.values_are_read


class Pass:
    """One step over a graph: a frozen dataclass whose fields, each with a default, are its options in a spec.

    A pass that only rewrites gives `name`, `sites` and `rewrite`; one that needs to see all sites at once
    gives `run` instead of `rewrite`. What else a pass is, it declares:

    requires, ensures, breaks: facts that hold before it, that it makes true, and that it may make false.
    flags: options that the command line sets in every pass that has them (`--allow-partial` is `partial`).
    same_function: whether the calls that it makes compute what those did that they replace. A pass that does
    not say so may only round: else the graph would compute what no checkpoint of the model's class can.
    only_values: whether it decides numbers alone, so that names, shapes and formats of the output are the
    same without it. makes_checkpoint: whether what it leaves is a program that the writer runs.
    reads_values: whether it, or what it makes of the graph, looks at what calibration found.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Fact, ...]] = ()
    ensures: ClassVar[tuple[Fact, ...]] = ()
    breaks: ClassVar[tuple[Fact, ...]] = ()
    flags: ClassVar[tuple[str, ...]] = ()
    same_function: ClassVar[bool] = False
    only_values: ClassVar[bool] = False
    makes_checkpoint: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterable[Match | Miss]:
        """Every place the pass looks at: where it fires, and where it does not and why."""
        return ()

    def rewrite(self, site: Match) -> None:
        """Rewrite one place; all sites were found before the first is rewritten."""
        raise NotImplementedError(f"{self.name}: a pass has `rewrite`, or a `run` of its own")

    def run(self, program: Program) -> int:
        """Rewrite the graph; returns how many rewrites were made."""
        matches = [site for site in self.sites(program) if isinstance(site, Match)]
        for site in matches:
            self.rewrite(site)
        return len(matches)

    @classmethod
    def bystander(cls) -> "Pass | None":
        """For a spec without this pass: one that takes nothing, whose misses say why weights stay as they
        are; None if it has nothing to say."""
        return None


class CalibrationPass(Pass):
    """A pass that fills values by running the graph, in `calibrate`. What it changes of the graph before that
    its `run` does, what it changes by what was found its `finish`, with a session or without.

    needs_data: whether it cannot run without calibration batches. can_wait: whether it leaves `calibrate` to
    the writer in a session that is deferred.
    """

    needs_data: ClassVar[bool] = True
    can_wait: ClassVar[bool] = False
    only_values: ClassVar[bool] = True

    def run(self, program: Program) -> int:
        return 0

    def finish(self, program: Program) -> int:
        """Rewrite the graph by what `calibrate` found, or will find; returns how many rewrites were made."""
        return 0

    def calibrate(self, program: Program, session: Session) -> int:
        """Fill `program.values`; returns how many were filled."""
        raise NotImplementedError(f"{self.name}: a calibration pass has `calibrate`")


def check_counts(step: str, **options: int) -> None:
    """SpecError unless all are 0 or more."""
    for name, count in options.items():
        if count < 0:
            raise SpecError(f"{step}: {name} is 0 or more; found {count}")


def bystanders(passes: Iterable[Pass], table: Mapping[str, type[Pass]]) -> list[Pass]:
    """Of the passes in the table that a spec does not use, those that can say why weights stay."""
    used = {type(step) for step in passes}
    found = (cls.bystander() for cls in table.values() if cls not in used)
    return [step for step in found if step is not None]


def nothing_matched(step: Pass, program: Program, expected: str, hint: str = "") -> VerifyError:
    """The error for a pass that the spec asked for and that found nothing, with its near misses."""
    misses = sorted((s for s in step.sites(program) if isinstance(s, Miss)), key=lambda miss: -miss.depth)
    near = "; ".join(f"%{miss.node.name}: {miss.reason}" for miss in misses[:2])
    found = f"near misses: {near}" if near else "no candidate in the graph"
    return VerifyError(f"{step.name} rewrote nothing: expected {expected}, found none; {found}{hint}")
