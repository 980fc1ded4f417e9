"""quantize-experts: one quantize node per expert slice, and one per projection input; every expert or an
error."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.errors import SpecError, VerifyError
from fxq.graph import dialect, edit
from fxq.graph.arguments import int_at, joined, node_at, nodes_at
from fxq.graph.hub import NUMBER, Hub
from fxq.graph.layers import outer_layers
from fxq.graph.pattern import Bind, Call, Match, Miss, Rule, Weight
from fxq.graph.places import named
from fxq.graph.program import Program
from fxq.graph.structure.experts import PICKED, expert_lists, is_expert, multiplies_experts
from fxq.graph.structure.matmuls import Frontiers, WeightMatmul, weight_matmuls
from fxq.graph.structure.views import (
    VIEWS,
    is_opaque_call,
    is_quantized,
    parameter_name,
    shape_of,
    strip,
)
from fxq.numbers.formats import FORMATS, Format, InputFormat, WeightFormat, check_pair
from fxq.pipeline.base import Pass, check_counts, nothing_matched
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared, experts_fused, holders, is_weight_quantize

EXPERTS = Rule(
    "expert_linear", Call(dialect.EXPERT_LINEAR, Bind("x", rank=2), Weight("w", rank=3), Bind("ids"))
)
ONE_EXPERT = Rule(
    "linear of a slice",
    Call(torch.ops.aten.linear.default, Bind("x"), Call(dialect.SLICE, Weight("w", rank=3))),
)
RULES = EXPERTS + ONE_EXPERT
# An expert that is a linear of its own: by data flow, one of several that a router sends tokens to.
LISTED = Rule("linear of an expert", Call(torch.ops.aten.linear.default, Bind("x"), Weight("w", rank=2)))


@dataclass(frozen=True)
class QuantizeExperts(Pass):
    """Quantize every slice of every fused expert weight (2 x experts nodes in a gated layer), every linear
    to which a router sends tokens as it does to others, and what they multiply.

    weights: their format.
    inputs: the activations' format, or none for weight-only; fp8 goes with fp8 alone.
    stored: in what the source holds the experts that are taken, such as MXFP4; empty takes any.
    only: globs over the names of stacks of experts (`*.layers.3.*`); a layer's are taken if one fits all.
    skip: globs over the same; a layer of which one fits all is not taken, whatever `only` says.
    skip_first: so many layers at the front are left as they are.
    skip_last: so many layers at the end are left as they are.
    required: whether a model without experts is an error.
    partial: leave a layer whose experts cannot be quantized, instead of failing.
    """

    weights: WeightFormat = "nvfp4"
    inputs: InputFormat = "nvfp4"
    stored: tuple[str, ...] = ()
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    skip_first: int = 0
    skip_last: int = 0
    required: bool = True
    partial: bool = False

    name: ClassVar[str] = "quantize-experts"
    requires: ClassVar[tuple[Fact, ...]] = (experts_fused,)
    breaks: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)
    flags: ClassVar[tuple[str, ...]] = ("partial",)

    def __post_init__(self) -> None:
        check_pair(self.weights, self.inputs, self.name)
        check_counts(self.name, skip_first=self.skip_first, skip_last=self.skip_last)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by a parameter; those that are no experts, or had to be left, miss."""
        listed = {m.node for m in _listed(program)}
        matmuls = list(weight_matmuls(program.graph))
        names = (str(m.parameter.target) for m in matmuls)
        outer = outer_layers(names, self.skip_first, self.skip_last)
        for matmul in matmuls:
            if is_quantized(matmul.w):
                continue
            if (reason := outer.get(str(matmul.parameter.target))) is not None:
                yield Miss(EXPERTS.name, matmul.node, reason, depth=9, decided=True)
                continue
            if (reason := program.left.get(str(matmul.parameter.target))) is not None:
                yield Miss(EXPERTS.name, matmul.node, reason, depth=9)
                continue
            site = (LISTED if matmul.node in listed else RULES).match(matmul.node)
            if isinstance(site, Match) and (reason := self._left_out(site, matmul, program)) is not None:
                yield Miss(EXPERTS.name, matmul.node, reason, depth=3, decided=True)
            else:
                yield site

    def _left_out(self, site: Match, matmul: WeightMatmul, program: Program) -> str | None:
        """Why experts that could be quantized are not meant by the options."""
        if not self._wanted(parameter_name(site["w"])):
            return f"not selected by only={list(self.only)}, skip={list(self.skip)}"
        held = program.hub.encoding_of(str(matmul.parameter.target))
        if self.stored and held not in self.stored:
            return f"the source holds it in {held or 'plain numbers'}, not in {' or '.join(self.stored)}"
        return None

    def run(self, program: Program) -> int:
        self._check_globs(program)
        self._leave(program)
        matches = [site for site in self.sites(program) if isinstance(site, Match)]
        already = any(is_weight_quantize(n) and is_expert(node_at(n, 0)) for n in program.graph.nodes)
        already |= any(is_quantized(m.w) for m in _listed(program))
        if not matches and self.required and not already:
            expected = (
                "stacks of expert weights (a 3-D parameter in a matmul), or linears that a router chooses"
            )
            raise nothing_matched(self, program, expected, f". {_instead(program)}")
        count, made = 0, dict[Node, Node]()
        for site in matches:
            count += _quantized_slices(site, self.weights, made)
            if self.inputs != "none":
                _quantize_input(site, self.inputs, made)
        return count

    def _leave(self, program: Program) -> None:
        """Put the experts that cannot be quantized into `program.left`; VerifyError unless `partial`."""
        reasons = {**_unreached(program), **_unfit(program, self.sites(program), FORMATS[self.weights])}
        reasons = {name: reason for name, reason in reasons.items() if self._wanted(name)}
        if reasons and not self.partial:
            name, reason = next(iter(reasons.items()))
            more = f" (and {len(reasons) - 1} more weights)" if reasons.keys() - {name} else ""
            raise VerifyError(
                f"{name}: {reason}{more}; expected to quantize all experts: --allow-partial leaves such a "
                "layer as it is (partial: true in a spec)"
            )
        program.left.update(reasons)
        for layer in _layers(program) if program.left else ():
            if held := [name for name in layer if name in program.left]:
                why = f"its layer holds {held[0]}, which is left"
                program.left.update({sibling: why for sibling in layer if sibling not in program.left})

    def _wanted(self, name: str) -> bool:
        return any(fnmatchcase(name, g) for g in self.only) and not any(
            fnmatchcase(name, g) for g in self.skip
        )

    def _check_globs(self, program: Program) -> None:
        """Globs that fit no experts are a mistake, and so are those that part a layer's."""
        if (self.only, self.skip) == (("*",), ()):
            return
        layers = _layers(program)
        names = [name for layer in layers for name in layer]
        listed = ", ".join(names[:6]) + (", ..." if names[6:] else "")
        for glob in (*self.only, *self.skip):
            if not any(fnmatchcase(name, glob) for name in names):
                raise SpecError(
                    f"{self.name}: no stack of experts fits {glob!r}; there are {listed or 'none'}"
                )
        for layer in layers:
            taken = [name for name in layer if self._wanted(name)]
            if taken and len(taken) < len(layer):
                rest = next(name for name in layer if name not in taken)
                raise SpecError(
                    f"{self.name}: only={list(self.only)}, skip={list(self.skip)} take {taken[0]} and not "
                    f"{rest}; engines know the experts of a layer as one module: all or none are quantized"
                )


