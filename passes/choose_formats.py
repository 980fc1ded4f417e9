"""choose-formats: each group of quantized weights gets the format, of several, with which the model as a
whole loses least at a given size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxq.errors import SpecError
from fxq.graph import dialect, edit
from fxq.graph.arguments import node_at, nodes_at
from fxq.graph.choices import Choice
from fxq.graph.pattern import Match, Miss
from fxq.graph.places import named
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import WeightMatmul, input_quantize, weight_matmuls
from fxq.graph.structure.views import VIEWS, parameter_name, root, shape_of, strip
from fxq.numbers.formats import FORMATS
from fxq.pipeline.base import CalibrationPass, Session, nothing_matched
from fxq.pipeline.choosing import (
    DEFAULT_BITS,
    MEASURED,
    MEASURED_BEFORE,
    NONE,
    TOGETHER,
    Budget,
    Cost,
    pair_of,
    size_of,
    smallest,
)
from fxq.pipeline.facts import Fact, amaxes_filled, amaxes_shared, groups_whole, tensors_whole
from fxq.pipeline.format_groups import format_groups, roundings
from fxq.run.batches import some_batches
from fxq.run.variants import Variant, Variants


@dataclass(frozen=True)
class ChooseFormats(CalibrationPass):
    """Offer every group of quantized weights several formats, measure what the model loses with each, and
    choose those of least loss within a budget.

    A group is what one kernel of an engine multiplies: q/k/v, gate/up and whatever else shares its scales;
    all experts of a layer. The format that it has when the pass comes is taken as earlier passes made it;
    others are scaled by the same amaxes. `resolve-choices` puts in what was chosen.

    formats: those offered: nvfp4, fp8, none (as it is), and nvfp4 weight-only, which takes as much room as
    nvfp4 and rounds no inputs, but multiplies in 16 bits.
    bits: the budget: the bits of a weight on average over all groups, block scales included; 5.0 if no other
    budget is given.
    size: the budget instead: the size of all tensors of the checkpoint, as in 18 GB.
    max_kl: the budget instead: the largest sum of what the groups lose, in nats a token; the smallest model
    is taken.
    cost: what bits are of: the file (size), or the operands of all multiplications of a token (compute).
    score: what a group is judged by: kl, the divergence of the model's predictions with this group alone in
    the format; gram, the error of the outputs of its matmuls, relative to their energy; squared, that of the
    weights, which needs no text.
    groups: formats that are settled, each GLOB=FORMAT, the glob being over module names.
    tokens: how many tokens of the calibration text are measured on, about.
    rounds: 2 measures what each group would change in the chosen model, and chooses once more by that.
    """

    formats: tuple[str, ...] = ("nvfp4", "fp8", "none")
    bits: float | None = None
    size: str | None = None
    max_kl: float | None = None
    cost: Cost = "size"
    score: Literal["kl", "gram", "squared"] = "kl"
    groups: tuple[str, ...] = ()
    tokens: int = 4096
    rounds: int = 1

    name: ClassVar[str] = "choose-formats"
    requires: ClassVar[tuple[Fact, ...]] = (amaxes_shared, amaxes_filled)
    breaks: ClassVar[tuple[Fact, ...]] = (groups_whole, amaxes_shared, tensors_whole, amaxes_filled)
    only_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for format in (*self.formats, *(format for _, format in self._settled())):
            pair_of(format)
        if len(set(self.formats)) != len(self.formats) or len(self.formats) < 2:
            raise SpecError(f"{self.name}: formats is two or more, each once; found {list(self.formats)}")
        given = {n: getattr(self, n) for n in ("bits", "size", "max_kl") if getattr(self, n) is not None}
        if len(given) > 1:
            raise SpecError(f"{self.name}: expected one budget, found {' and '.join(given)}")
        for option, value in given.items():
            if isinstance(value, float) and not 0 < value < float("inf"):
                raise SpecError(f"{self.name}: {option} is a positive number; found {value}")
        if self.max_kl is not None and self.score != "kl":
            raise SpecError(f"{self.name}: max_kl goes with score: kl alone; found score: {self.score}")
        if self.cost == "compute" and "bits" not in given and given:
            raise SpecError(f"{self.name}: cost: compute goes with bits; found {next(iter(given))}")
        if self.tokens < 1 or self.rounds not in (1, 2):
            raise SpecError(
                f"{self.name}: tokens is at least 1 and rounds 1 or 2; found {self.tokens} and {self.rounds}"
            )
        if self.rounds == 2 and self.score != "kl":
            raise SpecError(f"{self.name}: rounds: 2 goes with score: kl alone; found score: {self.score}")
        self.budget  # noqa: B018 (a size that is none)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether it cannot run without calibration batches."""
        return self.score != "squared"

    @property
    def budget(self) -> Budget:
        """What the choice may cost."""
        if self.size is not None:
            return Budget(size=size_of(self.size))
        if self.max_kl is not None:
            return Budget(max_kl=self.max_kl)
        return Budget(bits=DEFAULT_BITS if self.bits is None else self.bits, cost=self.cost)

    def sites(self, program: Program) -> Iterator[Match | Miss]:
        """Every matmul by a quantized weight, with the first of its group; one with a choice misses."""
        for matmul in weight_matmuls(program.graph):
            if strip(matmul.w, VIEWS).target is dialect.CHOOSE:
                yield Miss("group", matmul.node, "its format is chosen already", depth=1)
        for group in format_groups(program):
            for matmul in group:
                yield Match("group", matmul.node, {"x": matmul.x, "w": matmul.w, "first": group[0].node})

    def run(self, program: Program) -> int:
        groups = format_groups(program)
        if not groups and not program.choices:
            raise nothing_matched(self, program, "weights that an earlier pass quantized")
        settled = self._settled_of(groups)
        for group, format in zip(groups, settled, strict=True):
            program.choices.append(self._offer(group, format, program))
        if groups:
            self.budget.check(program)
        return len(groups)

    def calibrate(self, program: Program, session: Session) -> int:
        before, found = len(program.values), program.choices
        run = Variants(program, session.source, session.device)
        batches = some_batches(program, session.batches or (), self.tokens) if self.needs_data else []
        alone = [(g, p) for g, c in enumerate(found) for p, format in enumerate(c.formats) if format != NONE]
        variants = [Variant({found[g].which: p}) for g, p in alone]
        with session.progress(self.name, len(run.parts)) as run.step:
            losses, values = self._losses(program, run, batches, variants)
        table = [[0.0] * len(choice.formats) for choice in found]
        for (g, p), loss in zip(alone, losses, strict=True):
            table[g][p] = loss
        for choice, own in zip(found, table, strict=True):
            values.update(zip(choice.loss_names, own, strict=True))
        places = self.budget.choose(program, table, values.get(TOGETHER, 1))
        if self.score == "kl":
            places, measured = self._checked(program, run, batches, places)
            values.update(measured)
        program.values.update((n, torch.tensor(loss, dtype=torch.float64)) for n, loss in values.items())
        for choice, place in zip(found, places, strict=True):
            program.values[choice.which] = torch.tensor(place)
        return len(program.values) - before

    def _losses(
        self, program: Program, run: Variants, batches: list[Tensor], variants: list[Variant]
    ) -> tuple[list[float], dict[str, float]]:
        """(what each variant loses, TOGETHER if it was measured)."""
        if self.score == "gram":
            return run.output_errors(batches, variants), {}
        if self.score == "squared":
            return run.weight_errors(variants), {}
        least = {c.which: place for c, place in zip(program.choices, smallest(program), strict=True)}
        *losses, whole = run.divergences(batches, [*variants, Variant(least)])
        alone = sum(
            loss
            for loss, variant in zip(losses, variants, strict=True)
            if variant.chosen.items() <= least.items()
        )
        return losses, {TOGETHER: whole / alone} if alone and whole else {}

    def _checked(
        self,
        program: Program,
        run: Variants,
        batches: list[Tensor],
        places: list[int],
    ) -> tuple[list[int], dict[str, float]]:
        """The places, or those of a second round if that is asked for and the model then loses less; and
        what it loses with them."""
        names = [choice.which for choice in program.choices]
        first = dict(zip(names, places, strict=True))
        if self.rounds == 1:
            return places, {MEASURED: run.divergences(batches, [Variant(first)])[0]}
        swaps = [
            (g, p) for g, c in enumerate(program.choices) for p in range(len(c.formats)) if p != places[g]
        ]
        variants = [Variant(first), *(Variant({**first, names[g]: p}, parent=0) for g, p in swaps)]
        base, *swapped = run.divergences(batches, variants)
        again = [[base] * len(choice.formats) for choice in program.choices]
        for (g, p), loss in zip(swaps, swapped, strict=True):
            again[g][p] = loss
        second = self.budget.choose(program, again)
        (loss,) = run.divergences(batches, [Variant(dict(zip(names, second, strict=True)))])
        better = second if loss < base else places
        return better, {MEASURED: min(loss, base), MEASURED_BEFORE: base}

    # What a group is offered.

    def _settled(self) -> list[tuple[str, str]]:
        """(glob, format) of `groups`."""
        pairs = []
        for text in self.groups:
            glob, equals, format = text.rpartition("=")
            if not equals or not glob.strip():
                raise SpecError(
                    f"{self.name}: groups is a list of GLOB=FORMAT, as in '*.o_proj=fp8'; found {text!r}"
                )
            pairs.append((glob.strip(), format.strip()))
        return pairs

    def _settled_of(self, groups: list[list[WeightMatmul]]) -> list[str | None]:
        """For each group the format that is settled for it, if any."""
        modules = [[_module(matmul) for matmul in group] for group in groups]
        for glob, _ in self._settled() if groups else ():
            if not any(fnmatchcase(module, glob) for group in modules for module in group):
                known = list(dict.fromkeys(module for group in modules for module in group))
                raise SpecError(
                    f"{self.name}: no quantized weight fits {glob!r}; there are {', '.join(known[:6])}"
                    + (", ..." if known[6:] else "")
                )
        found: list[str | None] = []
        for group in modules:
            asked = {f: m for glob, f in self._settled() for m in group if fnmatchcase(m, glob)}
            if len(asked) > 1:
                said = " and ".join(f"{module} {format}" for format, module in asked.items())
                raise SpecError(
                    f"{self.name}: groups: {said}; one kernel multiplies {', '.join(dict.fromkeys(group))}, "
                    "so that they have one format: change the globs"
                )
            found.append(next(iter(asked), None))
        return found

    def _offer(self, group: list[WeightMatmul], settled: str | None, program: Program) -> Choice:
        """Put an `fxq.choose` for each weight of a group and for what multiplies it."""
        asked = dict.fromkeys((*self.formats, *([settled] if settled is not None else [])))
        width = shape_of(roundings(group[0])[0])[-1]
        formats = [f for f in asked if f == NONE or FORMATS[pair_of(f)[0]].holds(width)]
        if settled is not None and settled not in formats:
            raise SpecError(
                f"{self.name}: {_module(group[0])} has rows of {width}, which {settled} cannot hold"
            )
        which = edit.value(program.graph, f"{_parameter(group[0]).name}_which", torch.tensor(0))
        weights = dict.fromkeys(strip(matmul.w, VIEWS) for matmul in group)
        inputs = {quantize: matmul for matmul in group if (quantize := input_quantize(matmul.x)) is not None}
        for matmul in group:
            if input_quantize(matmul.x) is None and any(pair_of(f)[1] != NONE for f in formats):
                raise SpecError(
                    f"{self.name}: the inputs of {_module(matmul)} are not rounded, so that there is no "
                    f"scale for {formats[0]}; expected quantize passes with inputs, beside which `nvfp4 "
                    "weight-only` may be offered"
                )
        choice = _choice(which.name, group, tuple(formats), settled, program)
        for w in weights:
            values = [_weight(w, pair_of(format)[0]) for format in formats]
            _replace(w, f"{_first(w).name}_choice", values, which)
        for quantize in inputs:
            values = [_input(quantize, pair_of(format)[1]) for format in formats]
            _replace(quantize, f"{quantize.name}_choice", values, which)
        return choice


