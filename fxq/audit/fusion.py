"""Linears that engines merge into one must have been quantized as one.

The table is the engines' own (what vLLM, SGLang and TensorRT-LLM stack when they load), not a guess at the
model's structure: only linears that an engine merges by name can go wrong this way.
"""

from collections.abc import Iterator, Sequence
from functools import cache

from fxq.audit.checkpoint import Checkpoint
from fxq.audit.findings import Finding

# Members -> the merged module's name in vLLM. A model has one line's names in a module, never two lines'.
FUSED: dict[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("wq", "wk", "wv"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "w13",
    ("c_fc_0", "c_fc_1"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
}


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Members of a group: all quantized or none, with one global weight scale and one input scale."""
    quantized = {name for name, linear in checkpoint.linears.items() if not linear.fused}
    for group in groups(quantized | set(checkpoint.matrices)):
        members = [name for name in group if name in quantized]
        if 0 < len(members) < len(group):
            plain = next(name for name in group if name not in quantized)
            yield Finding(
                "group-partial", plain, f"expected to be quantized as {members[0]} is, found it is not"
            )
        kinds = {checkpoint.linears[name].kind for name in members}
        algorithms = {checkpoint.declared.algorithm_of(checkpoint.linears[name]) for name in members}
        if len(kinds) > 1 or len(algorithms) > 1:
            found = ", ".join(f"{name} {checkpoint.linears[name].kind}" for name in members)
            yield Finding("group-partial", members[0], f"expected one format for all, found {found}")
            continue
        yield from equal(checkpoint, members, "global", "group-weight-scale")
        yield from equal(checkpoint, members, "input", "group-input-scale")


def equal(checkpoint: Checkpoint, members: Sequence[str], role: str, rule: str) -> Iterator[Finding]:
    """A finding if a scale of these linears is not one value, to the bit; those without it do not count."""
    found: dict[float, str] = {}
    for member in members:
        name = checkpoint.linears[member].parts.get(role, "")
        value = checkpoint.store.scalar(name)
        if value is not None:
            found.setdefault(value, name)
    if len(found) > 1:
        (first, name), (second, other) = list(found.items())[:2]
        more = f" ({len(found)} different values)" if len(found) > 2 else ""
        yield Finding(rule, other, f"expected {first:.9g} as {name} has, found {second:.9g}{more}")


def groups(modules: set[str]) -> Iterator[list[str]]:
    """Sets of two or more present linears that engines merge, in the order of the table."""
    parents = sorted({name.rpartition(".")[0] for name in modules})
    for parent in parents:
        for members in FUSED:
            present = [name for m in members if (name := f"{parent}.{m}" if parent else m) in modules]
            if len(present) > 1:
                yield present


@cache
def _table() -> dict[str, tuple[tuple[str, ...], str]]:
    return {member: (members, fused) for members, fused in FUSED.items() for member in members}


def merged_name(name: str, modules: set[str]) -> str:
    """vLLM's name for a linear: that of the merged module if a sibling is among `modules`, and
    `....experts` for one of an expert."""
    parent, _, leaf = name.rpartition(".")
    parts = name.split(".")
    for i in range(len(parts) - 2, 0, -1):
        if parts[i].isdigit() and parts[i - 1] == "experts":
            return ".".join(parts[:i])
    members, fused = _table().get(leaf, ((), leaf))
    if sum(f"{parent}.{m}" in modules for m in members) > 1:
        return f"{parent}.{fused}"
    return name