def _instead(program: Program) -> str:
    """What a model without stacks of experts may have, and which pass takes it."""
    alone = [m for m in weight_matmuls(program.graph) if strip(m.x, VIEWS).target in PICKED]
    what = "This model has none"
    if len(alone) > 1:
        first = parameter_name(alone[0].w)
        what = f"{first} and {len(alone) - 1} more read tokens picked for them: experts held as linears"
    return f"{what}; quantize-linears takes linears (nvfp4_default-fp8_cast_kv)"


def _unfit(program: Program, sites: Iterable[Match | Miss], format: Format) -> dict[str, str]:
    """Expert weights of the graph that their format, or the checkpoint, cannot hold whole -> why."""
    reasons: dict[str, str] = {}
    picked: dict[str, set[int]] = {}  # those that are used expert by expert
    for site in sites:
        if not isinstance(site, Match):
            continue
        w, name = site["w"], parameter_name(site["w"])
        width = shape_of(w)[-1]
        if site.rule == ONE_EXPERT.name:
            count = shape_of(w)[0]
            picked.setdefault(name, set(range(count))).discard(int_at(node_at(site.node, 1), 1))
        if not format.holds(width):
            needed = f"{format.title} needs a multiple of {format.block}"
            reasons[name] = f"each expert's input dimension is {width}; {needed}"
        elif (convert := named(program.hub, name, shape_of(w)).convert) is not None:
            reasons[name] = f"no rows of the checkpoint's tensors hold it, but {convert.operations} of them"
    for name, unused in picked.items():
        if unused:
            reasons.setdefault(name, f"the graph never reads expert {min(unused)}")
    return reasons