def _choice(
    which: str, group: list[WeightMatmul], formats: tuple[str, ...], settled: str | None, program: Program
) -> Choice:
    parameters = {_parameter(matmul).name: _parameter(matmul) for matmul in group}
    weights = dict.fromkeys(rounding for matmul in group for rounding in roundings(matmul))
    numbers = sum(w.meta["val"].numel() for w in weights)
    work = sum(shape_of(roundings(m)[0])[0] * m.x.meta["val"].numel() for m in group)
    plain = 8 * next(iter(weights)).meta["val"].dtype.itemsize
    pairs = [pair_of(format) for format in formats]
    stored = (named(program.hub, str(p.target), shape_of(p)) for p in parameters.values())
    return Choice(
        which,
        tuple(str(p.target) for p in parameters.values()),
        formats,
        tensors=sum(len(keys) for s in stored for keys in s.keys),
        numbers=numbers,
        work=work,
        bits=tuple(numbers * (FORMATS[w].bits if w in FORMATS else plain) for w, _ in pairs),
        operations=tuple(work * (FORMATS[x].operand_bits if x in FORMATS else plain) for _, x in pairs),
        fixed=settled,
    )


def _replace(old: Node, name: str, values: list[Node], which: Node) -> None:
    """Let what reads `old` read a choice between values."""
    chosen = edit.call(old.graph, name, dialect.CHOOSE, values, which)
    edit.replace(old, chosen, [user for user in old.users if user is not chosen])


