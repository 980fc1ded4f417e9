"""What a lowered program quantizes, which of it shares scales, and what stays as it is and why."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch.fx import Graph, Node

from fxq.checkpoint.plan import Plan
from fxq.graph import dialect
from fxq.graph.arguments import node_at
from fxq.graph.program import Program
from fxq.graph.structure.experts import is_expert, multiplies_experts
from fxq.graph.structure.matmuls import as_weight_matmul
from fxq.graph.structure.views import PICKS, SAME_PLACE, is_opaque_call, of_the_model, shape_of
from fxq.graph.text import format_target
from fxq.report.summary import fold, fold_among

_ATEN = torch.ops.aten
_UNREAD = "the text path never reads it"


def _stores(lowered: Graph) -> Iterator[tuple[str, int, Node]]:
    """(tensor of the checkpoint, expert of it, packed weight) of every quantized weight."""
    for node in lowered.nodes:
        if node.target is dialect.STORE_LINEAR:
            yield f"{node.args[0]}.weight", 0, node_at(node, 1)
        elif node.target is dialect.STORE_ROWS:
            yield str(node.args[0]), int(str(node.kwargs["expert"])), node_at(node, 1)


def expert_tensors(lowered: Graph) -> set[str]:
    return {key for key, _, packed in _stores(lowered) if is_expert(node_at(packed, 0))}


def groups(lowered: Graph) -> Iterator[tuple[str, int]]:
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


def excluded(program: Program, planned: Plan) -> list[tuple[str, int, str]]:
    """(names, how many, why) of what is not quantized, alike names folded, with their numbers unless all
    such are meant; matrices before vectors."""
    misses = program.why_left()
    owners: dict[str, list[str]] = {}
    for name, stored in program.hub.stored.items():
        for key in (key for keys in stored.keys for key in keys):
            owners.setdefault(key, []).append(name)
    assert program.calibrated is not None
    read = {str(n.target): n for n in program.calibrated.nodes if n.op == "get_attr"}
    used = of_the_model(program.calibrated)
    why: dict[str, str] = dict.fromkeys(planned.infos, "")
    for node in program.graph.nodes:
        if node.target is dialect.STORE:
            key = str(node.args[0])
            if key.removesuffix(".weight") in program.untied:
                why[key] = "untied: its tensor is shared in the source"
            else:
                why[key] = _reason(owners.get(key, []), read, used, program.left, misses)
            if node_at(node, 1).target is not dialect.LOAD:
                why[key] += "; rewritten by a pass"
    whole = _whole_modules(why)
    everything = [key.removesuffix(".weight") for key in (*why, *program.hub.tensors)]
    everything += [f"{owner}.*" for key in dict.fromkeys(everything) for owner in _owners(key)]
    rows: dict[tuple[str, str], list[str]] = {}
    for key in sorted(why, key=lambda key: len(planned.infos[key].shape) < 2):
        if why[key]:
            name = whole.get(key, key).removesuffix(".weight")
            rows.setdefault((fold([name])[0][0], fold([why[key]])[0][0]), []).append(name)
    return [(fold_among(names, everything)[0][0], len(names), reason) for (_, reason), names in rows.items()]


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


def _reason(
    names: Sequence[str],
    read: dict[str, Node],
    used: Container[Node],
    left: dict[str, str],
    misses: Mapping[str, str],
) -> str:
    """Why a tensor of the checkpoint, which holds the given parameters, is not quantized."""
    if not names:
        return "not part of the model's class: carried through"
    if (name := next((name for name in names if name in read or name in left), None)) is None:
        return _UNREAD
    if name not in read:
        return left[name]
    readers = [reader for reader in _readers(read[name]) if reader in used]
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
    if (call := next((r for r in readers if is_opaque_call(r)), None)) is not None:
        return f"inside the opaque call {str(call.args[0]).partition(':')[2]}"
    matmuls = [matmul for reader in readers if (matmul := as_weight_matmul(reader)) is not None]
    if any(map(multiplies_experts, matmuls)):
        return "experts, and no pass of the spec quantizes experts"
    return f"read by {format_target(readers[0].target)}, which is no linear" if readers else _UNREAD


def _readers(parameter: Node) -> Iterator[Node]:
    """What uses a parameter, past views, picks and rewrites of it."""
    stack = [(parameter, user) for user in parameter.users]
    while stack:
        source, node = stack.pop()
        stands = node.target in SAME_PLACE or node.target in PICKS
        if stands and node_at(node, 0) is source:
            stack += [(node, user) for user in node.users]
        else:
            yield node


# Tokens of calibration with fewer of which a warning is due.
FEW_TOKENS = 1024


def doubts_of_text(found: int, samples: int | None, tokens: int) -> Iterator[str]:
    """What the user should know of the text that a model is calibrated on: samples found and asked for, if a
    number was given, and their tokens."""
    if samples is not None and found < samples:
        yield f"{samples} samples were asked for, the text has {found}"
    if tokens < FEW_TOKENS:
        yield (
            f"{tokens} tokens show little of what inputs are, and larger ones are clipped while "
            f"serving; expected {FEW_TOKENS:,} or more"
        )
