"""What a spec would do to a model, from its structure and the headers of its files: no weight is read.

The passes run without calibrating, and the output is planned as the writer plans it, so sizes are exact.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fxq import dialect, pipeline
from fxq.checkpoint import FORMATS
from fxq.compiler import Model
from fxq.errors import FxqError
from fxq.nodes import node_at
from fxq.output import nbytes
from fxq.passes import PASSES
from fxq.pattern import Miss
from fxq.pipeline import Pass, needs_data
from fxq.plan import Plan, plan
from fxq.program import Program
from fxq.report import fold, unquantized
from fxq.spec import Spec
from fxq.structure import PICKS, VIEWS, as_weight_matmul, is_expert, multiplies_experts, shape_of
from fxq.text import format_target

_ATEN = torch.ops.aten
_LINEARS = "quantize-linears"
_UNASKED = "no pass of the spec quantizes linears"


@dataclass(frozen=True)
class Preview:
    """What a spec would do to a model.

    refused: why the spec does not apply; everything else is empty then. needs_data: whether calibration data
    is needed. experts, linears: quantized tensors of the checkpoint. groups: (names of the linears that share
    their global scales, how many such sets). excluded: (name, how many, why) of what stays as it is; `*` is a
    number in a name, or at its end all of a module. kv_cache: how keys and values are held. *_bytes: of all
    tensors, without headers.
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