def _unreached(program: Program) -> dict[str, str]:
    """Stacks of matrices that no matmul of the graph reads although their block, or their list of experts in
    the checkpoint, is part of it -> why."""
    read = {str(n.target): n for n in program.graph.nodes if n.op == "get_attr"}
    stored, reasons = program.hub.stored, dict[str, str]()
    counts = {shape_of(m.w)[0] for m in weight_matmuls(program.graph) if multiplies_experts(m)}
    stacks = [n for n in _stacks(program.hub) if stored[n].stacked or _held(program.hub, n)[0] in counts]
    lists = {holder: name for name in stacks if name in read for holder in holders(stored[name])}
    for name in stacks:
        if name not in read:
            siblings = [lists[holder] for holder in holders(stored[name]) if holder in lists]
            if siblings:
                alone = f"{siblings[0]} alone"
                reasons[name] = f"the graph reads, of its list of experts in the checkpoint, {alone}"
            elif _block_is_read(name, program.hub, read):
                reasons[name] = "the graph never reads these experts"
        elif opaque := [user for user in read[name].users if is_opaque_call(user)]:
            reasons[name] = f"these experts lie inside the opaque call {opaque[0].args[0]}"
    for node in program.graph.nodes:
        for name in _lists(node) if is_opaque_call(node) else ():
            reasons[name] = f"it is one of a list inside the opaque call {node.args[0]}"
    members = {_numbered(name): name for name in (str(m.parameter.target) for m in _listed(program))}
    for name in stored:
        if name not in read and _numbered(name) in members:
            reasons[name] = f"the graph never reads this expert, as it does {members[_numbered(name)]}"
    return reasons


def _listed(program: Program) -> list[WeightMatmul]:
    """Matmuls by experts that are linears of their own."""
    return [m for alike in expert_lists(program.graph, routed=True) for m in alike]


def _numbered(name: str) -> tuple[str, str]:
    """What the names of a parameter of several experts have in common: all but the last number."""
    numbers = list(NUMBER.finditer(name))
    return (name[: numbers[-1].start()], name[numbers[-1].end() :]) if numbers else (name, "")


def _lists(opaque: Node) -> list[str]:
    """The matrices of an opaque module that are alike but for a number in their name: experts one by one."""
    inside = str(opaque.args[0]).partition(":")[2]
    alike: dict[tuple[str, tuple[int, ...]], dict[str, None]] = {}
    for node in opaque.all_input_nodes:
        if node.op == "get_attr" and len(shape_of(node)) == 2:
            name = str(node.target)
            owner, _, own = name.removeprefix(f"{inside}.").rpartition(".")
            alike.setdefault((f"{NUMBER.sub('*', owner)}.{own}", shape_of(node)), {})[name] = None
    return [name for names in alike.values() if len(names) > 1 for name in names]


