"""A pipeline is a tuple of passes: checked for order before anything is traced, and for truth after each
pass ran."""

from collections.abc import Callable, Iterable, Sequence

from fxq.errors import SpecError, VerifyError
from fxq.graph.edit import tidy
from fxq.graph.pattern import Miss
from fxq.graph.program import Missed, Program
from fxq.graph.structure.matmuls import as_weight_matmul
from fxq.graph.verify import verify
from fxq.pipeline.architecture import architecture, difference
from fxq.pipeline.base import CalibrationPass, Pass, Session
from fxq.pipeline.facts import Fact, amaxes_filled

NOTHING_TO_WRITE = "no pass of the spec makes a checkpoint, such as `- lower`: there is nothing to write"


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


def calibrates_first(passes: Sequence[Pass], *, writes: bool) -> bool:
    """Whether the model is run on text before the last pass: nothing is written at once, or a pass looks at
    what was found."""
    return any(
        isinstance(step, CalibrationPass)
        and step.needs_data
        and not (writes and not any(later.reads_values for later in passes[number:]))
        for number, step in enumerate(passes, 1)
    )


def run_passes(
    passes: Sequence[Pass],
    program: Program,
    session: Session | None = None,
    *,
    beside: Sequence[Pass] = (),
    after: Callable[[Pass, Program, int], None] = lambda step, program, count: None,
) -> Program:
    """Run each pass, tidy and verify the graph, and hold the pass to what it ensures.

    beside: passes that only look at the graph, before the first runs. after: sees every stage, with the
    number of rewrites.
    """
    checked, kept = verify(program.graph), architecture(program.graph)
    for step in beside:
        look(step, program)
    for number, step in enumerate(passes, 1):
        _hold(step.requires, step, program, "requires", session)
        look(step, program)
        count = step.run(program)
        if isinstance(step, CalibrationPass):
            if session is not None:
                session.values_are_read = any(later.reads_values for later in passes[number:])
            tidy(program.graph)
            count += _calibrate(step, f"{number} {step.name}", program, session) + step.finish(program)
        tidy(program.graph)
        checked = verify(program.graph, checked)
        computed = architecture(program.graph)
        if not step.same_function and (found := difference(kept, computed)) is not None:
            raise VerifyError(
                f"{step.name} changes what the graph computes, which a checkpoint of the model's own class "
                "cannot say: expected the traced calls with roundings and rewrites between them, found "
                f"{found}"
            )
        kept = computed
        if session is not None or not isinstance(step, CalibrationPass):
            _hold(step.ensures, step, program, "ensures", session)
        after(step, program, count)
    return program


def look(step: Pass, program: Program) -> None:
    """Keep where a pass does not fire, and why, in `program.misses`."""
    for site in step.sites(program):
        if isinstance(site, Miss):
            matmul = as_weight_matmul(site.node)
            parameter = str(matmul.parameter.target) if matmul is not None else None
            program.misses.append(Missed(step.name, site.node.name, parameter, site.reason, site.decided))


def _calibrate(step: CalibrationPass, place: str, program: Program, session: Session | None) -> int:
    """Run a calibration pass, or take what it found before the run was interrupted."""
    if session is None:
        return 0
    before = len(program.values)
    session.place, program.is_deferred = place, session.is_deferred and step.can_wait
    if place in session.found:
        program.restore(session.found[place])
        return len(program.values) - before
    count = step.calibrate(program, session)
    if program.pending is None:
        session.found[place] = program.found()
    return count


def _hold(facts: Iterable[Fact], step: Pass, program: Program, verb: str, session: Session | None) -> None:
    for fact in facts:
        # Values exist only when the pipeline calibrates; a graph-only run has nothing to hold.
        if fact is amaxes_filled and session is None and not program.values:
            continue
        if (reason := fact(program)) is not None:
            raise VerifyError(f"{step.name} {verb} {fact.__name__}: {reason}")
