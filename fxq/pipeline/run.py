"""A pipeline is a tuple of passes: checked for order before anything is traced, and for truth after each
pass ran."""

from collections.abc import Callable, Iterable, Sequence

from fxq.errors import SpecError, VerifyError
from fxq.graph.edit import tidy
from fxq.graph.program import Program
from fxq.graph.verify import verify
from fxq.pipeline.base import CalibrationPass, Pass, Session
from fxq.pipeline.facts import Fact, amaxes_filled


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
