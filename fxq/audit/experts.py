"""Every expert of a layer is there, with the same projections, quantized alike."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from fxq.audit.checkpoint import Checkpoint
from fxq.audit.findings import Finding
from fxq.audit.fusion import equal
from fxq.audit.store import FLOATS

EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<projection>.+)")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# What engines feed the same tokens: gate and up of all experts; down of all experts.
_SIDES = ({"gate_proj", "up_proj", "w1", "w3"}, {"down_proj", "w2"})


def check(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Each layer's experts, whether they are tensors of their own or one tensor."""
    modules = set(checkpoint.linears) | set(checkpoint.matrices)
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in modules:
        if match := EXPERT.fullmatch(name):
            layers[match["layer"]][int(match["index"])].add(match["projection"])
    for layer, experts in sorted(layers.items()):
        yield from _complete(checkpoint, layer, experts)
        yield from _alike(checkpoint, layer, experts)
    yield from _stacks(checkpoint)


def _complete(checkpoint: Checkpoint, layer: str, experts: dict[int, set[str]]) -> Iterator[Finding]:
    stated = checkpoint.number(*COUNTS)
    wanted = max(experts) + 1
    if stated and wanted not in stated and not any(wanted % count == 0 for count in stated):
        if wanted < max(stated):
            wanted = max(stated)
        else:
            yield Finding(
                "experts-count", layer, f"expected {max(stated)} as config.json says, found {wanted}"
            )
    # What most of them have is what each should have: a projection that two experts have is a stray.
    counts = Counter(projection for found in experts.values() for projection in found)
    projections = {p for p, count in counts.items() if 2 * count >= len(experts)}
    missing = [
        f"{expert}.{projection}"
        for expert in range(wanted)
        for projection in sorted(projections - experts.get(expert, set()))
    ]
    if missing:
        found = f"{len(missing)} of {wanted * len(projections)} are missing"
        yield Finding("experts-incomplete", layer, f"expected {missing[0]}; {found}")


def _alike(checkpoint: Checkpoint, layer: str, experts: dict[int, set[str]]) -> Iterator[Finding]:
    names = [f"{layer}.{e}.{p}" for e in sorted(experts) for p in sorted(experts[e])]
    linears = [name for name in names if name in checkpoint.linears]
    plain = [name for name in names if name in checkpoint.matrices]
    if plain and linears:
        yield Finding(
            "experts-mixed", plain[0], f"expected to be quantized as {len(linears)} others of {layer} are"
        )
    algorithms = {checkpoint.declared.algorithm_of(checkpoint.linears[name]) for name in linears}
    if len({checkpoint.linears[name].kind for name in linears}) > 1 or len(algorithms) > 1:
        yield Finding("experts-mixed", layer, "expected one format for all experts, found several")
    for side in _SIDES:
        members = [name for name in linears if name.rpartition(".")[2] in side]
        yield from equal(checkpoint, members, "input", "experts-input-scale")


def _stacks(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts in one tensor: as many as the config says, counting shared ones that some models append."""
    counts = checkpoint.number(*COUNTS)
    allowed = {*counts, *checkpoint.number(*_SHARED)}
    allowed |= {a + b for a in counts for b in allowed}
    for linear in checkpoint.linears.values():
        entry = checkpoint.store.entries.get(linear.parts["weight"])
        if entry is not None and len(entry.shape) == 3 and counts and entry.shape[0] not in allowed:
            yield Finding(
                "experts-count", linear.parts["weight"], f"expected {max(counts)} experts, found {entry}"
            )
    fused = {n.rpartition(".")[0] for n, linear in checkpoint.linears.items() if linear.fused}
    for name, entry in checkpoint.store.entries.items():
        owner, plain = name.rpartition(".")[0], entry.dtype in FLOATS and len(entry.shape) == 3
        if owner in fused and plain and not name.endswith("bias"):
            yield Finding(
                "experts-mixed", name, "expected to be quantized as the other tensors of its experts"
            )