def _weight(w: Node, format: str) -> Node:
    """A rounded weight, or a stack of such, in a format: itself, the same amaxes in another, or unrounded."""
    if w.target is not dialect.STACK:
        return _rounded(w, format)
    pieces = [_rounded(piece, format) for piece in nodes_at(w, 0)]
    if pieces == list(nodes_at(w, 0)):
        return w
    whole = {node_at(piece, 0) for piece in pieces if piece.target is dialect.SLICE}
    if len(whole) == 1 and [piece.args for piece in pieces] == [(*whole, e) for e in range(len(pieces))]:
        return whole.pop()
    return edit.call(w.graph, f"{_first(w).name}_{format}", dialect.STACK, pieces)


def _rounded(rounding: Node, format: str) -> Node:
    if format == rounding.kwargs["format"]:
        return rounding
    before = node_at(rounding, 0)
    if format == NONE:
        return before
    scale = FORMATS[format].scales[-1]
    return edit.quantize(
        before, f"{before.name}_{format}", format=format, scale=scale, amax=node_at(rounding, 1)
    )


def _input(quantize: Node, format: str) -> Node:
    before, scale = node_at(quantize, 0), FORMATS[format].input_scale if format in FORMATS else ""
    if format in (NONE, quantize.kwargs["format"]):
        return before if format == NONE else quantize
    amax = node_at(quantize, 1)
    return edit.quantize(before, f"{before.name}_{format}", format=format, scale=scale, amax=amax)


def _first(w: Node) -> Node:
    """The parameter behind a weight."""
    parameter = root(w)
    assert parameter is not None
    return parameter


def _parameter(matmul: WeightMatmul) -> Node:
    return matmul.parameter


def _module(matmul: WeightMatmul) -> str:
    return parameter_name(matmul.w).removesuffix(".weight")
