"""choose-formats: each group of quantized weights gets the format, of several, with which the model as a
whole loses least at a given size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxq.errors import SpecError
from fxq.graph import dialect
from fxq.graph.pattern import Match, Miss
from fxq.graph.program import Program
from fxq.graph.structure.matmuls import WeightMatmul, weight_matmuls
from fxq.graph.structure.views import VIEWS, strip
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
from fxq.pipeline.format_groups import format_groups
from fxq.pipeline.offers import offer
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
    tokens: int = 2048
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
            program.choices.append(offer(program, group, self.formats, format))
        if groups:
            self.budget.check(program)
        return len(groups)

    def calibrate(self, program: Program, session: Session) -> int:
        before, found = len(program.values), program.choices
        run = Variants(program, session.source, session.device)
        batches = some_batches(program, session.batches or (), self.tokens) if self.needs_data else []
        alone = [(g, p) for g, c in enumerate(found) for p, format in enumerate(c.formats) if format != NONE]
        variants = [Variant({found[g].which: p}) for g, p in alone]
        runs = 1 + self.rounds if self.score == "kl" else 1
        with session.progress(self.name, runs * len(run.parts)) as run.step:
            losses, values = self._losses(program, run, batches, variants)
            table = [[0.0] * len(choice.formats) for choice in found]
            for (g, p), loss in zip(alone, losses, strict=True):
                table[g][p] = loss
            places = self.budget.choose(program, table, values.get(TOGETHER, 1))
            if self.score == "kl":
                places, measured = self._checked(program, run, batches, places)
                values.update(measured)
        for choice, own in zip(found, table, strict=True):
            values.update(zip(choice.loss_names, own, strict=True))
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


def _module(matmul: WeightMatmul) -> str:
    return str(matmul.parameter.target).removesuffix(".weight")