def _stacks(hub: Hub) -> list[str]:
    """Parameters that are stacks of matrices, one name each."""
    first: dict[str, str] = {}
    for name, stored in hub.stored.items():
        if stored.stacked or _is_stack(_held(hub, name)):
            first.setdefault(stored.keys[0][0], name)
    return list(first.values())


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 1


def _held(hub: Hub, name: str) -> tuple[int, ...]:
    """The shape of the first tensor that holds a parameter."""
    key = hub.stored[name].keys[0][0]
    return hub.tensors[key].shape if key in hub.tensors else ()


def _block_is_read(name: str, hub: Hub, read: Container[str]) -> bool:
    """Whether the graph reads the block of a stack: the smallest module around it with another matrix (its
    router). The text path never enters that of a vision tower."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        inside = [n for n in hub.stored if n.startswith(f"{owner}." if owner else "") and n != name]
        matrices = [n for n in inside if not hub.stored[n].stacked and len(_held(hub, n)) == 2]
        if matrices:
            return any(n in read for n in matrices)
    return False


def _layers(program: Program) -> list[list[str]]:
    """Expert weights, those together that feed one another, read one value or lie in one list of the
    checkpoint: engines know each set as one module, all quantized or not."""
    frontiers = Frontiers(program.graph)
    lists = expert_lists(program.graph, routed=True)
    listed = {m.node for alike in lists for m in alike}
    matmuls = {n: m for n, m in frontiers.matmuls.items() if n in listed or multiplies_experts(m)}
    experts = {node: str(m.parameter.target) for node, m in matmuls.items()}
    chains: list[list[str]] = []
    together: dict[object, list[str]] = {}  # by the value that they read, or by their list
    for node, name in experts.items():
        feeding = frontiers.of(matmuls[node].x)
        if all(other in experts for other in feeding):
            chains.append([name, *(experts[other] for other in feeding)])
        together.setdefault(frontiers.input_of(node), []).append(name)
    for name in _stacks(program.hub):
        for holder in holders(program.hub.stored[name]):
            together.setdefault(holder, []).append(name)
    return joined([*chains, *together.values(), *([experts[m.node] for m in alike] for alike in lists)])


def _quantized_slices(site: Match, format: str, made: dict[Node, Node]) -> int:
    graph, w = site.node.graph, site["w"]
    if site.rule != EXPERTS.name:
        piece = node_at(site.node, 1)
        if piece not in made:
            made[piece] = edit.quantize(piece, piece.name, format=format, scale="max")
        edit.replace(piece, made[piece], [site.node])
        return 1
    quantized = []
    for piece in _slices(w):
        quantized.append(edit.quantize(piece, piece.name, format=format, scale="max"))
    edit.replace(w, edit.call(graph, f"{w.name}_q", dialect.STACK, quantized), [site.node])
    return len(quantized)


def _slices(w: Node) -> list[Node]:
    """The slices of a fused weight; of one that was put together again of rewritten ones, these."""
    if w.target is dialect.STACK:
        return list(nodes_at(w, 0))
    return [edit.call(w.graph, f"{w.name}_e{e}", dialect.SLICE, w, e) for e in range(shape_of(w)[0])]


def _quantize_input(site: Match, format: str, made: dict[Node, Node]) -> None:
    x, name = site["x"], f"{site['w'].name}_input"
    if site.rule == ONE_EXPERT.name:
        name = f"{node_at(node_at(site.node, 1), 0).name}_input"
    if x not in made or site.rule != LISTED.name:
        made[x] = edit.quantize(x, name, format=format, scale=FORMATS[format].input_scale)
    edit.replace(x, made[x], [site.node])
