"""A pipeline is a tuple of passes: checked for order before anything is traced, and for truth after each
pass ran."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxq.edit import tidy
from fxq.errors import SpecError, VerifyError
from fxq.facts import Fact, amaxes_filled
from fxq.pattern import Match, Miss
from fxq.program import Program, WeightSource
from fxq.verify import verify

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


def check_order(passes: Sequence[Pass], places: Sequence[str]) -> None:
    """SpecError unless every fact a pass requires is ensured by an earlier pass and not broken in between.

    places: where each pass stands, for the message.
    """
    held: set[Fact] = set()
    for number, (place, step) in enumerate(zip(places, passes, strict=True), 1):
        for fact in step.requires:
            if fact not in held:
                makers = sorted({p.name for p in passes if fact in p.ensures})
                late = (
                    f"{' or '.join(makers)} ensures it and must come before"
                    if makers
                    else "no pass here ensures it"
                )
                raise SpecError(f"{place}: pass {number}, {step.name}, requires {fact.__name__}; {late}")
        held = (held - set(step.breaks)) | set(step.ensures)


def needs_data(passes: Sequence[Pass]) -> str | None:
    """The name of the first pass that cannot run without calibration data, or None."""
    return next((p.name for p in passes if isinstance(p, CalibrationPass) and p.needs_data), None)


def run(
    passes: Sequence[Pass],
    program: Program,
    session: Session | None = None,
    *,
    after: Callable[[Pass, Program, int], None] = lambda step, program, count: None,
) -> Program:
    """Run each pass, tidy and verify the graph, and hold the pass to what it ensures; `after` sees every
    stage."""
    checked = verify(program.graph)
    for number, step in enumerate(passes, 1):
        _hold(step.requires, step, program, "requires", session)
        if isinstance(step, CalibrationPass):
            count = _calibrate(step, f"{number} {step.name}", program, session)
        else:
            count = step.run(program)
        tidy(program.graph)
        checked = verify(program.graph, checked)
        if session is not None or not isinstance(step, CalibrationPass):
            _hold(step.ensures, step, program, "ensures", session)
        after(step, program, count)
    return program


def _calibrate(step: CalibrationPass, place: str, program: Program, session: Session | None) -> int:
    """Run a calibration pass, or take what it found before the run was interrupted."""
    if session is None:
        return 0
    before = len(program.values.keys() | program.bootstrapped)
    if place in session.found:
        program.restore(session.found[place])
        return len(program.values.keys() | program.bootstrapped) - before
    count = step.calibrate(program, session)
    session.found[place] = program.found()
    return count


def _hold(facts: Iterable[Fact], step: Pass, program: Program, verb: str, session: Session | None) -> None:
    for fact in facts:
        # Values exist only when the pipeline calibrates; a graph-only run has nothing to hold.
        if fact is amaxes_filled and session is None and not program.values:
            continue
        if (reason := fact(program)) is not None:
            raise VerifyError(f"{step.name} {verb} {fact.__name__}: {reason}")


def check_formats(step: Pass, weights: str, inputs: str) -> None:
    """SpecError for a pair of formats that no engine multiplies."""
    if (weights == "fp8") != (inputs == "fp8"):
        raise SpecError(
            f"{step.name}: weights: {weights} and inputs: {inputs} do not go together; "
            "engines know nvfp4 with nvfp4 or none, and fp8 with fp8"
        )


def nothing_matched(step: Pass, program: Program, expected: str, hint: str = "") -> VerifyError:
    """The error for a pass that the spec asked for and that found nothing, with its near misses."""
    misses = sorted((s for s in step.sites(program) if isinstance(s, Miss)), key=lambda miss: -miss.depth)
    near = "; ".join(f"%{miss.node.name}: {miss.reason}" for miss in misses[:2])
    found = f"near misses: {near}" if near else "no candidate in the graph"
    return VerifyError(f"{step.name} rewrote nothing: expected {expected}, found none; {found}{hint}")