def preview(model: Model, spec: Spec) -> Preview:
    """What `spec` would do to `model`; raises as `fxq.compile` would before it calibrates."""
    program = dataclasses.replace(
        model.program, graph=copy.deepcopy(model.program.graph), values={}, notes=[], left={}
    )
    reasons = _run(program, spec)
    source = sum(nbytes(info) for info in program.hub.tensors.values())
    weights = sum(nbytes(info) // info.dtype.itemsize for info in program.hub.tensors.values())
    made = Preview(
        spec.name,
        spec.description,
        needs_data=needs_data(spec.passes) is not None,
        source_bytes=source,
        source_bits_per_weight=8 * source / weights,
        warnings=tuple(program.notes),
    )
    if program.calibrated is None:
        note = "the spec has no `lower` pass: nothing would be written"
        return dataclasses.replace(made, warnings=(*made.warnings, note))
    planned = plan(program, FORMATS[program.format])
    output = sum(nbytes(info) for info in planned.infos.values())
    experts = _expert_tensors(program.graph)
    return dataclasses.replace(
        made,
        experts=len(experts),
        linears=len(planned.linears) - len(experts),
        groups=tuple(_groups(program.graph)),
        excluded=tuple(_excluded(program, planned, reasons)),
        kv_cache=_kv_cache(program.graph),
        output_bytes=output,
        bits_per_weight=8 * output / weights,
        warnings=(*made.warnings, *unquantized(program.calibrated, program)),
    )


def previews(model: Model, specs: Iterable[Spec]) -> Iterator[Preview]:
    """A preview a spec, that of one that does not apply with the reason.

    Calibration changes no name and no size, so specs that differ in it alone are planned once.
    """
    made: dict[tuple[Pass, ...], Preview] = {}
    for spec in specs:
        key = tuple(step for step in spec.passes if not step.name.startswith("calibrate-"))
        if key not in made:
            try:
                made[key] = preview(model, spec)
            except FxqError as error:
                made[key] = Preview(spec.name, spec.description, refused=str(error))
        yield dataclasses.replace(
            made[key],
            spec=spec.name,
            description=spec.description,
            needs_data=needs_data(spec.passes) is not None,
        )


def _run(program: Program, spec: Spec) -> dict[str, str]:
    """Run the passes without calibrating; parameter -> why quantize-linears left it when its turn came."""
    reasons: dict[str, str] = {}
    coming = list(spec.passes)
    if all(step.name != _LINEARS for step in coming):
        reasons = _misses(PASSES[_LINEARS](only=()), program)  # type: ignore[call-arg]

    def look(done: Pass | None, program: Program, count: int = 0) -> None:
        step = coming.pop(0) if coming else None
        if step is not None and step.name == _LINEARS:
            reasons.update(_misses(step, program))

    look(None, program)
    pipeline.run(spec.passes, program, after=look)
    return reasons


def _misses(step: Pass, program: Program) -> dict[str, str]:
    """Parameter -> why quantize-linears leaves it."""
    found: dict[str, str] = {}
    for site in step.sites(program):
        matmul = as_weight_matmul(site.node)
        if isinstance(site, Miss) and matmul is not None:
            unasked = site.reason.startswith("not selected by only=[],")
            found[str(matmul.parameter.target)] = _UNASKED if unasked else site.reason
    return found


def _stores(lowered: Graph) -> Iterator[tuple[str, int, Node]]:
    """(tensor of the checkpoint, expert of it, packed weight) of every quantized weight."""
    for node in lowered.nodes:
        if node.target is dialect.STORE_LINEAR:
            yield f"{node.args[0]}.weight", 0, node_at(node, 1)
        elif node.target is dialect.STORE_ROWS:
            yield str(node.args[0]), int(str(node.kwargs["expert"])), node_at(node, 1)


def _expert_tensors(lowered: Graph) -> set[str]:
    return {key for key, _, packed in _stores(lowered) if is_expert(node_at(packed, 0))}


def _groups(lowered: Graph) -> Iterator[tuple[str, int]]:
    """Sets of two or more weights with one global scale, alike ones counted."""
    members: dict[Node, dict[tuple[str, int], None]] = {}
    for key, expert, packed in _stores(lowered):
        members.setdefault(node_at(packed, 1), {})[key, expert] = None
    labels = [_label(list(group)) for group in members.values() if len(group) > 1]
    return iter(Counter(labels).items())


def _label(group: Sequence[tuple[str, int]]) -> str:
    """`model.layers.*.self_attn.{q_proj,k_proj,v_proj}`: where alike names differ."""
    names = [name.removesuffix(".weight") for name, _ in fold(key for key, _ in group)]
    owners = {name.rpartition(".")[0] for name in names}
    label = ", ".join(names)
    if len(names) > 1 and len(owners) == 1 and owners != {""}:
        label = f"{owners.pop()}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
    experts = max(expert for _, expert in group) + 1
    return f"{label} (all {experts} experts)" if experts > 1 else label


def _excluded(program: Program, planned: Plan, misses: dict[str, str]) -> list[tuple[str, int, str]]:
    """What stays as it is, folded, matrices before vectors."""
    owners: dict[str, list[str]] = {}
    for name, stored in program.hub.stored.items():
        for key in (key for keys in stored.keys for key in keys):
            owners.setdefault(key, []).append(name)
    assert program.calibrated is not None
    read = {str(n.target): n for n in program.calibrated.nodes if n.op == "get_attr"}
    why: dict[str, str] = dict.fromkeys(planned.infos, "")
    for node in program.graph.nodes:
        if node.target is dialect.STORE:
            key = str(node.args[0])
            why[key] = _reason(owners.get(key, []), read, program.left, misses)
    whole = _whole_modules(why)
    rows: dict[tuple[str, str], int] = {}
    for key in sorted(why, key=lambda key: len(planned.infos[key].shape) < 2):
        if why[key]:
            ((name, _),), ((reason, _),) = (
                fold([whole.get(key, key).removesuffix(".weight")]),
                fold([why[key]]),
            )
            rows[name, reason] = rows.get((name, reason), 0) + 1
    return [(name, count, reason) for (name, reason), count in rows.items()]


def _whole_modules(why: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> `module.*`, of the outermost module whose tensors, more than two, stay for one reason."""
    inside: dict[str, Counter[str]] = {}
    for key, reason in why.items():
        for owner in _owners(key):
            inside.setdefault(owner, Counter())[reason] += 1
    whole: dict[str, str] = {}
    for key in why:
        alone = [owner for owner in _owners(key) if len(inside[owner]) == 1 and inside[owner].total() > 2]
        if alone:
            whole[key] = f"{alone[0]}.*"
    return whole


def _owners(key: str) -> list[str]:
    """The modules around a tensor, the outermost first; without numbers at their end, which lists have."""
    words = key.split(".")
    return [".".join(words[:end]) for end in range(1, len(words)) if not words[end - 1].isdigit()]


def _reason(names: Sequence[str], read: dict[str, Node], left: dict[str, str], misses: dict[str, str]) -> str:
    """Why a tensor of the checkpoint, which holds the given parameters, stays as it is."""
    if not names:
        return "not part of the model's class: carried through"
    if (name := next((name for name in names if name in read or name in left), None)) is None:
        return "the text path never reads it"
    if name not in read:
        return left[name]
    readers = list(_readers(read[name]))
    is_table = any(reader.target is _ATEN.embedding.default for reader in readers)
    known = left.get(name) or misses.get(name)
    if known is not None:
        return f"an embedding, and {known}" if is_table else known
    if is_table:
        return "an embedding"
    if len(shape_of(read[name])) < 2:
        return "a vector: norm, bias or scale"
    if any("conv" in str(reader.target) for reader in readers):
        return "a convolution"
    if (leaf := next((r for r in readers if r.target is dialect.LEAF), None)) is not None:
        return f"inside the opaque call {str(leaf.args[0]).partition(':')[2]}"
    matmuls = [matmul for reader in readers if (matmul := as_weight_matmul(reader)) is not None]
    if any(map(multiplies_experts, matmuls)):
        return "experts, and no pass of the spec quantizes experts"
    return f"read by {format_target(readers[0].target)}, which is no linear"


def _readers(parameter: Node) -> Iterator[Node]:
    """What uses a parameter, past views and picks of it."""
    stack = list(parameter.users)
    while stack:
        node = stack.pop()
        if node.target in VIEWS or node.target in PICKS:
            stack += node.users
        else:
            yield node


def _kv_cache(lowered: Graph) -> str:
    caches = [node for node in lowered.nodes if node.target is dialect.STORE_KV]
    if not caches:
        return "not quantized"
    calibrated = sum(1 for node in caches if node.args[1] is not None)
    scales = "calibrated" if calibrated == len(caches) else "1.0" if not calibrated else "calibrated and 1.0"
    return f"{caches[0].kwargs['format']}, {len(caches)} attentions, scales {scales}"
