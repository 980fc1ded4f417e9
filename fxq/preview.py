"""What a spec would do to a model, from its structure and the headers of its files: no weight is read.

The passes run without calibrating, and the output is planned as the writer plans it, so sizes are exact.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch.fx import Graph

from fxq.checkpoint.plan import plan
from fxq.checkpoint.writer import FORMATS
from fxq.errors import FxqError
from fxq.graph import dialect
from fxq.graph.hub import natural_order
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import weight_matmuls
from fxq.model import Model
from fxq.passes import PASSES
from fxq.pipeline.base import Pass, bystanders
from fxq.pipeline.run import NOTHING_TO_WRITE, needs_data, run_passes
from fxq.pipeline.spec import Spec
from fxq.report.reasons import excluded, expert_tensors, groups
from fxq.report.summary import fold_among, unquantized


@dataclass(frozen=True)
class Preview:
    """What a spec would do to a model.

    refused: why the spec does not apply; everything else is empty then. needs_data: whether calibration data
    is needed. experts, linears: quantized tensors of the checkpoint. groups: (names of the linears that share
    their global scales, how many such sets). excluded: (name, how many, why) of what stays as it is; `*`
    is any number in a name, `{0,29}` one of these, and `*` at its end all of a module. kv_cache: how keys and
    values are held. *_bytes: of all tensors, without headers.
    bits_per_weight: of the output, source_bits_per_weight of the source, by the source's numbers.
    """

    spec: str
    description: str
    refused: str | None = None
    needs_data: bool = False
    experts: int = 0
    linears: int = 0
    groups: tuple[tuple[str, int], ...] = ()
    excluded: tuple[tuple[str, int, str], ...] = ()
    kv_cache: str = "not quantized"
    source_bytes: int = 0
    output_bytes: int = 0
    bits_per_weight: float = 0.0
    source_bits_per_weight: float = 0.0
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        plain = dataclasses.asdict(self)
        plain["groups"] = [{"linears": name, "count": count} for name, count in self.groups]
        plain["excluded"] = [{"name": n, "count": count, "reason": why} for n, count, why in self.excluded]
        return plain


def preview(model: Model, spec: Spec, known: Mapping[str, type[Pass]] = PASSES) -> Preview:
    """What `spec` would do to `model`; raises as `fxq.compile` would before it calibrates.

    known: every pass by name; those that the spec does not use may say why weights stay.
    """
    program = uncalibrated(model.program, spec, known)
    source = sum(info.nbytes for info in program.hub.tensors.values())
    weights = sum(info.nbytes // info.dtype.itemsize for info in program.hub.tensors.values())
    made = Preview(
        spec.name,
        spec.description,
        needs_data=needs_data(spec.passes) is not None,
        source_bytes=source,
        source_bits_per_weight=8 * source / weights,
        warnings=tuple(program.notes),
    )
    if program.calibrated is None:
        return dataclasses.replace(made, warnings=(*made.warnings, NOTHING_TO_WRITE))
    planned = plan(program, FORMATS[program.format])
    output = sum(info.nbytes for info in planned.infos.values())
    experts = expert_tensors(program.graph)
    return dataclasses.replace(
        made,
        experts=len(experts),
        linears=len(planned.linears) - len(experts),
        groups=tuple(groups(program.graph)),
        excluded=tuple(excluded(program, planned)),
        kv_cache=_kv_cache(program.graph),
        output_bytes=output,
        bits_per_weight=8 * output / weights,
        warnings=(*made.warnings, *unquantized(program.calibrated, program)),
    )


@dataclass(frozen=True)
class Hits:
    """What a glob of a spec fits: names of linears, folded, how many of each."""

    step: str
    option: str
    glob: str
    names: tuple[tuple[str, int], ...]


def hits(model: Model, spec: Spec) -> Iterator[Hits]:
    """What each glob of a spec fits among the model's linears, whether or not they are taken in the end."""
    modules = [
        str(matmul.parameter.target).removesuffix(".weight") for matmul in weight_matmuls(model.program.graph)
    ]
    modules = sorted(dict.fromkeys(modules), key=natural_order)
    for step in spec.passes:
        for field in dataclasses.fields(cast(Any, step)):
            value = getattr(step, field.name)
            for glob in value if isinstance(value, tuple) else ():
                fitting = [module for module in modules if fnmatchcase(module, glob)]
                yield Hits(step.name, field.name, glob, tuple(fold_among(fitting, modules)))


def uncalibrated(traced: Program, spec: Spec, known: Mapping[str, type[Pass]] = PASSES) -> Program:
    """A copy of a traced program after the passes, with nothing calibrated."""
    program = Program(
        copy.deepcopy(traced.graph), traced.hub, constants=traced.constants, accepts=traced.accepts
    )
    return run_passes(spec.passes, program, beside=bystanders(spec.passes, known))


def previews(
    model: Model, specs: Iterable[Spec], known: Mapping[str, type[Pass]] = PASSES
) -> Iterator[Preview]:
    """A preview a spec, that of one that does not apply with the reason.

    Calibration changes no name and no size, so specs that differ in it alone are planned once.
    """
    made: dict[tuple[Pass, ...], Preview] = {}
    for spec in specs:
        key = tuple(step for step in spec.passes if not step.only_values)
        if key not in made:
            try:
                made[key] = preview(model, spec, known)
            except FxqError as error:
                made[key] = Preview(spec.name, spec.description, refused=str(error))
        yield dataclasses.replace(
            made[key],
            spec=spec.name,
            description=spec.description,
            needs_data=needs_data(spec.passes) is not None,
        )


def _kv_cache(lowered: Graph) -> str:
    caches = [node for node in lowered.nodes if node.target is dialect.STORE_KV]
    if not caches:
        return "not quantized"
    calibrated = sum(1 for node in caches if node.args[1] is not None)
    scales = "calibrated" if calibrated == len(caches) else "1.0" if not calibrated else "calibrated and 1.0"
    return f"{caches[0].kwargs['format']}, {len(caches)} attentions, scales {scales}"
