"""Scales of the KV cache: both of every attention or none, declared, positive."""

import math
import re
from collections.abc import Iterator

from fxq.audit.checkpoint import Checkpoint
from fxq.audit.findings import Finding

_SCALE = re.compile(r"(?P<attention>.+?)(\.[kv]_proj)?\.(?P<side>[kv])_scale")
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
_ASIDE = re.compile(r"(^|\.)(mtp|visual|vision\w*|audio\w*)\.")


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """All KV scales, against each other, the attentions that have keys and values, and the configs."""
    entries, declared = checkpoint.store.entries, checkpoint.declared
    found: dict[str, dict[str, str]] = {}
    for name in entries:
        if match := _SCALE.fullmatch(name):
            found.setdefault(match["attention"], {})[match["side"]] = name
    if not found:
        if declared.kv:
            yield Finding("kv-cast", "KV cache", "FP8 is declared, no k_scale or v_scale is stored")
        return
    if not declared.kv:
        first = next(iter(next(iter(found.values())).values()))
        yield Finding("kv-undeclared", first, f"{len(found)} attentions have scales, no config declares FP8")
    attentions = _attentions(checkpoint)
    for attention, sides in found.items():
        for side in "kv":
            if side not in sides:
                other = next(iter(sides.values()))
                yield Finding(
                    "kv-incomplete", f"{attention}.{side}_scale", f"expected beside {other}, found none"
                )
        if attentions and attention not in attentions:
            yield Finding(
                "kv-unknown", next(iter(sides.values())), "expected an attention with keys and values"
            )
        for name in sides.values():
            yield from _value(checkpoint, name)
    for attention in sorted(attentions - set(found)):
        yield Finding("kv-incomplete", attention, f"expected scales as {next(iter(found))} has, found none")


def _value(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    entry = checkpoint.store.entries[name]
    if entry.shape not in ((), (1,)):
        yield Finding("tensor-shape", name, f"expected [] or [1], found {entry}")
        return
    if entry.dtype not in ("F32", "BF16", "F16"):
        yield Finding("tensor-dtype", name, f"expected F32, found {entry}")
        return
    value = checkpoint.store.scalar(name)
    if value is None or not math.isfinite(value) or value <= 0:
        yield Finding("scale-value", name, f"expected a positive finite value, found {value}")


def _attentions(checkpoint: Checkpoint) -> set[str]:
    """Modules with k_proj and v_proj, or one qkv_proj, of the language model's own layers."""
    modules = set(checkpoint.linears) | set(checkpoint.matrices)
    depth = max(checkpoint.number("num_hidden_layers", "n_layer"), default=None)
    made = set()
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        if leaf != "qkv_proj" and not (leaf == "k_proj" and f"{parent}.v_proj" in modules):
            continue
        layer = _LAYER.search(parent)
        extra = layer is not None and depth is not None and int(layer[3]) >= depth
        if not extra and not _ASIDE.search(parent):
            made.add(parent)
    return made
